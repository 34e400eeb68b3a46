"""What rounding did to each matrix, from the finished file: it is read back and compared with the checkpoint."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lora2edge.backends.gguf.container import Stored, read_header
from lora2edge.backends.gguf.mix import TYPES, row_bytes
from lora2edge.backends.gguf.model import Planned, layer_of
from lora2edge.backends.gguf.write import Slab, read_slab, slabs, transformed
from lora2edge.checkpoint import in_order
from lora2edge.contracts import Checkpoint, Progress, TensorDamage
from lora2edge.errors import CheckpointError

if TYPE_CHECKING:
    from lora2edge.contracts import FloatArray


@dataclass(slots=True)
class _Sums:
    """Squares and products over a tensor, in float64."""

    weight: float = 0.0
    error: float = 0.0
    delta: float = 0.0
    kept: float = 0.0

    def add(self, other: _Sums) -> None:
        self.weight += other.weight
        self.error += other.error
        self.delta += other.delta
        self.kept += other.kept


def measure_damage(
    checkpoint: Checkpoint, path: Path, tensors: Sequence[Planned], progress: Progress
) -> list[TensorDamage]:
    """One entry per matrix of the checkpoint, in the file's order. Raises CheckpointError where they do not match."""
    stored = read_header(path)
    matrices = [tensor for tensor in tensors if len(tensor.shape) > 1 and tensor.source]
    for tensor in matrices:
        _check(tensor, stored)
    work = [slab for tensor in matrices for slab in slabs(tensor)]
    progress.start("compare weights", sum(slab.size for slab in work), "weights")
    sums: dict[str, _Sums] = {tensor.name: _Sums() for tensor in matrices}
    handle = os.open(path, os.O_RDONLY)
    try:

        def job(slab: Slab) -> _Sums:
            assert slab.tensor.source is not None
            expected = read_slab(checkpoint, slab)
            delta = checkpoint.delta(slab.tensor.source, slab.start, slab.stop)
            found = _read(handle, stored[slab.tensor.name], slab)
            return _compare(found, expected, None if delta is None else transformed(slab, delta))

        for slab, part in in_order(job, work):
            sums[slab.tensor.name].add(part)
            progress.advance(slab.size)
    finally:
        os.close(handle)
    progress.finish()
    return [_entry(tensor, stored[tensor.name].type, sums[tensor.name]) for tensor in matrices]


def _check(tensor: Planned, stored: Mapping[str, Stored]) -> None:
    found = stored.get(tensor.name)
    if found is None or found.shape != tensor.shape:
        raise CheckpointError(
            "gguf-mismatch",
            f"the file's {tensor.name} is {list(found.shape) if found else 'missing'}",
            why=f"the checkpoint's {tensor.source} is {list(tensor.shape)}",
        )


def _read(handle: int, stored: Stored, slab: Slab) -> FloatArray:
    """Rows of the file, dequantized to float32."""
    columns = stored.shape[-1]
    width = row_bytes(stored.type, columns)
    count = slab.stop - slab.start
    data = np.frombuffer(os.pread(handle, count * width, stored.offset + slab.start * width), np.uint8)
    return dequantize(data.reshape(count, width), stored.type)


def dequantize(data: Any, type_name: str) -> FloatArray:
    """`[rows, bytes]` uint8 → `[rows, columns]` float32, through gguf-py."""
    from gguf import GGMLQuantizationType, quants

    if type_name == "F32":
        return np.asarray(data.view(np.float32))
    return np.asarray(quants.dequantize(data, GGMLQuantizationType(TYPES[type_name].id)), np.float32)


def _compare(found: FloatArray, expected: FloatArray, delta: FloatArray | None) -> _Sums:
    error = found - expected
    sums = _Sums(weight=_dot(expected, expected), error=_dot(error, error))
    if delta is not None:
        sums.delta = _dot(delta, delta)
        sums.kept = sums.delta + _dot(error, delta)  # Q - W_base = error + delta
    return sums


def _dot(a: FloatArray, b: FloatArray) -> float:
    """Sum of products: float32 within a row, float64 over rows."""
    return float(np.einsum("ij,ij->i", a, b).sum(dtype=np.float64))


def _entry(tensor: Planned, stored_type: str, sums: _Sums) -> TensorDamage:
    assert tensor.source is not None
    adapted = sums.delta > 0
    return TensorDamage(
        name=tensor.source,
        type=stored_type,
        layer=layer_of(tensor.name),
        relative_error=(sums.error / sums.weight) ** 0.5 if sums.weight else 0.0,
        delta_kept=sums.kept / sums.delta if adapted else None,
        delta_noise=(sums.error / sums.delta) ** 0.5 if adapted else None,
    )
