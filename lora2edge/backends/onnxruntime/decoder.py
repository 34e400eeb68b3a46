"""A decoder graph in ONNX Runtime: its inputs, a cache that is written in place, and calls on both.

Inputs: `input_ids` int64 `[batch, sequence]`; `attention_mask` int64 `[batch, total]`, whose row sums are the lengths
(padding is on the right); `past_key_values.L.key` and `.value` `[batch, kv_heads, past, head_size]`; and, where the
graph has it, `logits_positions` int64 `[rows, kept]`. Outputs: `logits` `[batch, kept, V]` and `present.L.key`,
`.value`. GroupQueryAttention takes several new tokens of a sequence that has a past only at batch 1.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lora2edge.backends.onnxruntime.runtime import Opened, load_runtime
from lora2edge.errors import InputError, UnsupportedError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lora2edge.contracts import FloatArray, IntArray

_TYPES: dict[str, np.dtype[Any]] = {"tensor(float)": np.dtype(np.float32), "tensor(float16)": np.dtype(np.float16)}
_POSITIONS = "logits_positions"
_NEWEST = np.full((1, 1), -1, np.int64)
"""The graph's own default of the positions."""
_PAST = re.compile(r"past_key_values\.\d+\.(key|value)")


class Decoder:
    """An opened decoder graph."""

    def __init__(self, opened: Opened) -> None:
        self.session = opened.session
        self.device = opened.device
        inputs = {value.name: value for value in self.session.get_inputs()}
        outputs = {value.name: value for value in self.session.get_outputs()}
        self.pasts = [name for name in inputs if _PAST.fullmatch(name)]
        self.presents = [name.replace("past_key_values", "present") for name in self.pasts]
        unknown = sorted(inputs.keys() - {"input_ids", "attention_mask", *self.pasts})
        missing = sorted({"logits", *self.presents} - outputs.keys())
        if unknown or missing or not self.pasts or "input_ids" not in inputs:
            raise UnsupportedError(
                "decoder-inputs",
                f"{opened.folder} holds no decoder that can be run",
                why=f"inputs that are not known: {', '.join(unknown) or 'none'}; "
                f"outputs that are missing: {', '.join(missing) or 'none'}; {len(self.pasts)} inputs of a cache",
                hint="lora2edge inspect says what the artifact was made for",
            )
        first = inputs[self.pasts[0]]
        if first.type not in _TYPES:
            raise UnsupportedError("cache-type", f"a cache of {first.type} cannot be run here")
        self.cache_type: np.dtype[Any] = _TYPES[first.type]
        self.kv_shapes = [(int(inputs[name].shape[1]), int(inputs[name].shape[3])) for name in self.pasts]
        """Of each input of the cache: heads and their size."""
        self.vocab_size = int(outputs["logits"].shape[2])
        told = self.session.get_modelmeta().custom_metadata_map
        self.switch_length, self.recompute_length = (
            int(told[key]) if (key := f"lora2edge.{name}_length") in told else None for name in ("switch", "recompute")
        )
        """LongRoPE: a prompt of more tokens than the first is turned by other angles, all of it, so it is given as a
        whole; a sequence that grows beyond the second (Phi-3) is given again. transformers' generation does so."""
        self.picks_positions = _POSITIONS in {value.name for value in self.session.get_overridable_initializers()}
        """Whether it computes the logits of those positions only that are asked for."""

    def token_bytes(self) -> int:
        """Of the cache, for one token."""
        return sum(heads * size for heads, size in self.kv_shapes) * self.cache_type.itemsize

    def run_rows(self, rows: Sequence[Sequence[int]], positions: IntArray) -> FloatArray:
        """Several sequences at once, without a cache: `[rows, kept, V]` at `positions` `[rows, kept]`."""
        width = max(len(ids) for ids in rows)
        ids = np.zeros((len(rows), width), np.int64)
        mask = np.zeros_like(ids)
        for row, tokens in enumerate(rows):
            ids[row, : len(tokens)] = tokens
            mask[row, : len(tokens)] = 1
        feeds: dict[str, NDArray[Any]] = {"input_ids": ids, "attention_mask": mask}
        for name, (heads, size) in zip(self.pasts, self.kv_shapes, strict=True):
            feeds[name] = np.zeros((len(rows), heads, 0, size), self.cache_type)
        if self.picks_positions:
            feeds[_POSITIONS] = positions
        logits: FloatArray = self.session.run(["logits"], feeds)[0]
        if self.picks_positions:
            return logits
        if logits.shape[1] != width:
            raise UnsupportedError(
                "last-logits-only",
                f"the graph gives logits of {logits.shape[1]} of {width} tokens",
                why="it was written for generation only, so quality cannot be measured on it",
                hint="a graph of lora2edge's own, or one exported with all logits, can be measured",
            )
        return logits[np.arange(len(rows))[:, None], positions]


