"""Long work that a kill does not undo: folders that appear whole, and whose making goes on where it was stopped."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import shutil
import time
from collections import deque
from collections.abc import Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import numpy as np

from lora2edge.directio import BLOCK, aligned, set_direct, write_at
from lora2edge.errors import Lora2EdgeError
from lora2edge.storage import alone_in, busy, follow, lock, replace_folder, sweep, writing

if TYPE_CHECKING:
    from hashlib import _Hash

    from numpy.typing import NDArray

FILES, JOURNAL = "files", "journal.jsonl"
"""In a working folder: the folder that is being written, and what is known of its files."""
SYNC_BYTES = 128 << 20
SYNC_SECONDS = 2.0
"""A growing file is made safe whenever so much was appended, or so long ago: what a kill costs at most."""
_CHUNK = 1 << 20
_UNHASHED = 4
"""Appended pieces that may wait for their hash."""
_STAGE_BYTES = 4 << 20
_STAGES = 3
"""Buffers of a growing file: one is filled while others are written, each at once."""
STAGED_BYTES = _STAGE_BYTES * _STAGES
_ORPHAN_SECONDS = 30.0
"""How long the stage process of a killed build may need to notice that nobody listens."""


@dataclass(frozen=True, slots=True)
class Mark:
    """The first `size` bytes of a file are on the disk and have this sha256."""

    file: str
    size: int
    sha256: str
    whole: bool
    """Whether the file is finished."""


@contextlib.contextmanager
def resumable_folder(path: Path, key: str) -> Iterator[Path]:
    """As `atomic_folder`, for work that goes on after a kill: yields a folder that becomes `path` when the block ends.

    The folder lies in a working folder beside `path`, whose name has `key`, the hash of all that determines its files.
    It is empty, or holds what a killed or interrupted block with this key finished, as its Journal says, and nothing
    else. Working folders of other keys are removed. Where the block raises, this one vanishes; after an interrupt it is
    kept if anything in it is finished, and the exception gets a note that says where. Where `path` is a link, all of
    this is done where it leads. Raises OutputError where the disk is full or read-only, or another process is at work
    on `path`, with whatever key: both would end well, and only one of them be there.
    """
    with writing(path):
        path = follow(path)
        work = path.with_name(f".{path.name}.{key[:16]}.resume")
        folder = work / FILES
        path.parent.mkdir(parents=True, exist_ok=True)
        with alone_in(work, path):
            if sweep(path, keep=work):
                with contextlib.suppress(OSError):  # what a killed process left in it stays
                    work.rmdir()
                raise busy(path)
            _tidy(work)
            try:
                yield folder
                replace_folder(folder, path)
            except BaseException as error:
                safe = sum(mark.size for mark in read_marks(folder).values())
                if safe and _is_interrupt(error):
                    error.add_note(f"{safe / 1e6:.1f} MB are kept in {work}, the same command goes on from there")
                else:
                    shutil.rmtree(work, ignore_errors=True)
                raise
            shutil.rmtree(work, ignore_errors=True)


class Journal:
    """Which files of a folder are finished, and how far others are, so that a later process goes on.

    A line is written after the bytes that it tells of are on the disk. For a folder that is not from
    `resumable_folder`, nothing is recorded and every file begins anew.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.marks: dict[str, Mark] = {}
        self._handle: int | None = None

    def __enter__(self) -> Self:
        if path := _journal_of(self.folder):
            self._handle = _open_alone(path)
            self.marks, size = _parse(path.read_bytes())
            os.ftruncate(self._handle, size)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._handle is not None:
            os.close(self._handle)

    @property
    def records(self) -> bool:
        """Whether anybody will want to go on from here."""
        return self._handle is not None

    def is_whole(self, name: str, size: int | None = None) -> bool:
        """Whether the file was finished, with `size` bytes where that is known, and still holds what was written."""
        mark, path = self.marks.get(name), self.folder / name
        if mark is None or not mark.whole or size not in {None, mark.size}:
            return False
        size = mark.size
        if not path.is_file() or path.stat().st_size != size:
            return False
        with path.open("rb", buffering=0) as file:
            return _hash_first(file.fileno(), size).hexdigest() == mark.sha256

    def add(self, mark: Mark) -> None:
        """Records what is on the disk."""
        self.marks[mark.file] = mark
        if self._handle is not None:
            _write(self._handle, memoryview((json.dumps(asdict(mark)) + "\n").encode()))
            os.fsync(self._handle)


