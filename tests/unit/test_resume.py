"""Work that was killed: nothing broken under the final name, and the next run goes on to the same bytes."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from lora2edge import journal
from lora2edge.adapters import merge, read_adapter
from lora2edge.artifact import lower_here
from lora2edge.backends.hf import backend as hf_backend
from lora2edge.backends.hf import write
from lora2edge.checkpoint import open_checkpoint
from lora2edge.errors import CheckpointError, InputError, OutputError
from lora2edge.journal import FILES, JOURNAL, GrowingFile, Journal, Mark, kept_bytes, read_marks, resumable_folder
from lora2edge.progress import SILENT
from lora2edge.target import load_target
from tests.tiny import make_adapter, make_checkpoint

KEY = "0123456789abcdef0123"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("resume")
    base = make_checkpoint(root / "base", "qwen2", hidden=128, layers=2, shards=2)
    return base, make_adapter(root / "adapter", base)


# ---------------------------------------------------------------- kill -9


@pytest.mark.parametrize(
    ("target", "shard_bytes"), [("hf/merged", 50_000), ("gguf/q8_0", 0), ("onnxruntime/cpu-int8", 0)]
)
def test_kill_at_random_moments(made: tuple[Path, Path], tmp_path: Path, target: str, shard_bytes: int) -> None:
    random.seed(f"{target} 4")
    moments = [0.0, 1.0, *(random.random() for _ in range(10))]
    root = tmp_path / "runs"
    root.mkdir()
    request = {"base": str(made[0]), "adapter": str(made[1]), "root": str(root), "target": target,
               "shard_bytes": shard_bytes, "sync_bytes": 20_000, "moments": moments}  # fmt: skip
    (tmp_path / "request.json").write_text(json.dumps(request))
    done = subprocess.run(
        [sys.executable, "-m", "tests.unit.killed", tmp_path / "request.json"],
        capture_output=True, text=True, check=False, timeout=200, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    first, *kills = map(json.loads, done.stdout.splitlines())
    whole = first["undisturbed"]
    assert "manifest.json" in whole
    assert len(kills) == len(moments)
    assert all(kill["killed"] == -9 for kill in kills)
    for kill in kills:
        assert kill["found"] in (None, kill["old"], whole)
        assert kill["rerun"] == 0
        assert kill["after"] == whole
        assert kill["left"] == ["out"]
    assert sum(bool(kill["safe"]) for kill in kills) >= len(kills) // 3, "the moments are not spread over the work"
    shards = [name for name in whole if name.endswith(".safetensors")]
    if shard_bytes:
        assert len(shards) > 3
        assert any(len(kill["safe"]) > 1 for kill in kills), "no kill came after a finished shard"


# ---------------------------------------------------------------- interrupts and errors


class StopAt:
    """A Progress that raises after so many steps."""

    def __init__(self, step: int, error: BaseException) -> None:
        self.step = step
        self.error = error
        self.amounts: list[int] = []

    def start(self, what: str, total: int, unit: str = "") -> None: ...

    def advance(self, amount: int = 1) -> None:
        self.amounts.append(amount)
        if len(self.amounts) == self.step:
            raise self.error

    def finish(self) -> None: ...


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write, "SLAB_ELEMENTS", 4000)
    monkeypatch.setattr(hf_backend, "write_checkpoint", lambda *given: write.write_checkpoint(*given, 50_000))


def lower(made: tuple[Path, Path], out: Path, progress: Any = SILENT, base: Path | None = None) -> None:
    view = merge(open_checkpoint(base or made[0]), [read_adapter(made[1])])
    lower_here(view, load_target("hf/merged"), None, out, progress)


def folder(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def test_interrupt_keeps_what_is_finished_and_says_so(made: tuple[Path, Path], tmp_path: Path, small: None) -> None:
    lower(made, tmp_path / "undisturbed")
    with pytest.raises(KeyboardInterrupt) as caught:
        lower(made, tmp_path / "out", StopAt(40, KeyboardInterrupt()))
    (work,) = (path for path in tmp_path.iterdir() if path.name.startswith(".out."))
    assert str(work) in caught.value.__notes__[0] and "goes on" in caught.value.__notes__[0]
    finished = {name for name, mark in read_marks(work / FILES).items() if mark.whole}
    assert "model-00001-of-" in min(finished)
    times = {name: (work / FILES / name).stat().st_mtime_ns for name in finished}
    lower(made, tmp_path / "out")
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in finished} == times, "written again"
    assert folder(tmp_path / "out") == folder(tmp_path / "undisturbed")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "undisturbed"]


def test_interrupt_before_anything_is_finished_leaves_nothing(
    made: tuple[Path, Path], tmp_path: Path, small: None
) -> None:
    with pytest.raises(KeyboardInterrupt) as caught:
        lower(made, tmp_path / "out", StopAt(1, KeyboardInterrupt()))
    assert not hasattr(caught.value, "__notes__")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [OSError(28, "no space left on device"), CheckpointError("base-nan", "NaN")])
def test_errors_leave_nothing(made: tuple[Path, Path], tmp_path: Path, small: None, error: Exception) -> None:
    threads = set(threading.enumerate())
    with pytest.raises(InputError):
        lower(made, tmp_path / "out", StopAt(40, error))
    assert list(tmp_path.iterdir()) == []
    assert set(threading.enumerate()) == threads


def test_another_run_removes_what_an_interrupted_one_left(made: tuple[Path, Path], tmp_path: Path, small: None) -> None:
    other = tmp_path / "inputs" / "base"
    shutil.copytree(made[0], other)  # the same weights, another inode
    with pytest.raises(KeyboardInterrupt):
        lower(made, tmp_path / "out", StopAt(40, KeyboardInterrupt()), base=other)
    lower(made, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["inputs", "out"]


def test_the_base_is_hashed_on_the_way(
    made: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = shutil.copytree(made[0], tmp_path / "base")
    view = merge(open_checkpoint(base), [read_adapter(made[1])])
    opened: list[str] = []
    path_open = Path.open

    def recorded(path: Path, *arguments: Any, **options: Any) -> Any:
        opened.append(path.name)
        return path_open(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", recorded)
    lower_here(view, load_target("hf/merged"), None, tmp_path / "out", SILENT)
    weights = [name for name in opened if name.startswith("model-") and name.endswith(".safetensors")]
    assert sorted(weights) == sorted(path.name for path in base.glob("*.safetensors"))
    model = json.loads((tmp_path / "out" / "manifest.json").read_text())["inputs"]["model"]
    expected = subprocess.run(["sha256sum", *base.glob("*.safetensors")], capture_output=True, text=True, check=True)
    for line in expected.stdout.splitlines():
        sha, path = line.split()
        assert model[f"base/{Path(path).name}"] == sha


# ---------------------------------------------------------------- the folder


def fill(path: Path, *, stop: bool = True) -> None:
    with resumable_folder(path, KEY) as work, Journal(work) as opened:
        if not opened.is_whole("one", 4):
            with GrowingFile(opened, "one", {0}) as file:
                file.append(memoryview(b"1111"))
                file.finish()
        with GrowingFile(opened, "two", {0, 2}) as file:
            if not file.size:
                file.append(memoryview(b"2"), memoryview(b"2"))
            if stop:
                (work / "foreign").write_text("left over")
                (work / "folder").mkdir()
                raise KeyboardInterrupt
            file.append(memoryview(b"34"))
            file.finish()


@pytest.fixture
def stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder of an interrupted `fill`: one file whole, another safe up to its second byte."""
    monkeypatch.setattr(journal, "SYNC_BYTES", 1)
    with pytest.raises(KeyboardInterrupt):
        fill(tmp_path / "out")
    work = tmp_path / f".out.{KEY[:16]}.resume"
    assert [(mark.size, mark.whole) for mark in read_marks(work / FILES).values()] == [(4, True), (2, False)]
    return work