class Cache:
    """Keys and values of `rows` sequences of up to `length` tokens, `[rows, heads, length, size]` for each input."""

    def __init__(self, decoder: Decoder, rows: int, length: int) -> None:
        self._decoder = decoder
        self._shapes = [(heads, length, size) for heads, size in decoder.kv_shapes]
        self._arrays: list[Any] = []
        try:
            if decoder.device == "cuda":
                value = load_runtime().OrtValue
                self._arrays = [
                    value.ortvalue_from_shape_and_type((rows, *shape), decoder.cache_type.type, "cuda", 0)
                    for shape in self._shapes
                ]
                self._addresses = [array.data_ptr() for array in self._arrays]
            else:  # zeros: a page takes memory when it is first written
                self._arrays = [np.zeros((rows, *shape), decoder.cache_type) for shape in self._shapes]
                self._addresses = [array.ctypes.data for array in self._arrays]
        except (MemoryError, RuntimeError) as error:
            needed = decoder.token_bytes() * rows * length
            raise InputError(
                "cache-memory",
                f"a cache of {rows} slots of {length} tokens takes {needed / 1e9:.1f} GB, which cannot be had",
                why=str(error),
                hint="open the session with fewer slots, or a smaller max_length",
            ) from error

    @property
    def is_movable(self) -> bool:
        """Whether `move` can be called."""
        return self._decoder.device == "cpu"

    def bind(self, binding: Any, first: int, count: int) -> None:
        """Makes rows `first : first + count` the past and the present of a call."""
        decoder = self._decoder
        for past, present, shape, address in zip(
            decoder.pasts, decoder.presents, self._shapes, self._addresses, strict=True
        ):
            row_bytes = int(np.prod(shape)) * decoder.cache_type.itemsize
            place = (decoder.device, 0, decoder.cache_type.type, (count, *shape), address + first * row_bytes)
            binding.bind_input(past, *place)
            binding.bind_output(present, *place)

    def move(self, source: int, destination: int, length: int) -> None:
        """Copies the first `length` tokens of a row to another."""
        for array in self._arrays:
            array[destination, :, :length] = array[source, :, :length]


class Call:
    """A call on some rows of a cache, bound once and run many times."""

    def __init__(self, decoder: Decoder, cache: Cache, first: int, count: int) -> None:
        self._decoder = decoder
        self._cache = cache  # bound by address
        self._binding = decoder.session.io_binding()
        cache.bind(self._binding, first, count)
        self._logits = np.empty((count, 1, decoder.vocab_size), np.float32)
        self._bind_logits(self._logits)

    def run(self, ids: IntArray, mask: IntArray) -> FloatArray:
        """The logits `[rows, V]` of each row's newest token; overwritten by the next run."""
        self._feed(ids, mask)
        if self._decoder.picks_positions or ids.shape[1] == 1:
            self._run()
            return self._logits[:, 0]
        return self._run_all(ids.shape)[:, -1]

    def run_kept(self, ids: IntArray, mask: IntArray, positions: IntArray, out: FloatArray) -> None:
        """The logits at `positions` `[kept]` of the one row's new tokens, written to `out` `[kept, V]`."""
        self._feed(ids, mask)
        if self._decoder.picks_positions:
            # The graph declares one row of logits, and ONNX Runtime refuses a bound array of more: this one it makes.
            self._bind_positions(positions[None])
            self._binding.bind_output("logits", "cpu")
            self._run()
            out[:] = self._binding.get_outputs()[-1].numpy()[0]
            self._bind_positions(_NEWEST)
            self._bind_logits(self._logits)
        else:
            out[:] = self._run_all(ids.shape)[0, positions]

    def _feed(self, ids: IntArray, mask: IntArray) -> None:
        self._binding.bind_cpu_input("input_ids", ids)
        self._binding.bind_cpu_input("attention_mask", mask)

    def _run_all(self, shape: tuple[int, ...]) -> FloatArray:
        """All logits of a graph that gives no others."""
        out = np.empty((*shape, self._decoder.vocab_size), np.float32)
        self._bind_logits(out)
        self._run()
        self._bind_logits(self._logits)
        return out

    def _bind_positions(self, positions: IntArray) -> None:
        # By its address: `bind_cpu_input` does not find inputs that have a default.
        self._binding.bind_input(_POSITIONS, "cpu", 0, np.int64, positions.shape, positions.ctypes.data)

    def _bind_logits(self, out: FloatArray) -> None:
        self._binding.bind_output("logits", "cpu", 0, np.float32, out.shape, out.ctypes.data)

    def _run(self) -> None:
        self._decoder.session.run_with_iobinding(self._binding)


def lengths_mask(lengths: IntArray) -> IntArray:
    """`[rows, longest]` int64, whose row sums are `lengths`: ones, then zeros."""
    return (np.arange(lengths.max()) < lengths[:, None]).astype(np.int64)
