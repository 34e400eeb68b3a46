"""Weights packed once: the same logits, used only where they fit, and whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

from lora2edge.artifact import is_intact, open_artifact
from lora2edge.backends import base as backends
from lora2edge.backends.onnxruntime import OnnxRuntimeBackend
from lora2edge.backends.onnxruntime import finalize as finalize_module
from lora2edge.backends.onnxruntime.finalize import finalize
from lora2edge.backends.onnxruntime.session import open_session
from lora2edge.cli import main
from lora2edge.errors import InputError, Lora2EdgeError, OutputError
from lora2edge.progress import SILENT
from lora2edge.target import Target
from tests.unit.backends.onnxruntime.conftest import write_manifest

STALE = "finalized ones stale"


class Finalizer:
    """The part of a backend that the verb asks for."""

    def finalize(self, path, target, progress):
        return finalize(path)


def run(folder: Path, *, expect_warning: bool = False) -> tuple[list[np.ndarray], str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with open_session(folder, device="cpu", threads=1, slots=2, max_length=64) as session:
            logits = list(session.logits([[5, 6, 7, 8], list(range(40))], [range(4), range(40)]))
            tokens = list(session.generate([5, 6, 7], max_new=5, stop=[]))
            build = session.facts.build
    told = [str(item.message) for item in caught if issubclass(item.category, RuntimeWarning)]
    assert len(told) == int(expect_warning)
    if told:
        assert f"lora2edge finalize {folder}" in told[0]
    return [*logits, np.array(tokens)], build + "".join(told)


def same(one: list[np.ndarray], other: list[np.ndarray]) -> bool:
    return all(a.tobytes() == b.tobytes() for a, b in zip(one, other, strict=True))


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_packed_weights_give_the_same_bits(int4_copy: Path) -> None:
    portable, build = run(int4_copy)
    assert "weights packed at load" in build and STALE not in build
    before = {name: (int4_copy / name).read_bytes() for name in names(int4_copy)}
    result = finalize(int4_copy)
    assert not result["reused"] and result["size_bytes"] > (int4_copy / "model.onnx.data").stat().st_size
    assert names(int4_copy) - before.keys() == {
        "finalized", "finalized/model.onnx", "finalized/model.onnx.data", "finalized/stamp.json"
    }  # fmt: skip
    assert all((int4_copy / name).read_bytes() == content for name, content in before.items())
    packed, build = run(int4_copy)
    assert build.endswith("weights packed by finalize") and same(packed, portable)
    assert is_intact(open_artifact(int4_copy))
    assert finalize(int4_copy)["reused"]


def test_the_packed_file_holds_packed_weights(int4_copy: Path) -> None:
    """Opening it packs nothing: what is packed is named in its own entries."""
    import onnx

    finalize(int4_copy)
    model = onnx.load(int4_copy / "finalized" / "model.onnx", load_external_data=False)
    keys = {entry.key for tensor in model.graph.initializer for entry in tensor.external_data}
    assert any(key.startswith("prepacked") for key in keys)


def test_a_moved_and_a_copied_folder_still_fit(int4_copy: Path, tmp_path: Path) -> None:
    finalize(int4_copy)
    moved = int4_copy.rename(tmp_path / "elsewhere")
    assert run(moved)[1].endswith("weights packed by finalize")
    copied = tmp_path / "copied"
    shutil.copytree(moved, copied, copy_function=shutil.copyfile)  # with new times
    assert run(copied)[1].endswith("weights packed by finalize")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda stamp: stamp["machine"].update(onnxruntime="1.30.0 (old)"), ("1.30.0 (old)", "this is 1.31")),
        (lambda stamp: stamp["machine"]["processor"].append("amx_int9"), ("only there: amx_int9", "only here: none")),
        (lambda stamp: stamp.update(schema=99), ("another version of lora2edge",)),
        (lambda stamp: stamp["options"].clear(), ("another version of lora2edge",)),
        (lambda stamp: stamp.pop("machine"), ("damaged",)),
    ],
)
def test_a_stamp_that_does_not_fit_prints_both_sides(int4_copy: Path, change, words) -> None:
    portable, _ = run(int4_copy)
    finalize(int4_copy)
    path = int4_copy / "finalized" / "stamp.json"
    stamp = json.loads(path.read_text())
    change(stamp)
    path.write_text(json.dumps(stamp))
    found, told = run(int4_copy, expect_warning=True)
    assert STALE in told and all(word in told for word in words)
    assert same(found, portable)
    assert not finalize(int4_copy)["reused"]
    assert run(int4_copy)[1].endswith("weights packed by finalize")


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("model.onnx.data", "changed"),
        ("finalized/model.onnx.data", "changed"),
        ("finalized/model.onnx.data", "cut"),
        ("finalized/model.onnx", "cut"),
    ],
)
def test_changed_files_are_not_used(int4_copy: Path, name: str, how: str) -> None:
    finalize(int4_copy)
    path = int4_copy / name
    if how == "cut":
        os.truncate(path, path.stat().st_size // 2)
    else:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    _, told = run(int4_copy, expect_warning=True)
    assert f"{path} has changed" in told


def test_files_that_the_manifest_does_not_list_are_not_packed(int4_copy: Path) -> None:
    content = bytearray((int4_copy / "model.onnx.data").read_bytes())
    content[1000] ^= 1
    (int4_copy / "model.onnx.data").write_bytes(content)
    with pytest.raises(InputError) as caught:
        finalize(int4_copy)
    assert caught.value.code == "artifact-changed"
    assert not (int4_copy / "finalized").exists()


def test_an_error_leaves_nothing(int4_copy: Path, monkeypatch) -> None:
    before = names(int4_copy)
    answers = iter((np.zeros(3, np.float32), np.ones(3, np.float32)))
    monkeypatch.setattr(finalize_module, "_example", lambda session: next(answers))
    with pytest.raises(Lora2EdgeError) as caught:
        finalize(int4_copy)
    assert caught.value.code == "finalized-differs" and names(int4_copy) == before


def test_a_full_disk_is_told_before_anything_is_written(int4_copy: Path, monkeypatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 5, 5))
    with pytest.raises(OutputError) as caught:
        finalize(int4_copy)
    assert caught.value.code == "disk-full"


def test_a_disk_that_fills_up_is_no_broken_model(int4_copy: Path) -> None:
    before = names(int4_copy)
    code = (
        "import resource, signal, sys; from pathlib import Path\n"
        "from lora2edge.backends.onnxruntime.finalize import finalize\n"
        "from lora2edge.errors import OutputError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "try: finalize(Path(sys.argv[1]))\n"
        "except OutputError as error: print(error.code)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(int4_copy)], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "finalize-write"
    assert names(int4_copy) == before


def test_a_target_of_the_gpu_has_nothing_to_pack(int4_copy: Path) -> None:
    target = Target(name="test", backend="onnxruntime", precision="int4", device="cuda", options={})
    with pytest.raises(Lora2EdgeError) as caught:
        OnnxRuntimeBackend().finalize(int4_copy, target, SILENT)
    assert caught.value.code == "nothing-to-finalize"


def test_a_kill_leaves_nothing_that_is_used(int4_copy: Path) -> None:
    """Killed when the packed file is written; the next call sweeps up."""
    before = names(int4_copy)
    code = (
        "import os, signal, sys; from pathlib import Path\n"
        "from lora2edge.backends.onnxruntime import finalize as f\n"
        "f._example = lambda session: os.kill(os.getpid(), signal.SIGKILL)\n"
        "f.finalize(Path(sys.argv[1]))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(int4_copy)], check=False)
    assert done.returncode == -signal.SIGKILL
    left = names(int4_copy) - before
    assert left and not any(name.startswith("finalized") for name in left)
    assert "weights packed at load" in run(int4_copy)[1]
    finalize(int4_copy)
    assert {name.split("/")[0] for name in names(int4_copy) - before} == {"finalized"}


def verb(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.argv", ["lora2edge", "finalize", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    captured = capsys.readouterr()
    return int(stopped.value.code or 0), captured.out, captured.err


def as_gguf(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend that finalizes under a name that targets may have."""
    monkeypatch.setitem(backends._TABLE, "gguf", f"{__name__}:Finalizer")
    (folder / "manifest.json").unlink()
    write_manifest(folder, "gguf")