class GrowingFile:
    """A file that is appended to. It begins with what an earlier process made safe, checked by its hash.

    Appending, hashing, writing and bringing the bytes to the disk run side by side.
    """

    def __init__(self, journal: Journal, name: str, ends: Collection[int], *, direct: bool = False) -> None:
        """`ends`: the sizes that the file may have between two calls of `append`; with any other it begins anew.

        With `direct` the bytes go past the page cache: right for a file that nobody reads soon.
        """
        self.name = name
        self._ends = ends
        self.size = 0
        """Bytes that are there."""
        self._journal = journal
        self._handle = os.open(journal.folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._hashing, self._writing, self._syncing = (ThreadPoolExecutor(1) for _ in range(3))
        self._unhashed: deque[Future[None]] = deque()
        self._sync: Future[None] | None = None
        self._hash = hashlib.sha256()
        mark = journal.marks.get(name)
        if mark and mark.size in ends:
            state = _hash_first(self._handle, mark.size)
            if state.hexdigest() == mark.sha256:
                self.size, self._hash = mark.size, state
        os.ftruncate(self._handle, self.size)
        self._stages: deque[tuple[NDArray[np.uint8], Future[None] | None]]
        self._stages = deque((aligned(_STAGE_BYTES), None) for _ in range(_STAGES))
        self._stage, _ = self._stages.popleft()
        """What is not written yet, with the block before it, where that is not full."""
        self._staged = self.size % BLOCK
        """Bytes in it."""
        self._stage[: self._staged] = bytearray(os.pread(self._handle, self._staged, self.size - self._staged))
        if direct:
            set_direct(self._handle)
        self._synced_size, self._synced_at = self.size, time.monotonic()

    def __enter__(self) -> Self:
        return self

    def append(self, *parts: memoryview) -> None:
        """Puts `parts` behind what is there. Raises OSError from the disk, of this call or an earlier one."""
        for data in parts:
            self._unhashed.append(self._hashing.submit(self._hash.update, data))
            self._put(np.frombuffer(data, np.uint8))
        while len(self._unhashed) > _UNHASHED:
            self._unhashed.popleft().result()
        waited = time.monotonic() - self._synced_at
        is_due = self.size - self._synced_size >= SYNC_BYTES or waited >= SYNC_SECONDS
        if self._journal.records and is_due and (not self._ends or self.size in self._ends):
            self._make_safe()  # elsewhere it would be of no use to the next process

    def finish(self) -> None:
        """Brings all of it to the disk, and records the file as whole."""
        self._flush().result()
        if self._sync is not None:
            self._sync.result()
        os.ftruncate(self._handle, self.size)
        if self._journal.records:
            os.fsync(self._handle)
        digest = self._hashing.submit(self._hash.hexdigest).result()
        self._journal.add(Mark(self.name, self.size, digest, whole=True))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for threads in (self._hashing, self._writing, self._syncing):
            threads.shutdown()  # what is in flight is little, and may be what the next process goes on from
        os.close(self._handle)

    def _put(self, data: NDArray[np.uint8]) -> None:
        done = 0
        while done < len(data):
            count = min(len(data) - done, len(self._stage) - self._staged)
            self._stage[self._staged : self._staged + count] = data[done : done + count]
            self._staged += count
            self.size += count
            done += count
            if self._staged == len(self._stage):
                self._flush()

    def _flush(self) -> Future[None]:
        """Writes what is staged, in the background, up to the end of its last block: what is behind counts for nothing.

        A block that is not full begins the next stage, and is written again with that.
        """
        full = self._staged // BLOCK * BLOCK
        rest = self._staged - full
        padded = self._stage[: full + BLOCK if rest else full]
        written = self._writing.submit(write_at, self._handle, padded, self.size - self._staged)
        following, busy = self._stages.popleft()
        if busy is not None:
            busy.result()
        following[:rest] = self._stage[full : self._staged]
        self._stages.append((self._stage, written))
        self._stage, self._staged = following, rest
        return written

    def _make_safe(self) -> None:
        """In the background, and not before the last time is over."""
        if self._sync is not None:
            if not self._sync.done():
                return
            self._sync.result()
        self._synced_size, self._synced_at = self.size, time.monotonic()
        state = self._hashing.submit(self._hash.copy)
        self._sync = self._syncing.submit(self._record, self.size, state, self._flush())

    def _record(self, size: int, state: Future[_Hash], written: Future[None]) -> None:
        written.result()
        os.fsync(self._handle)
        self._journal.add(Mark(self.name, size, state.result().hexdigest(), whole=False))


def read_marks(folder: Path) -> dict[str, Mark]:
    """File name → the last that the folder's journal says of it; empty where it has none."""
    path = _journal_of(folder)
    return _parse(path.read_bytes())[0] if path else {}


def kept_bytes(out: Path) -> int:
    """Bytes in the working folders of `out` and of its artifacts: the next run goes on with them or removes them."""
    with writing(out):
        out = follow(out)
    files = [
        *out.parent.glob(f".{glob.escape(out.name)}.*.resume/{FILES}/*"),
        *out.glob(f"artifacts/.*.resume/{FILES}/*"),
    ]
    return sum(path.stat().st_size for path in files if path.is_file())


def _journal_of(folder: Path) -> Path | None:
    """Where the journal of a folder is, if it has one."""
    path = folder.parent / JOURNAL
    return path if folder.parent.suffix == ".resume" and path.is_file() else None


def _tidy(work: Path) -> None:
    """Leaves only what the journal tells of, and a journal. Waits for the stage of a killed build to be gone."""
    folder = work / FILES
    folder.mkdir(exist_ok=True)
    (work / JOURNAL).touch()
    with Journal(folder) as journal:
        for path in folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name not in journal.marks:
                path.unlink()


def _is_interrupt(error: BaseException) -> bool:
    """Ctrl-C, a polite end, or a stage process that was killed: nothing is wrong with what is there."""
    killed = isinstance(error, Lora2EdgeError) and error.code == "stage-killed"
    return killed or not isinstance(error, Exception)


def _open_alone(path: Path) -> int:
    """The file, opened for appending and locked until it is closed. Raises OutputError where another keeps it."""
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
    deadline = time.monotonic() + _ORPHAN_SECONDS
    while not lock(handle):
        if time.monotonic() > deadline:
            os.close(handle)
            raise busy(path.parent)
        time.sleep(0.1)
    return handle


def _parse(text: bytes) -> tuple[dict[str, Mark], int]:
    """The marks, and how many bytes of the journal can be read: a kill may have torn its last line."""
    marks, size = {}, 0
    for line in text.splitlines(keepends=True):
        try:
            mark = Mark(**json.loads(line))
        except (ValueError, TypeError):
            break
        if not isinstance(mark.file, str) or not isinstance(mark.size, int) or not line.endswith(b"\n"):
            break
        marks[mark.file] = mark
        size += len(line)
    return marks, size


def _hash_first(handle: int, size: int) -> _Hash:
    """The hash over the first `size` bytes, or as many as there are."""
    state, done = hashlib.sha256(), 0
    while done < size and (data := os.pread(handle, min(_CHUNK, size - done), done)):
        state.update(data)
        done += len(data)
    return state


def _write(handle: int, data: memoryview) -> None:
    done = 0
    while done < len(data):
        done += os.write(handle, data[done:])
