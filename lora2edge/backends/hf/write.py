"""Writes a checkpoint as safetensors, slab by slab: memory is bounded by the slabs in flight, not by the model."""

from __future__ import annotations

import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lora2edge.adapters import written_config
from lora2edge.checkpoint import FLOAT_DTYPES, encode_rows, one_blas_thread
from lora2edge.contracts import Checkpoint, Progress, StoredBytes, TensorInfo
from lora2edge.errors import CheckpointError

if TYPE_CHECKING:
    from numpy.typing import NDArray

SHARD_BYTES = 5_000_000_000
SLAB_ELEMENTS = 1 << 19
"""2 MB of float32: the passes over a slab stay near a core's own cache, and few slabs are in flight."""
COPY_BYTES = 64 << 20
_EXPONENTS = {"BF16": ("<u2", 0x7F80), "F16": ("<u2", 0x7C00), "F32": ("<u4", 0x7F80_0000)}
"""Stored dtype → its words as integers, and the bits of the exponent."""


def write_checkpoint(view: Checkpoint, out: Path, progress: Progress, shard_bytes: int = SHARD_BYTES) -> None:
    """Writes `view` into the existing, empty folder `out`: weights, config, tokenizer, template, generation config.

    Unchanged tensors are copied as bytes; changed ones are computed in float32 and rounded once to their stored
    dtype. Above `shard_bytes` of weights there are several files and an index. Equal views give equal bytes.
    Raises CheckpointError where a float16 overflows, ProofError from the view's formula check, OSError from the disk.
    """
    shards = _plan(view, shard_bytes)
    progress.start("write the merged checkpoint", sum(shard.data_bytes for shard in shards), "bytes")
    for shard in shards:
        _write_shard(view, shard, out, progress)
    progress.finish()
    if len(shards) > 1:
        _write_index(shards, out)
    _write_json(out / "config.json", written_config(view))
    for name, path in view.tokenizer.files.items():
        shutil.copyfile(path, out / name)


@dataclass(frozen=True, slots=True)
class _Shard:
    """One file to write: its header, and where each tensor begins in it."""

    file_name: str
    header: bytes
    places: Sequence[tuple[TensorInfo, int]]
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
    at, starts = 0, []
    for info in ordered:
        end = at + lengths[info.name]
        entries[info.name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [at, end]}
        starts.append(at)
        at = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    places = [(info, len(header) + start) for info, start in zip(ordered, starts, strict=True)]
    return _Shard(file_name, header, places, at)


def _length(view: Checkpoint, info: TensorInfo) -> int:
    stored = view.stored(info.name)
    return stored.length if stored else info.size * FLOAT_DTYPES[info.dtype]


def _write_shard(view: Checkpoint, shard: _Shard, out: Path, progress: Progress) -> None:
    """Reads, computes, rounds and writes slabs at their places, a core each."""
    handle = os.open(out / shard.file_name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    workers = os.cpu_count() or 1
    try:
        os.truncate(handle, len(shard.header) + shard.data_bytes)
        _write_at(handle, memoryview(shard.header), 0)
        with one_blas_thread(), ThreadPoolExecutor(workers) as pool:
            in_flight: deque[Future[int]] = deque()
            try:
                for step in _steps(view, shard, handle):
                    in_flight.append(pool.submit(step))
                    if len(in_flight) > 2 * workers:
                        progress.advance(in_flight.popleft().result())
                while in_flight:
                    progress.advance(in_flight.popleft().result())
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    finally:
        os.close(handle)


def _steps(view: Checkpoint, shard: _Shard, handle: int) -> Iterator[Callable[[], int]]:
    """Independent pieces of work; each returns the bytes that it wrote."""
    for info, place in shard.places:
        stored = view.stored(info.name)
        if stored is not None:
            for at in range(0, stored.length, COPY_BYTES):
                part = StoredBytes(stored.path, stored.offset + at, min(COPY_BYTES, stored.length - at))
                yield lambda info=info, part=part, to=place + at: _copy(info, part, handle, to)  # type: ignore[misc]
            continue
        rows = info.shape[0] if info.shape else 1
        row_bytes = info.size // max(rows, 1) * FLOAT_DTYPES[info.dtype]
        slab = max(1, SLAB_ELEMENTS * rows // max(info.size, 1))
        for start in range(0, rows, slab):
            stop = min(start + slab, rows)
            to = place + start * row_bytes
            yield lambda info=info, start=start, stop=stop, to=to: _compute(  # type: ignore[misc]
                view, info, start, stop, handle, to
            )


def _compute(view: Checkpoint, info: TensorInfo, start: int, stop: int, handle: int, to: int) -> int:
    rounded = encode_rows(view.rows(info.name, start, stop), info.dtype)
    if info.dtype == "F16" and not np.isfinite(rounded).all():
        raise CheckpointError(
            "float16-overflow",
            f"{info.name} does not fit into float16 after the merge",
            why=f"a value in rows {start} to {stop - 1} is above 65504",
            hint="save the base in bfloat16 and merge on that",
        )
    return _write_at(handle, _bytes(rounded), to)


def _copy(info: TensorInfo, part: StoredBytes, handle: int, to: int) -> int:
    """Copies a range of an unchanged tensor through a buffer, so that a NaN in the base is not passed on unseen."""
    source = os.open(part.path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        done = 0
        while done < part.length:
            data = os.pread(source, min(part.length - done, 1 << 20), part.offset + done)
            data = data[: len(data) - len(data) % FLOAT_DTYPES.get(info.dtype, 1)] or data
            _require_finite(info, data)
            count = _write_at(handle, memoryview(data), to + done)
            if count == 0:
                raise CheckpointError(
                    "file-changed",
                    f"{part.path.name} became shorter while it was read",
                    why=f"byte {part.offset + done} is behind its end",
                    hint="another process writes to the checkpoint: start again when it is done",
                )
            done += count
        return done
    finally:
        os.close(source)


def _require_finite(info: TensorInfo, data: bytes) -> None:
    """Raises CheckpointError where the stored floats hold NaN or infinity: all bits of the exponent are set."""
    if info.dtype not in _EXPONENTS:
        return
    word, mask = _EXPONENTS[info.dtype]
    words = np.frombuffer(data, word, len(data) // np.dtype(word).itemsize)
    if ((words & mask) == mask).any():
        raise CheckpointError(
            "base-nan",
            f"base tensor {info.name} holds NaN or infinity",
            why="it would be copied into the merged checkpoint",
            hint="download the base again",
        )


def _write_at(handle: int, data: memoryview, to: int) -> int:
    done = 0
    while done < len(data):
        done += os.pwrite(handle, data[done:], to + done)
    return done


def _bytes(array: NDArray[np.generic]) -> memoryview:
    return memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def _write_index(shards: list[_Shard], out: Path) -> None:
    weight_map = {info.name: shard.file_name for shard in shards for info, _ in shard.places}
    total = sum(shard.data_bytes for shard in shards)
    _write_json(out / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_json(path: Path, data: object) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
