"""Files read ahead and past the page cache: the right bytes, the right sums, no more memory than the window."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from lora2edge import directio
from lora2edge.checkpoint import readahead
from lora2edge.checkpoint.readahead import read_ahead, reading_ahead
from lora2edge.directio import BLOCK, aligned, read_at, set_direct, write_at
from lora2edge.journal import GrowingFile, Journal
from lora2edge.progress import SILENT
from lora2edge.storage import sha256_file

CHUNK = 64 << 10


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readahead, "CHUNK", CHUNK)


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Of sizes at, beside and far from the limits of chunks and blocks."""
    sizes = [40 * CHUNK + 1234, 3 * CHUNK, 5, 20 * CHUNK - BLOCK, 0, 7 * CHUNK + BLOCK]
    for number, size in enumerate(sizes):
        (tmp_path / f"{number}").write_bytes(np.random.default_rng(number).bytes(size))
    return [tmp_path / f"{number}" for number in range(len(sizes))]


def parts(files: Sequence[Path], step: int) -> list[tuple[Path, int, int]]:
    return [
        (path, at, min(step, path.stat().st_size - at)) for path in files for at in range(0, path.stat().st_size, step)
    ]


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("threads", [1, 4])
def test_every_byte_is_served_once_it_is_asked_for_in_order(
    files: list[Path], threads: int, cached: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readahead, "is_cached", lambda path: cached)
    served: list[bool] = []

    def check(part: tuple[Path, int, int]) -> None:
        path, at, size = part
        target = np.empty(size, np.uint8)
        served.append(read_ahead(path, at, target))
        if served[-1]:
            with path.open("rb") as file:
                file.seek(at)
                assert file.read(size) == target.tobytes()

    expected = [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]
    with reading_ahead([*files, files[0].with_name("missing")], SILENT, threads):
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(check, parts(files, 10_007)))
        assert not read_ahead(files[0].with_name("missing"), 0, np.empty(1, np.uint8))
        assert not read_ahead(files[2], 4, np.empty(2, np.uint8)), "it has 5 bytes"
    assert sum(served) > 0.95 * len(served)
    monkeypatch.setattr(Path, "open", None)
    assert [sha256_file(path) for path in files] == expected


def test_any_order_ends_and_hashes(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for from back to front, or at random, it may serve nothing, but never a wrong byte, and it ends."""
    expected = {path: path.read_bytes() for path in files}
    for order in ("reversed", "random"):
        found = parts(files, 30_011)
        found.reverse() if order == "reversed" else random.Random(0).shuffle(found)
        with reading_ahead(files, SILENT, 2), ThreadPoolExecutor(3) as pool:

            def check(part: tuple[Path, int, int]) -> None:
                path, at, size = part
                target = np.empty(size, np.uint8)
                if read_ahead(path, at, target):
                    assert expected[path][at : at + size] == target.tobytes()

            list(pool.map(check, found))
    monkeypatch.setattr(Path, "open", None)
    assert [sha256_file(path) for path in files] == [hashlib.sha256(expected[path]).hexdigest() for path in files]


def test_it_keeps_pace_and_stops(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """No further in front of the work than half the window; nothing more once it is given up."""
    offsets: list[int] = []
    read = directio.read_at
    reached = threading.Semaphore(0)

    def recorded(handle: int, buffer: NDArray[np.uint8], offset: int) -> int:
        offsets.append(offset)
        reached.release()
        return read(handle, buffer, offset)

    monkeypatch.setattr(readahead, "read_at", recorded)
    with pytest.raises(KeyboardInterrupt), reading_ahead(files[:1], SILENT, 2) as paced:
        for _ in range(5):
            assert reached.acquire(timeout=10)
        assert not reached.acquire(timeout=0.05)
        paced.start("work", 41)
        paced.advance(10)  # passed over without being asked for
        for _ in range(10):
            assert reached.acquire(timeout=10)
        assert not reached.acquire(timeout=0.05)
        raise KeyboardInterrupt
    assert offsets == [number * CHUNK for number in range(15)]
    assert not any("run" in thread.name for thread in threading.enumerate())


def test_a_file_that_changes_is_hashed_again(files: list[Path]) -> None:
    path = files[0]
    with reading_ahead([path], SILENT, 2):
        path.write_bytes(bytes(40 * CHUNK))
        os.utime(path, ns=(1, 1))
    assert sha256_file(path) == hashlib.sha256(bytes(40 * CHUNK)).hexdigest()
    path.write_bytes(bytes(10))
    assert sha256_file(path) == hashlib.sha256(bytes(10)).hexdigest()


def test_a_file_that_cannot_be_read_leaves_the_error_to_others(
    files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(handle: int, buffer: NDArray[np.uint8], offset: int) -> int:
        raise OSError(errno.EIO, "I/O error")

    monkeypatch.setattr(readahead, "read_at", broken)
    with reading_ahead(files, SILENT, 2):
        assert not read_ahead(files[0], 0, np.empty(10, np.uint8))


def test_where_the_file_system_refuses_it_goes_through_the_page_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    data = aligned(3 * BLOCK)
    data[:] = np.frombuffer(np.random.default_rng(0).bytes(3 * BLOCK), np.uint8)
    handle = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        set_direct(handle)
        write_at(handle, data[1 : BLOCK + 1], 0)  # not aligned: EINVAL on most file systems
        assert path.read_bytes() == data[1 : BLOCK + 1].tobytes()
        set_direct(handle)
        write_at(handle, data, 0)
        os.ftruncate(handle, 2 * BLOCK + 7)
        set_direct(handle)
        back = aligned(4 * BLOCK)
        assert read_at(handle, back, 0) == 2 * BLOCK + 7
        assert back[: 2 * BLOCK + 7].tobytes() == data[: 2 * BLOCK + 7].tobytes()
        assert read_at(handle, back[5 : 5 + BLOCK], 0) == BLOCK
        assert back[5 : 5 + BLOCK].tobytes() == data[:BLOCK].tobytes()
    finally:
        os.close(handle)


@pytest.mark.parametrize("direct", [True, False])
def test_a_growing_file_holds_what_was_appended(tmp_path: Path, direct: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of any size, over the limits of blocks and stages, and made safe in between."""
    monkeypatch.setattr("lora2edge.journal._STAGE_BYTES", 4 * BLOCK)
    monkeypatch.setattr("lora2edge.journal.SYNC_BYTES", 3 * BLOCK)
    work = tmp_path / ".out.key.resume" / "files"
    work.mkdir(parents=True)
    (work.parent / "journal.jsonl").touch()
    random.seed(0)
    pieces = [
        random.randbytes(random.choice([0, 1, 100, BLOCK - 1, BLOCK, 3 * BLOCK, 9 * BLOCK + 5])) for _ in range(60)
    ]
    whole = b"".join(pieces)
    with Journal(work) as journal, GrowingFile(journal, "file", {0}, direct=direct) as file:
        for piece in pieces:
            file.append(memoryview(piece))
        file.finish()
    assert (work / "file").read_bytes() == whole
    with Journal(work) as journal:
        assert journal.is_whole("file", len(whole))
        assert journal.marks["file"].sha256 == hashlib.sha256(whole).hexdigest()