def test_a_growing_file_goes_on(stopped: Path) -> None:
    inode = (stopped / FILES / "two").stat().st_ino
    fill(stopped.with_name("out"), stop=False)
    out = stopped.with_name("out")
    assert folder(out) == {"one": b"1111", "two": b"2234"}
    assert (out / "two").stat().st_ino == inode
    assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "append", "torn", "garbage", "elsewhere"])
def test_what_is_not_as_the_journal_says_is_made_again(stopped: Path, damage: str) -> None:
    for name in ("one", "two"):
        path = stopped / FILES / name
        data = path.read_bytes()
        if damage == "flip":
            path.write_bytes(b"X" + data[1:])
        elif damage == "truncate":
            path.write_bytes(data[:-1])
        elif damage == "remove":
            path.unlink()
        elif damage == "append":
            path.write_bytes(data + b"more")
    lines = (stopped / JOURNAL).read_bytes()
    if damage == "torn":
        (stopped / JOURNAL).write_bytes(lines[:-10])
    elif damage == "garbage":
        (stopped / JOURNAL).write_bytes(b"{}\n[1]\n\xff")
    elif damage == "elsewhere":
        (stopped / JOURNAL).write_bytes(lines.replace(b'"one"', b'"../one"'))
    fill(stopped.with_name("out"), stop=False)
    assert folder(stopped.with_name("out")) == {"one": b"1111", "two": b"2234"}


