"""Writes a checkpoint as safetensors, slab by slab: memory is bounded by the slabs in flight, not by the model."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lora2edge.adapters import MergedCheckpoint, written_config
from lora2edge.checkpoint import FLOAT_DTYPES, all_finite, encode_finite, in_order, not_finite, read_ahead, window_bytes
from lora2edge.contracts import Checkpoint, Progress, StoredBytes, TensorInfo
from lora2edge.errors import CheckpointError
from lora2edge.journal import STAGED_BYTES, GrowingFile, Journal

if TYPE_CHECKING:
    from numpy.typing import NDArray

SHARD_BYTES = 5_000_000_000
SLAB_ELEMENTS = 1 << 18
"""1 MB of float32: the passes over a slab stay in a core's own cache, and little is in flight."""
COPY_BYTES = 1 << 20
_BYTES_IN_WORK = 14
"""Of one element: as read, in float32, its delta, rounded."""
_WAITING, _WIDEST = 3, 4
"""Rounded slabs per thread that wait to be written, and the bytes of an element there (F64 is seldom)."""


def write_checkpoint(view: Checkpoint, out: Path, progress: Progress, shard_bytes: int = SHARD_BYTES) -> None:
    """Writes `view` into the existing folder `out`: weights, config, tokenizer, template, generation config.

    The folder is empty, or has a journal and what a killed call with equal arguments left: that is not made again.

    Unchanged tensors are copied as bytes; changed ones are computed in float32 and rounded once to their stored
    dtype. Above `shard_bytes` of weights there are several files and an index. Equal views give equal bytes.
    Raises CheckpointError for what is not finite or overflows a float16, ProofError from the view's formula check,
    OSError from the disk.
    """
    shards = _plan(view, shard_bytes)
    progress.start("write the merged checkpoint", sum(shard.data_bytes for shard in shards), "bytes")
    with Journal(out) as journal:
        for shard in shards:
            _write_shard(view, shard, journal, progress)
    progress.finish()
    if len(shards) > 1:
        _write_index(shards, out)
    _write_json(out / "config.json", written_config(view))
    for name, path in view.tokenizer.files.items():
        shutil.copyfile(path, out / name)


