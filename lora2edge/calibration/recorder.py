"""Statistics of what linear layers and experts are given and give, taken while a layer runs."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from lora2edge.calibration.layers import Batch, LayeredModel, Owner
from lora2edge.contracts import QUANTILES, ChannelStats
from lora2edge.errors import DataError

_SLAB_ROWS = 256
"""Squared at once, in the processor's cache."""
_SAMPLED = 8
"""Quantiles are of every so-manieth token of a batch; maxima and squares of all."""
_BINS = 1 << 15
"""Of magnitudes: the upper half of a float32 without its sign, so that a bin is at most 0.8 % wide."""


@dataclass(slots=True)
class _Found:
    """Of one array, or the sum over many."""

    squares: Any
    """`[channels]` float64: sum of x²; None for outputs."""
    maxima: Any
    """`[channels]` float32: largest |x|."""
    bins: Any
    """`[_BINS]` int64: how many magnitudes of the sampled tokens are in each bin."""
    count: int
    """Tokens."""

    def add(self, other: _Found, times: int) -> None:
        if self.squares is not None:
            self.squares += times * other.squares
        self.maxima = self.maxima.maximum(other.maxima)
        self.bins += times * other.bins
        self.count += times * other.count


class Recorder:
    """Watches the loaded layer; what it was given by each batch, padding left out."""

    def __init__(self, model: LayeredModel) -> None:
        self._model = model
        self._keys = {owner.path: owner.layer for owner in model.owners.values()}
        self._inputs: dict[str, _Found] = {}
        self._outputs: dict[str, _Found] = {}
        self._tokens: Any = None
        """`[n]` int64: which positions of the current batch, of B · T, are tokens."""
        self._shape = (0, 0)
        self._times = 1
        self._seen: Any = None
        self._last: Any = None
        """Of the inputs that were seen last: what was found, or, for a visit, the inputs without padding."""
        self._visit: Callable[[str, Any, int], None] | None = None
        self._names: dict[str, list[str]] = {}
        for name, owner in model.owners.items():
            self._names.setdefault(_key(owner), []).append(name)

    @contextlib.contextmanager
    def watching(self, layer: int, visit: Callable[[str, Any, int], None] | None = None) -> Iterator[None]:
        """Within the block the modules that run with `layer` are watched.

        With `visit` no statistics are taken: it is called with a tensor's name, its inputs without padding, and how
        many times these count.
        """
        import torch

        self._inputs, self._outputs, self._visit = {}, {}, visit
        with contextlib.ExitStack() as hooks:
            stacks: dict[str, list[str]] = {}
            for path, at in self._keys.items():
                if at != layer:
                    continue
                module = self._model.modules.get(path)
                if isinstance(module, torch.nn.Linear):
                    hook = module.register_forward_hook(
                        lambda module, given, output, path=path: self._note(path, given[0], output)
                    )
                    hooks.callback(hook.remove)
                elif module is None:
                    stacks.setdefault(path.rpartition(".")[0], []).append(path)
            for path, parameters in stacks.items():
                hooks.enter_context(self._watching_experts(self._model.modules[path], parameters))
            yield

    def begin(self, batch: Batch) -> None:
        """What runs next is `batch`."""
        seen = batch.seen()
        self._tokens = seen.flatten().nonzero()[:, 0].to(self._model.device)
        self._shape, self._times = tuple(seen.shape), batch.times
        self._seen = None

    def add_head(self, inputs: Any) -> None:
        """The output layer is not run; `inputs`: `[B, T, hidden]`, what it would be given."""
        if self._model.head is not None:
            self._note(self._model.head, inputs, None)

    def results(self, layer: int) -> dict[str, ChannelStats]:
        """By checkpoint tensor, for those that run with `layer`.

        Raises DataError where one is not finite: of what ran first, the rest follows from it.
        """
        found: dict[str, ChannelStats] = {}
        keys: dict[str, list[str]] = {}
        for name, owner in self._model.owners.items():
            if owner.layer != layer:
                continue
            key = _key(owner)
            rows = slice(0, None) if owner.expert is None else slice(*_part(owner.part, owner.info.shape[0]))
            found[name] = _stats(self._inputs.get(key), self._outputs.get(key), owner.info.shape[1], rows)
            keys.setdefault(key, []).append(name)
        for name in itertools.chain.from_iterable(keys.get(key, ()) for key in self._inputs):
            _check(name, found[name])
        return found

    def _note(self, key: str, inputs: Any, outputs: Any, *, chosen: bool = False) -> None:
        """`chosen`: there is no padding in it."""
        if self._seen is None or inputs is not self._seen:  # q, k and v, or gate and up, are given the same one
            self._seen = inputs
            if self._visit is not None:
                rows, tokens = self._rows(inputs, chosen)
                self._last = rows.index_select(0, tokens)
            else:
                self._last = self._measure(inputs, chosen, squared=True)
        if self._visit is not None:
            for name in self._names[key]:
                self._visit(name, self._last, self._times)
            return
        assert isinstance(self._last, _Found)
        _put(self._inputs, key, self._last, self._times)
        if outputs is not None:
            _put(self._outputs, key, self._measure(outputs, chosen, squared=False), self._times)

    def _measure(self, values: Any, chosen: bool, *, squared: bool) -> _Found:
        """Slabs of rows that stay in the processor's cache."""
        import torch

        rows, tokens = self._rows(values, chosen)
        width = rows.shape[-1]
        squares = torch.zeros(width, dtype=torch.float32, device=rows.device)
        maxima = torch.zeros(width, dtype=torch.float32, device=rows.device)
        for slab in tokens.split(_SLAB_ROWS):
            part = rows.index_select(0, slab).float().abs_()
            maxima = torch.maximum(maxima, part.amax(0))  # aminmax takes twelve times as long
            if squared:
                squares += part.new_ones(len(slab)) @ part.square_()
        sampled = rows.index_select(0, tokens[::_SAMPLED]).float().abs_().flatten()
        bins = torch.bincount(sampled.view(torch.int32) >> 16, minlength=_BINS)
        return _Found(squares.double() if squared else None, maxima, bins, len(tokens))

    def _rows(self, values: Any, chosen: bool) -> tuple[Any, Any]:
        """`values` as rows, and which of them are tokens."""
        import torch

        rows = values.reshape(-1, values.shape[-1])
        batch = values.shape[:2] == self._shape or values.shape[0] == self._shape[0] * self._shape[1]
        return rows, self._tokens if batch and not chosen else torch.arange(len(rows), device=rows.device)

    @contextlib.contextmanager
    def _watching_experts(self, module: Any, parameters: list[str]) -> Iterator[None]:
        """Experts are given the tokens without padding, and each product with one of them is told by its weight."""
        import torch

        known = {}
        for path in parameters:
            stack = getattr(module, path.rpartition(".")[2])
            known.update({stack[expert].data_ptr(): f"{path}:{expert}" for expert in range(len(stack))})
        recorder = self

        class Products(torch.overrides.TorchFunctionMode):  # type: ignore[misc]
            def __torch_function__(self, call: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
                output = call(*arguments, **(named or {}))
                if call is torch.nn.functional.linear and (key := known.get(arguments[1].data_ptr())):
                    recorder._note(key, arguments[0], output, chosen=True)
                return output

        run = module.forward

        def forward(hidden: Any, index: Any, weights: Any) -> Any:
            tokens = recorder._tokens
            with Products():
                done = run(hidden[tokens], index[tokens], weights[tokens])
            return torch.zeros_like(hidden).index_copy_(0, tokens, done)

        module.forward = forward
        try:
            yield
        finally:
            del module.forward


def _put(found: dict[str, _Found], key: str, new: _Found, times: int) -> None:
    if key not in found:
        squares = None if new.squares is None else new.squares * 0
        found[key] = _Found(squares, new.maxima * 0, new.bins * 0, 0)
    found[key].add(new, times)


def _key(owner: Owner) -> str:
    return owner.path if owner.expert is None else f"{owner.path}:{owner.expert}"


def _part(part: int, rows: int) -> tuple[int, int]:
    return part * rows, (part + 1) * rows


def _stats(inputs: _Found | None, outputs: _Found | None, channels: int, rows: slice) -> ChannelStats:
    if inputs is None:
        nothing = np.zeros(channels, np.float32)
        return ChannelStats(nothing, 0)
    return ChannelStats(
        mean_square=(inputs.squares / inputs.count).cpu().numpy().astype(np.float32),
        count=inputs.count,
        input_maxima=inputs.maxima.cpu().numpy(),
        input_quantiles=_quantiles(inputs),
        output_maxima=outputs.maxima.cpu().numpy()[rows].copy() if outputs else None,
        output_quantiles=_quantiles(outputs) if outputs else None,
    )


def _quantiles(found: _Found) -> Any:
    """`[3]` float32: the upper ends of the bins that the quantiles fall in, no larger than the maximum."""
    sums = found.bins.cpu().numpy().cumsum()
    places = np.searchsorted(sums, np.ceil(np.asarray(QUANTILES) * sums[-1]))
    with np.errstate(invalid="ignore"):
        ends = ((places.astype(np.uint32) + 1) << 16).view(np.float32)
    return np.minimum(ends, np.float32(found.maxima.max().item()))


def _check(name: str, stats: ChannelStats) -> None:
    for side, values in (
        ("input", stats.mean_square), ("input", stats.input_maxima), ("output", stats.output_maxima)
    ):  # fmt: skip
        if values is not None and not np.isfinite(values).all():
            bad = np.flatnonzero(~np.isfinite(values))
            raise DataError(
                "calibration-not-finite",
                f"the {side}s of {name} are not finite in float32",
                why=f"{name}: {side} channel {bad[0]} of {len(values)}"
                + (f", and {len(bad) - 1} more" if len(bad) > 1 else ""),
                hint="the base or the adapter holds broken weights: lora2edge merge --prove says more",
            )
