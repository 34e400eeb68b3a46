"""Tensors of one or more safetensors files, read by rows with pread."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lora2edge.checkpoint.floats import FLOAT_DTYPES, decode
from lora2edge.checkpoint.header import StoredTensor, read_header
from lora2edge.checkpoint.readahead import read_ahead
from lora2edge.contracts import StoredBytes, TensorInfo
from lora2edge.errors import CheckpointError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lora2edge.contracts import FloatArray


class TensorReader:
    """Rows as float32 from the files `names` in `folder`. Safe to use from several threads.

    pread into a buffer per thread, not mmap: a map's pages count as the process's own memory for as long as the
    machine has room (978 MB after reading 1 GB, against 27 MB).
    """

    def __init__(self, folder: Path, names: Iterable[str]) -> None:
        self.folder = folder
        self.headers = {name: read_header(folder / name) for name in names}
        self.stored: dict[str, StoredTensor] = {}
        for header in self.headers.values():
            for tensor in header.tensors:
                if tensor.info.name in self.stored:
                    raise CheckpointError(
                        "tensor-twice",
                        f"tensor {tensor.info.name!r} is in two files",
                        why=f"{self.stored[tensor.info.name].info.shard} and {tensor.info.shard}",
                        hint="remove the files that do not belong to the checkpoint",
                    )
                self.stored[tensor.info.name] = tensor
        self.tensors: Mapping[str, TensorInfo] = {name: tensor.info for name, tensor in self.stored.items()}
        self._handles: dict[str, int] = {}
        weakref.finalize(self, _close, self._handles)  # for whoever does not close it
        self._lock = threading.Lock()
        self._local = threading.local()

    def rows(self, name: str, start: int, stop: int) -> FloatArray:
        """Rows `start:stop` of `name`, float32; a scalar counts as one row of shape `[1]`."""
        tensor = self.stored[name]
        info = tensor.info
        if info.dtype not in FLOAT_DTYPES:
            raise CheckpointError(
                "not-a-float",
                f"tensor {name!r} is stored as {info.dtype}",
                why="only BF16, F16, F32 and F64 hold plain weights; others belong to a quantized checkpoint",
                hint="use the 16-bit checkpoint that this one was made from",
            )
        shape = info.shape or (1,)
        if not 0 <= start <= stop <= shape[0]:
            raise IndexError(f"rows {start}:{stop} of {name!r}, which has {shape[0]}")
        row_bytes = tensor.length // shape[0] if shape[0] else 0
        raw = self._read(info.shard, tensor.offset + start * row_bytes, (stop - start) * row_bytes)
        return decode(raw, info.dtype).reshape(stop - start, *shape[1:])

    def raw(self, name: str, start: int, stop: int) -> NDArray[np.uint8]:
        """Bytes `start:stop` of `name`, in a buffer that this thread's next read overwrites."""
        tensor = self.stored[name]
        if not 0 <= start <= stop <= tensor.length:
            raise IndexError(f"bytes {start}:{stop} of {name!r}, which has {tensor.length}")
        return self._read(tensor.info.shard, tensor.offset + start, stop - start)

    def bytes_at(self, name: str) -> StoredBytes:
        """Where the tensor lies."""
        tensor = self.stored[name]
        return StoredBytes(self.folder / tensor.info.shard, tensor.offset, tensor.length)

    def close(self) -> None:
        with self._lock:
            _close(self._handles)

    def _read(self, shard: str, offset: int, length: int) -> NDArray[np.uint8]:
        """The bytes in a buffer that this thread's next read overwrites."""
        held: NDArray[np.uint8] | None = getattr(self._local, "buffer", None)
        if held is None or len(held) < length:
            held = self._local.buffer = np.empty(length, np.uint8)
        if read_ahead(self.folder / shard, offset, held[:length]):
            return held[:length]
        view, done = held.data, 0
        handle = self._handle(shard)
        while done < length:
            got = os.preadv(handle, [view[done:length]], offset + done)
            if got == 0:
                raise CheckpointError(
                    "file-changed",
                    f"{shard} became shorter while it was read",
                    why=f"byte {offset + done} is behind its end",
                    hint="another process writes to the checkpoint: start again when it is done",
                )
            done += got
        return held[:length]

    def _handle(self, shard: str) -> int:
        with self._lock:
            if shard not in self._handles:
                self._handles[shard] = os.open(self.folder / shard, os.O_RDONLY | os.O_CLOEXEC)
            return self._handles[shard]


def _close(handles: dict[str, int]) -> None:
    while handles:
        os.close(handles.popitem()[1])