def write_bytes(view: Checkpoint, threads: int) -> int:
    """Memory that `write_checkpoint` takes at most beside the libraries', with reading ahead; told from headers.

    A slab is one row at least: of an embedding that is little, of a stack of experts it is a matrix.
    """
    infos = view.tensors.values()
    slab = min(SLAB_ELEMENTS, max((info.size for info in infos), default=0))
    slab = max([slab, *(info.size // info.shape[0] for info in infos if info.shape and info.shape[0])])
    stored = sum(_length(view, info) for info in infos)
    updates = view.update_bytes() if isinstance(view, MergedCheckpoint) else 0
    slabs = slab * threads * (_BYTES_IN_WORK + _WAITING * _WIDEST) + min(COPY_BYTES * threads, stored)
    return min(window_bytes(threads), stored) + min(STAGED_BYTES, stored) + slabs + updates


@dataclass(frozen=True, slots=True)
class _Shard:
    """One file to write: its header, and its tensors in order."""

    file_name: str
    header: bytes
    infos: Sequence[TensorInfo]
    data_bytes: int


def _plan(view: Checkpoint, shard_bytes: int) -> list[_Shard]:
    """Shares the tensors out in the files' order, wider types first within a shard, as safetensors does."""
    groups: list[list[TensorInfo]] = [[]]
    filled = 0
    for info in view.tensors.values():
        size = _length(view, info)
        if groups[-1] and filled + size > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(info)
        filled += size
    names = ["model.safetensors"]
    if len(groups) > 1:
        names = [f"model-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1)]
    return [_layout(view, name, group) for name, group in zip(names, groups, strict=True)]


def _layout(view: Checkpoint, file_name: str, infos: list[TensorInfo]) -> _Shard:
    lengths = {info.name: _length(view, info) for info in infos}
    # By element width, so that every tensor starts at a multiple of its own width.
    ordered = sorted(infos, key=lambda info: -(lengths[info.name] // max(info.size, 1)))
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for info in ordered:
        end = at + lengths[info.name]
        entries[info.name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return _Shard(file_name, header, ordered, at)


def _length(view: Checkpoint, info: TensorInfo) -> int:
    stored = view.stored(info.name)
    return stored.length if stored else info.size * FLOAT_DTYPES[info.dtype]


def _write_shard(view: Checkpoint, shard: _Shard, journal: Journal, progress: Progress) -> None:
    """Reads, computes and rounds pieces on all cores, and appends them; skips what the journal says is there."""
    size = len(shard.header) + shard.data_bytes
    if journal.is_whole(shard.file_name, size):
        progress.advance(shard.data_bytes)
        return
    pieces = list(_pieces(view, shard))
    ends = list(accumulate((piece.length for piece in pieces), initial=len(shard.header)))
    with GrowingFile(journal, shard.file_name, set(ends), direct=True) as file:
        if not file.size:
            file.append(memoryview(shard.header))
        progress.advance(file.size - len(shard.header))
        for piece, data in in_order(lambda piece: _make(view, piece), pieces[ends.index(file.size) :]):
            file.append(data)
            progress.advance(piece.length)
        file.finish()


@dataclass(frozen=True, slots=True)
class _Piece:
    """A part of one tensor, small enough for a core's own cache."""

    info: TensorInfo
    copied: StoredBytes | None
    """Where it is read as it stands; else rows `start:stop` are computed."""
    start: int
    stop: int
    length: int
    """Bytes in the file."""


def _pieces(view: Checkpoint, shard: _Shard) -> Iterator[_Piece]:
    """The shard's data, in its order."""
    for info in shard.infos:
        stored = view.stored(info.name)
        if stored is not None:
            for at in range(0, stored.length, COPY_BYTES):
                length = min(COPY_BYTES, stored.length - at)
                yield _Piece(info, StoredBytes(stored.path, stored.offset + at, length), 0, 0, length)
            continue
        rows = info.shape[0] if info.shape else 1
        row_bytes = info.size // max(rows, 1) * FLOAT_DTYPES[info.dtype]
        count = min(-(-info.size // SLAB_ELEMENTS), rows)
        for index in range(count):
            start, stop = index * rows // count, (index + 1) * rows // count
            yield _Piece(info, None, start, stop, (stop - start) * row_bytes)


def _make(view: Checkpoint, piece: _Piece) -> memoryview:
    if piece.copied is not None:
        return _copy(piece.info, piece.copied)
    info, start, stop = piece.info, piece.start, piece.stop
    rows = view.rows(info.name, start, stop)
    rounded, finite = encode_finite(rows, info.dtype)
    if not finite and info.dtype == "F16" and np.isfinite(rows).all():
        raise CheckpointError(
            "float16-overflow",
            f"{info.name} does not fit into float16 after the merge",
            why=f"a value in rows {start} to {stop - 1} is above 65504",
            hint="save the base in bfloat16 and merge on that",
        )
    if not finite:
        raise not_finite(info.name)
    return _bytes(rounded)


def _copy(info: TensorInfo, part: StoredBytes) -> memoryview:
    """Bytes of an unchanged tensor, looked at, so that a NaN in the base is not passed on unseen."""
    data = np.empty(part.length, np.uint8)
    if not read_ahead(part.path, part.offset, data):
        _read(part, data)
    _require_finite(info, data)
    return data.data


def _read(part: StoredBytes, data: NDArray[np.uint8]) -> None:
    done = 0
    source = os.open(part.path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        while done < part.length:
            got = os.preadv(source, [data[done:].data], part.offset + done)
            if got == 0:
                raise CheckpointError(
                    "file-changed",
                    f"{part.path.name} became shorter while it was read",
                    why=f"byte {part.offset + done} is behind its end",
                    hint="another process writes to the checkpoint: start again when it is done",
                )
            done += got
    finally:
        os.close(source)


def _require_finite(info: TensorInfo, data: NDArray[np.uint8]) -> None:
    """Raises CheckpointError where the stored floats hold NaN or infinity."""
    if info.dtype in FLOAT_DTYPES and not all_finite(data, info.dtype):
        raise CheckpointError(
            "base-nan",
            f"base tensor {info.name} holds NaN or infinity",
            why="it would be copied into the merged checkpoint",
            hint="download the base again",
        )


def _bytes(array: NDArray[np.generic]) -> memoryview:
    return memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def _write_index(shards: list[_Shard], out: Path) -> None:
    weight_map = {info.name: shard.file_name for shard in shards for info in shard.infos}
    total = sum(shard.data_bytes for shard in shards)
    _write_json(out / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_json(path: Path, data: object) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
