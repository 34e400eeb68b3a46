"""Activation statistics: one pass of the merged model over the calibration text."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lora2edge.calibration.model import build_model, require
from lora2edge.calibration.stored import StoredCalibration, store
from lora2edge.contracts import Checkpoint, Progress, Sample
from lora2edge.errors import DataError

_BATCH_TOKENS = 1024
"""Padded tokens of one forward pass; larger activations go back to the system after each layer, which costs more."""
_SLAB_ROWS = 256
"""Squared at once, in the processor's cache."""


def calibrate(
    view: Checkpoint,
    samples: Sequence[Sample],
    folder: Path,
    progress: Progress,
    *,
    device: str,
    threads: int,
    dtype: str = "float32",
) -> StoredCalibration:
    """Mean of x² per input channel of every linear layer, over all tokens of `samples`; written into `folder`.

    It is what llama.cpp calls the importance matrix (`llama-imatrix`). The model runs in `dtype`: in float32 on the
    unrounded merged weights, or in bfloat16, which is faster on processors that multiply it. Squares are float32,
    their sums float64. What all samples begin with is run once and counted for each. The output layer is covered
    too. Raises DataError where a layer saw no token or a statistic is not finite.
    """
    require("torch", "transformers")
    import torch

    torch.set_num_threads(threads)
    model = build_model(view, dtype=dtype, device=device, rounded=False)
    recorder = _Recorder(model)
    progress.start("calibrate", len(samples), "samples")
    prefix = _shared_prefix(samples)
    with torch.inference_mode():
        cache = _run(model, recorder, [prefix], times=len(samples)) if prefix else None
        for group in _batches(samples):
            _run(model, recorder, [sample.ids[len(prefix) :] for sample in group], cache)
            progress.advance(len(group))
    progress.finish()
    means, counts = recorder.by_tensor(view, model)
    _check(means, counts)
    return store(folder, samples, means, counts)


def _run(model: Any, recorder: _Recorder, rows: Sequence[Sequence[int]], prefix: Any = None, times: int = 1) -> Any:
    """One padded batch behind the tokens whose keys and values are in `prefix`; returns the keys and values of all.

    Padding is on the right, where no token sees it. `times`: how many samples the rows stand for.
    """
    import torch

    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    seen = torch.zeros(len(rows), width, dtype=torch.bool)
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        seen[row, : len(tokens)] = True
    recorder.tokens, recorder.times = seen.flatten().nonzero()[:, 0].to(model.device), times
    cache = copy.deepcopy(prefix)
    if cache is not None:
        cache.batch_repeat_interleave(len(rows))
    done = model.base_model(input_ids=ids.to(model.device), past_key_values=cache, use_cache=True)
    # The output layer itself is not run: its input is all that is wanted, its output is the largest array.
    recorder.add(model.get_output_embeddings(), done.last_hidden_state)
    return done.past_key_values


def _shared_prefix(samples: Sequence[Sample]) -> Sequence[int]:
    """What all samples begin with (template, system prompt), so that it is run once; each keeps a token of its own."""
    rows = [sample.ids[:-1] for sample in samples]
    first, last = min(rows, default=()), max(rows, default=())  # in the order of a dictionary
    return [token for token, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))]


class _Recorder:
    """Sums x² of the inputs of all linear layers, padding left out."""

    def __init__(self, model: Any) -> None:
        import torch

        self.tokens: Any = None
        """`[n]` int64: which positions of the current batch, of B · T, are tokens."""
        self.times = 1
        """How many times the current batch counts."""
        self.sums: dict[int, Any] = {}
        self.counts: dict[int, int] = {}
        self._inputs: Any = None
        self._found: tuple[Any, int] = (0.0, 0)
        """Sum of squares per channel, and tokens, of the inputs that were seen last."""
        for module in model.base_model.modules():
            if isinstance(module, torch.nn.Linear):
                self.sums[id(module)], self.counts[id(module)] = 0.0, 0
                module.register_forward_pre_hook(lambda module, arguments: self.add(module, arguments[0]))

    def add(self, module: Any, inputs: Any) -> None:
        """`inputs`: `[B, T, channels]`."""
        if inputs is not self._inputs:  # q, k and v, or gate and up, are given the same one
            self._inputs, self._found = inputs, (self.times * self._squares(inputs), self.times * len(self.tokens))
        total, count = self._found
        self.sums[id(module)] = self.sums.get(id(module), 0.0) + total
        self.counts[id(module)] = self.counts.get(id(module), 0) + count

    def _squares(self, inputs: Any) -> Any:
        """`[channels]` float64: the sum of x² over the tokens. Slabs of rows that stay in the processor's cache."""
        import torch

        rows = inputs.flatten(0, -2)
        total = torch.zeros(rows.shape[-1], dtype=torch.float32, device=rows.device)
        for tokens in self.tokens.split(_SLAB_ROWS):
            squares = rows.index_select(0, tokens).float().square_()
            total += squares.new_ones(len(tokens)) @ squares
        return total.double()

    def by_tensor(self, view: Checkpoint, model: Any) -> tuple[dict[str, Any], dict[str, int]]:
        """Means and counts by checkpoint tensor name. A tied embedding gets the output layer's."""
        import torch

        head = model.get_output_embeddings()
        owners = {f"{name}.weight": module for name, module in model.named_modules() if id(module) in self.sums}
        owners.update(
            (f"{name}.weight", head)
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Embedding) and module.weight is head.weight
        )
        means: dict[str, Any] = {}
        counts: dict[str, int] = {}
        for name in view.tensors:
            module = next((owners[place] for place in view.module_names(name) if place in owners), None)
            if module is None:
                continue
            counts[name] = self.counts.get(id(module), 0)
            if counts[name]:
                means[name] = (self.sums[id(module)] / counts[name]).cpu().numpy().astype(np.float32)
        return means, counts


def _batches(samples: Sequence[Sample]) -> Iterator[list[Sample]]:
    """Samples of similar length, at most `_BATCH_TOKENS` tokens when padded."""
    group: list[Sample] = []
    for sample in sorted(samples, key=lambda sample: len(sample.ids)):
        if group and (len(group) + 1) * len(sample.ids) > _BATCH_TOKENS:
            yield group
            group = []
        group.append(sample)
    if group:
        yield group


def _check(means: dict[str, Any], counts: dict[str, int]) -> None:
    unseen = [name for name, count in counts.items() if count == 0]
    broken = [name for name, values in means.items() if not np.isfinite(values).all()]
    if unseen or not counts:
        raise DataError(
            "calibration-gap",
            f"{len(unseen)} layers saw no token",
            why=", ".join(unseen[:5]),
            hint="give more calibration text",
        )
    if broken:
        raise DataError(
            "calibration-not-finite",
            f"the inputs of {len(broken)} layers are not finite in float32",
            why=", ".join(broken[:5]),
            hint="the base or the adapter holds broken weights: lora2edge merge --prove says more",
        )
