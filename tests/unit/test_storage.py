"""Folders that appear whole, alone, and are never lost."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from lora2edge import artifact
from lora2edge.cache import Cache
from lora2edge.errors import OutputError
from lora2edge.progress import SILENT
from lora2edge.storage import alone_in, atomic_folder, hash_ahead, sha256_file


def test_atomic_folder_sweeps_only_what_the_dead_left(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / f".out.{dead.pid}.partial").mkdir()
    (tmp_path / f".out.{os.getpid()}.partial").mkdir()  # a container's next process has the same number
    (tmp_path / f".out.{os.getppid()}.partial").mkdir()
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("new")
    assert sorted(path.name for path in tmp_path.iterdir()) == [f".out.{os.getppid()}.partial", "out"]


def test_atomic_folder_keeps_the_old_one_when_the_block_fails(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with atomic_folder(out) as folder:
        (folder / "file").write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_folder(out) as folder:
        (folder / "file").write_text("new")
        raise KeyboardInterrupt
    assert (out / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_atomic_folder_replaces_what_appeared_meanwhile(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with atomic_folder(out) as folder:
        (folder / "file").write_text("second")
        out.mkdir()
        (out / "file").write_text("first")
    assert (out / "file").read_text() == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_link_that_a_killed_process_put_aside_is_removed(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    real, out = tmp_path / "real", tmp_path / "out"
    real.mkdir()
    (real / "file").write_text("kept")
    (tmp_path / f".out.{dead.pid}.old").symlink_to(real)
    out.mkdir()
    with atomic_folder(out):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "real"]
    assert (real / "file").read_text() == "kept"


def test_folders_replaced_at_once_end_as_one(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from lora2edge.storage import atomic_folder\n"
        "for number in range(60):\n"
        "    with atomic_folder(Path(sys.argv[1]) / 'out') as folder:\n"
        "        (folder / 'one').write_text(f'{sys.argv[2]} {number}')\n"
        "        (folder / 'two').write_text(f'{sys.argv[2]} {number}')\n"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, tmp_path, name]) for name in "ab"]
    assert [writer.wait() for writer in writers] == [0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    out = tmp_path / "out"
    assert (out / "one").read_text() == (out / "two").read_text()
    assert (out / "one").read_text() in {"a 59", "b 59"}


@pytest.mark.parametrize(
    ("name", "code"),
    [("EFBIG", "file-too-large"), ("EIO", "disk-error"), ("ENOSPC", "disk-full"), ("EEXIST", "bad-out")],
)
def test_what_a_disk_can_do_is_an_error_of_ours(tmp_path: Path, name: str, code: str) -> None:
    with pytest.raises(OutputError) as caught, atomic_folder(tmp_path / "out"):
        raise OSError(getattr(errno, name), "words")
    assert caught.value.code == code and caught.value.hint
    assert list(tmp_path.iterdir()) == []


def test_alone_in_keeps_a_second_process_out(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from lora2edge.storage import alone_in\n"
        "with alone_in(Path(sys.argv[1])): print('in', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path / "out"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdin is not None and other.stdout is not None
    assert other.stdout.readline() == "in\n"
    with pytest.raises(OutputError) as caught, alone_in(tmp_path / "out"):
        pass
    assert caught.value.code == "out-busy"
    other.kill()
    other.communicate()
    with alone_in(tmp_path / "out"):
        pass
    assert list((tmp_path / "out").iterdir()) == []


def test_a_damaged_cache_entry_is_not_found(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    for name, damage in (("file", "other"), ("stage.json", "{}"), ("stage.json", "no JSON")):
        with cache.writing("measure", "0" * 64) as folder:
            (folder / "file").write_text("figures")
        found = cache.find("measure", "0" * 64)
        assert found is not None and found.size_bytes > 0
        (found.path / name).write_text(damage)
        assert cache.find("measure", "0" * 64) is None


def test_a_cache_entry_that_another_process_finished_stays(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from lora2edge.cache import Cache\n"
        "with Cache(Path(sys.argv[1])).writing('measure', '0' * 64) as folder: (folder / 'file').write_text('first')"
    )
    cache = Cache(tmp_path)
    with cache.writing("measure", "0" * 64) as folder:
        (folder / "file").write_text("second")
        subprocess.run([sys.executable, "-c", code, tmp_path], check=True)
    assert (cache.entry("measure", "0" * 64).path / "file").read_text() == "first"


def test_a_file_that_changes_while_it_is_hashed_is_hashed_again(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"first")

    def change(count: int) -> bool:
        path.write_bytes(b"other")
        os.utime(path, ns=(1, 1))
        return True

    hash_ahead(path, change)
    assert sha256_file(path) == hashlib.sha256(b"other").hexdigest()
    path.write_bytes(b"third")
    hash_ahead(path, lambda count: True)
    path.write_bytes(b"fourth")
    assert sha256_file(path) == hashlib.sha256(b"fourth").hexdigest()


def test_a_file_hashed_ahead_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(3 << 20))
    asked: list[int] = []
    hash_ahead(path, lambda count: not asked.append(count))  # type: ignore[func-returns-value]
    assert sum(asked) >= 3 << 20
    expected = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(Path, "open", None)
    assert sha256_file(path) == expected
    monkeypatch.undo()
    (tmp_path / "stopped").write_bytes(b"never")
    hash_ahead(tmp_path / "stopped", lambda count: False)
    assert sha256_file(tmp_path / "stopped") == hashlib.sha256(b"never").hexdigest()


def test_reading_ahead_keeps_pace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most AHEAD_BYTES in front of the share of the work that is done; nothing more once it is given up."""
    monkeypatch.setattr(artifact, "AHEAD_BYTES", 100)
    pace = artifact._Pace(SILENT, 1000)
    read: list[int] = []

    def reader() -> None:
        while sum(read) < 1000 and pace.wait(50):
            read.append(50)

    thread = threading.Thread(target=reader)
    thread.start()
    for done, expected in ((0, 100), (3, 400), (1, 500)):
        if not done:
            pace.start("work", 10)
        pace.advance(done)
        thread.join(0.1)
        assert sum(read) == expected
    pace.end(give_up=True)
    thread.join(10)
    assert sum(read) == 500 and not thread.is_alive()