def test_a_size_between_two_pieces_begins_anew(tmp_path: Path) -> None:
    work = tmp_path / ".out.key.resume" / FILES
    work.mkdir(parents=True)
    (work.parent / JOURNAL).touch()
    (work / "file").write_bytes(b"abc")
    with Journal(work) as opened:
        opened.add(Mark("file", 3, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad", whole=False))
        with GrowingFile(opened, "file", {0, 2}) as file:
            assert file.size == 0
        (work / "file").write_bytes(b"abc")
        with GrowingFile(opened, "file", {0, 3}) as file:
            assert file.size == 3


def test_without_a_journal_nothing_is_recorded(tmp_path: Path) -> None:
    with Journal(tmp_path) as opened, GrowingFile(opened, "file", {0}) as file:
        file.append(memoryview(b"data"))
        file.finish()
    assert folder(tmp_path) == {"file": b"data"}


def test_a_second_process_is_kept_out(tmp_path: Path) -> None:
    with resumable_folder(tmp_path / "out", KEY):
        with pytest.raises(OutputError) as caught, resumable_folder(tmp_path / "out", KEY):
            pass
        assert caught.value.code == "out-busy" and str(tmp_path / "out") in caught.value.what
        with pytest.raises(OutputError) as caught, resumable_folder(tmp_path / "out", "other" + KEY):
            pass
        assert caught.value.code == "out-busy" and str(tmp_path / "out") in caught.value.what
    with resumable_folder(tmp_path / "out", "other" + KEY) as work:
        (work / "file").write_text("other")
    assert folder(tmp_path) == {"out/file": b"other"}


def test_two_merges_into_one_folder(made: tuple[Path, Path], tmp_path: Path) -> None:
    """Of different adapters: one is refused while the other writes, and what is there is whole and the other's."""
    other = make_adapter(tmp_path / "other", made[0], seed=9)
    code = (
        "import sys; from pathlib import Path; from lora2edge.journal import resumable_folder\n"
        "with resumable_folder(Path(sys.argv[1]), 'another'): print('in', flush=True); sys.stdin.read()"
    )
    out = tmp_path / "out"
    writer = subprocess.Popen([sys.executable, "-c", code, out], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert writer.stdin is not None and writer.stdout is not None
    assert writer.stdout.readline() == b"in\n"
    with pytest.raises(OutputError) as caught:
        lower_here(merge(open_checkpoint(made[0]), [read_adapter(other)]), load_target("hf/merged"), None, out, SILENT)
    assert caught.value.code == "out-busy"
    writer.communicate()
    assert writer.returncode == 0
    assert folder(out) == {} and sorted(path.name for path in tmp_path.iterdir()) == ["other", "out"]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    disk, link = tmp_path / "disk", tmp_path / "link"
    disk.mkdir()
    link.symlink_to("disk/out", target_is_directory=True)
    for text in ("first", "second"):  # to nowhere, and to a folder
        with resumable_folder(link, KEY) as work:
            assert work.is_relative_to(disk)
            (work / "file").write_text(text)
        assert folder(disk) == {"out/file": text.encode()}
        assert link.readlink() == Path("disk/out")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "link"]


def test_a_neighbour_with_a_longer_name_is_left_alone(tmp_path: Path) -> None:
    neighbour = tmp_path / f".out.v2.{KEY[:16]}.resume"
    neighbour.mkdir()
    with resumable_folder(tmp_path / "out", KEY):
        pass
    assert neighbour.is_dir()


def test_the_stage_of_a_killed_build_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It still writes: what it holds is not tidied away under its hands."""
    work = tmp_path / f".out.{KEY[:16]}.resume"
    (work / FILES).mkdir(parents=True)
    (work / JOURNAL).touch()
    monkeypatch.setattr(journal, "_ORPHAN_SECONDS", 0.3)
    with Journal(work / FILES):
        with pytest.raises(OutputError) as caught, resumable_folder(tmp_path / "out", KEY):
            pass
        assert caught.value.code == "out-busy"
        assert work.is_dir()
        monkeypatch.setattr(journal, "_ORPHAN_SECONDS", 30)
        thread = threading.Timer(0.2, lambda: os.close(held))
        held = os.open(work / JOURNAL, os.O_RDONLY)
    thread.start()
    with resumable_folder(tmp_path / "out", KEY):
        pass
    thread.join()
    assert (tmp_path / "out").is_dir()


def test_a_killed_stage_process_does_not_cost_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "SYNC_BYTES", 1)
    for code, kept in (("stage-killed", True), ("stage-died", False)):
        out = tmp_path / code
        with (
            pytest.raises(InputError),
            resumable_folder(out, KEY) as work,
            Journal(work) as opened,
            GrowingFile(opened, "one", {0}) as file,
        ):
            file.append(memoryview(b"1111"))
            file.finish()
            raise InputError(code, "the lower stage was killed by SIGKILL")
        assert kept_bytes(out) == (4 if kept else 0)


def test_kept_bytes_of_a_build(tmp_path: Path) -> None:
    for name in (".other.key.resume", "out/artifacts/.gguf-q8_0.key.resume", ".out.key.resume"):
        folder = tmp_path / name / FILES
        folder.mkdir(parents=True)
        (folder / "file").write_bytes(bytes(len(name)))
    assert kept_bytes(tmp_path / "out") == len(".out.key.resume") + len("out/artifacts/.gguf-q8_0.key.resume")


def test_the_old_folder_comes_back_after_a_kill_between_two_renames(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    old = tmp_path / f".out.{dead.pid}.old"
    old.mkdir()
    (old / "file").write_text("old")
    with pytest.raises(ValueError), resumable_folder(tmp_path / "out", KEY):  # noqa: PT011
        raise ValueError
    assert folder(tmp_path) == {"out/file": b"old"}


def test_ctrl_c_says_where_the_next_run_goes_on(
    made: tuple[Path, Path],
    tmp_path: Path,
    small: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from lora2edge.cli import main

    def leave(status: int) -> None:
        raise SystemExit(status)

    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr("lora2edge.progress.SILENT", StopAt(40, KeyboardInterrupt()))
    options = ["--base", str(made[0]), "--adapter", str(made[1]), "--out", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", ["lora2edge", "merge", *options])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 130
    (work,) = tmp_path.glob(".out.*.resume")
    assert f"are kept in {work}, the same command goes on from there" in capsys.readouterr().err
