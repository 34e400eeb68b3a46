"""What rounding did to each matrix, from the finished files: they are read back and compared with the checkpoint."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lora2edge.backends.onnxruntime.rounding import block_values
from lora2edge.checkpoint import decode, in_order
from lora2edge.contracts import Checkpoint, Progress, TensorDamage
from lora2edge.errors import CheckpointError
from lora2edge.graph.builder import BlockFormat
from lora2edge.graph.write import SLAB_ELEMENTS, SOURCES

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lora2edge.contracts import FloatArray

    Bytes = NDArray[np.uint8]

_FLOATS = {1: "F32", 10: "F16", 16: "BF16"}
"""ONNX's numbers of the float dtypes."""


@dataclass(frozen=True, slots=True)
class _Stored:
    """A tensor of the external file."""

    name: str
    kind: int
    """ONNX's number of its dtype."""
    shape: tuple[int, ...]
    offset: int

    def of(self, data: Bytes, dtype: type[np.generic]) -> NDArray[Any]:
        """Its elements in the bytes of the file, a view."""
        return np.frombuffer(data, dtype, math.prod(self.shape), self.offset).reshape(self.shape)


@dataclass(frozen=True, slots=True)
class _Slab:
    """Rows `start:stop` of a checkpoint's tensor, which are `row` and the following of a matrix of the file."""

    tensor: str
    start: int
    stop: int
    matrix: _Stored
    scales: _Stored | None
    row: int
    columns: int

    @property
    def form(self) -> BlockFormat | None:
        """Where it is stored in blocks."""
        if self.scales is None or len(self.matrix.shape) == 2:
            return None
        _, blocks, width = self.matrix.shape
        block = -(-self.columns // blocks)
        return BlockFormat(4 if 2 * width == block else 8, block)


@dataclass(slots=True)
class _Sums:
    """Squares and products over a tensor, in float64."""

    weight: float = 0.0
    error: float = 0.0
    delta: float = 0.0
    kept: float = 0.0


def measure_damage(checkpoint: Checkpoint, model: Path, progress: Progress) -> list[TensorDamage]:
    """One entry per matrix of the checkpoint; none where another tool wrote the graph, which does not say what is what.

    Raises CheckpointError where file and checkpoint do not match.
    """
    found = _read_model(model)
    if found is None:
        return []
    stored, sources, data = found
    work = [slab for name, parts in sources.items() for slab in _slabs(checkpoint, stored, name, parts)]
    progress.start("compare weights", sum((slab.stop - slab.start) * slab.columns for slab in work), "weights")
    sums = {slab.tensor: _Sums() for slab in work}
    types = {slab.tensor: _type(slab) for slab in work}
    mapped = np.memmap(data, np.uint8, "r")
    for slab, (weight, error, delta, kept) in in_order(lambda slab: _compare(checkpoint, mapped, slab), work):
        total = sums[slab.tensor]
        total.weight += weight
        total.error += error
        total.delta += delta
        total.kept += kept
        progress.advance((slab.stop - slab.start) * slab.columns)
    progress.finish()
    return [_entry(name, types[name], total) for name, total in sums.items()]


def _read_model(model: Path) -> tuple[dict[str, _Stored], dict[str, list[tuple[str, int, int]]], Path] | None:
    import onnx

    proto = onnx.load(model, load_external_data=False)
    sources = {item.key: item.value for item in proto.metadata_props}.get(SOURCES)
    if sources is None:
        return None
    stored, files = {}, set()
    for tensor in proto.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            told = {item.key: item.value for item in tensor.external_data}
            stored[tensor.name] = _Stored(tensor.name, tensor.data_type, tuple(tensor.dims), int(told["offset"]))
            files.add(told["location"])
    return stored, json.loads(sources), model.parent / files.pop()


def _slabs(
    checkpoint: Checkpoint, stored: dict[str, _Stored], name: str, parts: list[tuple[str, int, int]]
) -> Iterator[_Slab]:
    matrix, row = stored[name], 0
    scales = stored.get(name.removesuffix(".codes") + ".scales") if name.endswith(".codes") else None
    for tensor, first, last in parts:
        info = checkpoint.tensors.get(tensor)
        if info is None or len(info.shape) != 2 or info.shape[0] < last:
            raise CheckpointError(
                "onnx-mismatch", f"the model holds {tensor}, rows {first} to {last}", why="the checkpoint does not"
            )
        step = max(1, SLAB_ELEMENTS // info.shape[1])
        for start in range(first, last, step):
            stop = min(start + step, last)
            yield _Slab(tensor, start, stop, matrix, scales, row, info.shape[1])
            row += stop - start


def _compare(checkpoint: Checkpoint, data: Bytes, slab: _Slab) -> tuple[float, float, float, float]:
    """‖W‖², ‖Q − W‖², ‖ΔW‖² and ⟨Q − W_base, ΔW⟩ of the slab."""
    exact = checkpoint.rows(slab.tensor, slab.start, slab.stop)
    error = _read(data, slab) - exact
    delta = checkpoint.delta(slab.tensor, slab.start, slab.stop)
    change = kept = 0.0
    if delta is not None:
        change = _dot(delta, delta)
        kept = change + _dot(error, delta)  # Q − W_base = error + ΔW
    return _dot(exact, exact), _dot(error, error), change, kept


def _read(data: Bytes, slab: _Slab) -> FloatArray:
    """The file's rows, as float32."""
    rows = slice(slab.row, slab.row + slab.stop - slab.start)
    if slab.scales is None:
        return _floats(data, slab.matrix, rows)
    scales = _floats(data, slab.scales, rows)
    codes = slab.matrix.of(data, np.uint8)
    if slab.form is None:  # transposed
        return codes.view(np.int8)[:, rows].T.astype(np.float32) * scales[:, None]
    return block_values(codes[rows], scales, slab.form, slab.columns)


def _floats(data: Bytes, stored: _Stored, rows: slice) -> FloatArray:
    dtype = _FLOATS[stored.kind]
    raw = np.ascontiguousarray(stored.of(data, np.uint32 if dtype == "F32" else np.uint16)[rows])
    return decode(raw.reshape(-1).view(np.uint8), dtype).reshape(raw.shape)


def _dot(a: FloatArray, b: FloatArray) -> float:
    """Sum of products: float32 within a row, float64 over rows."""
    return float(np.einsum("ij,ij->i", a, b).sum(dtype=np.float64))


def _type(slab: _Slab) -> str:
    """In a word, for the report."""
    if slab.scales is None:
        return _FLOATS[slab.matrix.kind]
    return f"int{slab.form.bits} in blocks of {slab.form.block}" if slab.form else "int8"


def _entry(name: str, stored_type: str, sums: _Sums) -> TensorDamage:
    layer = re.search(r"\.(\d+)\.", name)
    adapted = sums.delta > 0
    return TensorDamage(
        name=name,
        type=stored_type,
        layer=int(layer[1]) if layer else None,
        relative_error=(sums.error / sums.weight) ** 0.5 if sums.weight else 0.0,
        delta_kept=sums.kept / sums.delta if adapted else None,
        delta_noise=(sums.error / sums.delta) ** 0.5 if adapted else None,
    )
