"""One pass from a checkpoint's rows to the finished file: read or merge, round, append; on all cores.

A slab of rows is one job: read (or merge) it, bring it into llama.cpp's order, quantize it. Jobs run in parallel, the
main thread appends what they finish in order. Reads, numpy's larger operations and ggml's kernels release the GIL.
Memory is bounded by the slabs in flight, not by the model.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

import numpy as np

from lora2edge.backends.gguf.container import Metadata, padding, tensor_bytes, write_header
from lora2edge.backends.gguf.imatrix import Importance
from lora2edge.backends.gguf.mix import TYPES, row_bytes
from lora2edge.backends.gguf.model import Planned
from lora2edge.checkpoint import in_order, not_finite
from lora2edge.contracts import Checkpoint, Progress
from lora2edge.errors import CheckpointError
from lora2edge.journal import GrowingFile, Journal

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lora2edge.backends.layerwise import RoundedTensors
    from lora2edge.contracts import FloatArray

    Bytes = NDArray[np.uint8]

T = TypeVar("T", np.float32, np.uint8)

SLAB_ELEMENTS = 1 << 20
"""Of one job: 4 MB in float32. Smaller ones cost more Python, larger ones more memory per core."""
_LARGEST_HALF = 65504.0
"""Block scales are halves: no weight beyond this can be stored but in F32 and BF16."""


_LARGEST = {"F32": np.inf, "BF16": float.fromhex("0x1.fefffep+127")}
"""Where it is not that: a larger float32 rounds to infinity in BF16."""


class Quantizer(Protocol):
    """The one function of llama.cpp that is needed here (`llama_cpp.Library`)."""

    def quantize_chunk(
        self, type_id: int, src: int, dst: int, start_row: int, nrows: int, ncols: int, imatrix: int | None
    ) -> int: ...


@dataclass(frozen=True, slots=True)
class Slab:
    """Rows `start:stop` of one tensor."""

    tensor: Planned
    start: int
    stop: int

    @property
    def is_last(self) -> bool:
        return self.stop == self.tensor.shape[0]

    @property
    def size(self) -> int:
        return (self.stop - self.start) * math.prod(self.tensor.shape[1:])


def slabs(tensor: Planned) -> Iterator[Slab]:
    """Cuts a tensor into slabs; a head whose rows are interleaved stays whole."""
    rows = tensor.shape[0]
    unit = rows // tensor.heads if tensor.heads else 1
    columns = tensor.shape[1] if len(tensor.shape) > 1 else 1
    step = max(1, SLAB_ELEMENTS // (columns * unit)) * unit
    for start in range(0, rows, step):
        yield Slab(tensor, start, min(start + step, rows))


def transformed(slab: Slab, rows: NDArray[T]) -> NDArray[T]:
    """Rows of the checkpoint (or of a change to it, or their bytes) as llama.cpp orders them; without the offset."""
    tensor = slab.tensor
    if not tensor.heads:
        return rows
    half = tensor.shape[0] // tensor.heads // 2
    count = len(rows) // (2 * half)
    return np.ascontiguousarray(rows.reshape(count, 2, half, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape))


def read_slab(checkpoint: Checkpoint, slab: Slab) -> FloatArray:
    """Rows of the file to be written, float32, unrounded."""
    tensor = slab.tensor
    if tensor.values is not None or tensor.source is None:
        return np.asarray(tensor.values, np.float32)[slab.start : slab.stop]
    rows = transformed(slab, checkpoint.rows(tensor.source, slab.start, slab.stop))
    return rows + np.float32(tensor.offset) if tensor.offset else rows


def write_model(
    path: Path,
    metadata: Metadata,
    tensors: Sequence[Planned],
    types: Mapping[str, str],
    checkpoint: Checkpoint,
    quantizer: Quantizer | None,
    importance: Importance | None,
    rounded: RoundedTensors | None,
    progress: Progress,
) -> None:
    """Writes the file; where its folder has a journal, goes on with what an earlier call left.

    `quantizer` may be None where every type is F32. `rounded`: tensors whose bytes are there already. Raises
    CheckpointError for a bad weight.
    """
    work = [slab for tensor in tensors for slab in slabs(tensor)]
    progress.start("quantize", sum(slab.size for slab in work), "weights")
    weights = {tensor.name: importance.weights(tensor.name) for tensor in tensors} if importance else {}
    header = io.BytesIO()
    write_header(header, metadata, [(tensor.name, types[tensor.name], tensor.shape) for tensor in tensors])
    ends = list(accumulate((_length(slab, types) for slab in work), initial=header.tell()))

    def job(slab: Slab) -> Bytes:
        source = slab.tensor.source
        if rounded and source and source in rounded:
            return transformed(slab, rounded.rows(source, slab.start, slab.stop)).reshape(-1)
        rows = read_slab(checkpoint, slab)
        return encode(slab.tensor, rows, types[slab.tensor.name], quantizer, weights.get(slab.tensor.name))

    with Journal(path.parent) as journal, GrowingFile(journal, path.name, set(ends)) as file:
        if not file.size:
            file.append(header.getbuffer())
        finished = ends.index(file.size)
        progress.advance(sum(slab.size for slab in work[:finished]))
        for slab, data in in_order(job, work[finished:]):
            file.append(data.data, memoryview(bytes(_padding(slab, types))))
            progress.advance(slab.size)
        file.finish()
    progress.finish()


def encode(
    tensor: Planned, rows: FloatArray, type_name: str, quantizer: Quantizer | None, weights: FloatArray | None
) -> Bytes:
    """The bytes of `rows` in the type: `[bytes]` uint8. Raises CheckpointError for what the type cannot hold."""
    peak = float(max(rows.max(), -rows.min()))  # NaN and infinity pass through max and min
    if not np.isfinite(peak):
        raise not_finite(tensor.source or tensor.name)
    if peak > _LARGEST.get(type_name, _LARGEST_HALF):
        raise CheckpointError(
            "weight-range",
            f"{tensor.source or tensor.name} has the weight {peak}",
            why=f"{type_name} holds finite values up to {_LARGEST.get(type_name, _LARGEST_HALF):g}, F32 larger ones",
        )
    rows = np.ascontiguousarray(rows, np.float32)
    if type_name == "F32":
        return rows.reshape(-1).view(np.uint8)
    columns = rows.shape[-1]
    data = np.empty(len(rows) * row_bytes(type_name, columns), np.uint8)
    address = None if weights is None else weights.ctypes.data
    assert quantizer is not None
    quantizer.quantize_chunk(TYPES[type_name].id, rows.ctypes.data, data.ctypes.data, 0, len(rows), columns, address)
    return data


def _length(slab: Slab, types: Mapping[str, str]) -> int:
    """Bytes of a slab in the file, with what is behind its tensor's last row."""
    row = (1, *slab.tensor.shape[1:])
    return (slab.stop - slab.start) * tensor_bytes(types[slab.tensor.name], row) + _padding(slab, types)


def _padding(slab: Slab, types: Mapping[str, str]) -> int:
    return padding(tensor_bytes(types[slab.tensor.name], slab.tensor.shape)) if slab.is_last else 0
