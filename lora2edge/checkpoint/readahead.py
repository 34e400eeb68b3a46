"""Reads weight files once, in front of the work that needs them, and hashes them on the way."""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lora2edge.contracts import Progress
from lora2edge.directio import aligned, is_cached, read_at, set_direct
from lora2edge.progress import Followed
from lora2edge.storage import identity, remember_sha256

if TYPE_CHECKING:
    from hashlib import _Hash

    from numpy.typing import NDArray

CHUNK = 4 << 20
"""Bytes read at once: several requests to the disk, of the largest size that it takes."""

_active: dict[Path, Window] = {}


def window_bytes(cores: int) -> int:
    """Memory of a window: half of it lies in front of the work, half behind, where slow readers are."""
    return (8 + cores) * CHUNK


@contextlib.contextmanager
def reading_ahead(paths: Sequence[Path], progress: Progress, cores: int) -> Iterator[Progress]:
    """While the block reads `paths`, nearly in their order, they are read once, and hashed for a later sha256_file.

    The block's reads (`read_ahead`) are served from memory. The Progress that the block gets also paces the reading,
    where the work passes over bytes without asking for them. Past the page cache, but for files that are in it. Errors
    are left to whoever reads or hashes the file again. Where the block raises, the hashes are given up.
    """
    window = Window([path for path in paths if path.is_file()], progress, window_bytes(cores) // CHUNK)
    _active.update(dict.fromkeys(window.starts, window))
    thread = threading.Thread(target=window.run)
    thread.start()
    try:
        yield window
        window.end()
    except BaseException:
        window.end(give_up=True)
        raise
    finally:
        thread.join()
        for path in window.starts:
            _active.pop(path, None)


def read_ahead(path: Path, offset: int, target: NDArray[np.uint8]) -> bool:
    """Fills `target` from byte `offset` of the file on, if somebody reads it ahead and has that at hand or soon."""
    window = _active.get(path)
    return window is not None and window.copy(path, offset, target)


@dataclass(slots=True)
class _Slot:
    """A chunk in memory."""

    data: NDArray[np.uint8]
    number: int = -1
    length: int = 0
    readers: int = 0
    hashed: bool = True


class Window(Followed):
    """Files as one row of chunks, of which some are in memory: chunk `n` in slot `n` modulo their number.

    Also the Progress of the work, passed on.
    """

    def __init__(self, paths: Sequence[Path], progress: Progress, slots: int) -> None:
        super().__init__(progress)
        self.starts: dict[Path, int] = {}
        """Where each file begins, in bytes; at a chunk of its own."""
        self._bytes = 0
        for path in paths:
            self.starts[path] = self._bytes
            self._bytes += -(-path.stat().st_size // CHUNK) * CHUNK
        self._slots = [_Slot(aligned(CHUNK)) for _ in range(slots)]
        self._next = 0
        """The chunk that is read next."""
        self._asked = 0
        """The last byte that the work has asked for."""
        self._stopped = False

    # ------------------------------------------------------------ the work's end

    def copy(self, path: Path, offset: int, target: NDArray[np.uint8]) -> bool:
        """Fills `target`, or returns False: it was passed already, or is far away, or behind the file's end."""
        first = self.starts[path] + offset
        done = 0
        while done < len(target):
            number, inside = divmod(first + done, CHUNK)
            slot = self._take(number, first + len(target))
            if slot is None:
                return False
            try:
                part = slot.data[inside : slot.length][: len(target) - done]
                target[done : done + len(part)] = part
            finally:
                with self._changed:
                    slot.readers -= 1
                    self._changed.notify_all()
            if not len(part):
                return False
            done += len(part)
        return True

    def _take(self, number: int, asked: int) -> _Slot | None:
        slot = self._slots[number % len(self._slots)]
        with self._changed:
            if asked > self._asked:
                self._asked = asked
                self._changed.notify_all()
            if number >= self._next + len(self._slots):
                return None
            self._changed.wait_for(lambda: self._stopped or self._next > number)
            if slot.number != number:
                return None
            slot.readers += 1
            return slot

    # ------------------------------------------------------------ the reading end

    def run(self) -> None:
        """Reads and hashes everything."""
        with ThreadPoolExecutor(1) as hashing:
            try:
                with contextlib.suppress(OSError):
                    for path in self.starts:
                        if not self._read(path, hashing):
                            return
            finally:
                with self._changed:
                    self._stopped = True
                    self._changed.notify_all()

    def _read(self, path: Path, hashing: ThreadPoolExecutor) -> bool:
        seen, state = identity(path), hashlib.sha256()
        direct = not is_cached(path)
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if direct:
                set_direct(handle)
            for offset in range(0, path.stat().st_size, CHUNK):
                slot = self._free_slot()
                if slot is None:
                    return False
                slot.length = read_at(handle, slot.data, offset)
                with self._changed:
                    slot.number, slot.hashed = self._next, False
                    self._next += 1
                    self._changed.notify_all()
                hashing.submit(self._hash, slot, state)
            hashing.submit(_remember, path, seen, state)
        finally:
            os.close(handle)
        return True

    def _free_slot(self) -> _Slot | None:
        """The slot for the next chunk, when it may be read; None when nothing more is wanted."""
        slot = self._slots[self._next % len(self._slots)]
        with self._changed:
            self._changed.wait_for(lambda: self._given_up or (self._is_due() and slot.hashed and not slot.readers))
            slot.number = -1
            return None if self._given_up else slot

    def _is_due(self) -> bool:
        worked = self._bytes * self._done // self._total if self._total else 0
        ahead = len(self._slots) // 2 * CHUNK
        return self._ended or self._next * CHUNK < max(worked, self._asked) + ahead

    def _hash(self, slot: _Slot, state: _Hash) -> None:
        state.update(slot.data[: slot.length].data)
        with self._changed:
            slot.hashed = True
            self._changed.notify_all()


def _remember(path: Path, seen: tuple[int, ...], state: _Hash) -> None:
    with contextlib.suppress(OSError):
        remember_sha256(path, seen, state.hexdigest())