def test_the_verb(int4_copy: Path, monkeypatch, capsys) -> None:
    as_gguf(int4_copy, monkeypatch)
    code, out, _ = verb(monkeypatch, capsys, str(int4_copy), "--json")
    result = json.loads(out)
    assert code == 0 and not result["reused"] and Path(result["folder"]) == int4_copy / "finalized"
    code, out, _ = verb(monkeypatch, capsys, str(int4_copy))
    assert code == 0 and "was there already" in out


def test_the_verb_refuses_a_changed_artifact(int4_copy: Path, monkeypatch, capsys) -> None:
    as_gguf(int4_copy, monkeypatch)
    (int4_copy / "tokenizer.json").write_text("{}")
    code, _, err = verb(monkeypatch, capsys, str(int4_copy))
    assert code == 2 and "error[artifact-changed]" in err


def test_backends_with_nothing_to_finalize_say_so(tmp_path: Path, monkeypatch, capsys) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    write_manifest(tmp_path, "gguf")
    code, _, err = verb(monkeypatch, capsys, str(tmp_path))
    assert code == 2 and "error[nothing-to-finalize]" in err and "gguf" in err
    code, _, err = verb(monkeypatch, capsys, str(tmp_path / "nowhere"))
    assert code == 2 and "error[no-artifact]" in err
