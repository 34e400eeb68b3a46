"""GPTQ's rounding that was killed goes on with the first layer that is not finished, and ends with the same bytes."""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora2edge.backends import layerwise
from lora2edge.backends.gguf import GgufBackend
from lora2edge.calibration import Replay, StoredCalibration
from lora2edge.checkpoint import open_checkpoint
from lora2edge.contracts import Checkpoint
from lora2edge.errors import DataError
from lora2edge.journal import resumable_folder
from lora2edge.progress import SILENT
from lora2edge.quantize import RoundingLog
from tests.tiny import make_checkpoint
from tests.unit.backends.even import calibrated, texts
from tests.unit.backends.gguf.lowering import target
from tests.unit.killed import in_child

LAYERS = 3
KEY = "0" * 16


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("source")
    view = open_checkpoint(make_checkpoint(root / "base", "qwen2", layers=LAYERS, tied=request.param))
    return view, calibrated(view, root / "calibration", texts(6)), request.param


def run(view: Checkpoint, calibration: StoredCalibration, out: Path) -> None:
    with resumable_folder(out, KEY) as folder:
        GgufBackend().lower(view, target("q4_0"), calibration, folder, SILENT)


def hashes(out: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in out.iterdir()}


def ended_at(step: str, count: int, view: Checkpoint, calibration: Any, out: Path, end: Callable[[], None]) -> int:
    """Exit status of a lowering that ends itself at the n-th call of a method of Replay."""
    method, calls = getattr(Replay, step), 0

    def counted(self: Any, *arguments: Any, **named: Any) -> Any:
        nonlocal calls
        if calls == count:
            end()
        calls += 1
        return method(self, *arguments, **named)

    def work() -> int:
        setattr(Replay, step, counted)
        try:
            run(view, calibration, out)
        except KeyboardInterrupt:
            return 1
        return 0

    return in_child(work)[0]


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("step", "count"),
    [("open", 0), ("inputs", 2), ("close", 0), ("put", 9), ("open", 2), ("close", 2), ("head_inputs", 0)],
)
def test_the_same_bytes(source: Any, step: str, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    view, calibration, tied = source
    run(view, calibration, tmp_path / "undisturbed")
    assert ended_at(step, count, view, calibration, tmp_path / "killed", kill) == -signal.SIGKILL
    opened: list[int] = []
    open_layer = Replay.open
    monkeypatch.setattr(Replay, "open", lambda self, layer: (opened.append(layer), open_layer(self, layer))[1])
    run(view, calibration, tmp_path / "killed")
    assert hashes(tmp_path / "killed") == hashes(tmp_path / "undisturbed")
    finished = {"open": count, "close": count, "inputs": 0, "put": 1, "head_inputs": 0 if tied else LAYERS}[step]
    if (step, count, tied) == ("close", LAYERS - 1, True):
        finished = LAYERS  # nothing follows
    assert opened == list(range(finished, LAYERS))
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_an_interrupt_keeps_what_is_finished(source: Any, tmp_path: Path) -> None:
    view, calibration, _ = source
    assert ended_at("open", 1, view, calibration, tmp_path / "out", interrupt) == 0
    assert not (tmp_path / "out").exists()
    assert list(tmp_path.glob(".out.*.resume/files/rounded-0000.bin"))
    run(view, calibration, tmp_path / "out")
    assert set(hashes(tmp_path / "out")) == {"model.gguf", "imatrix.gguf"}


def test_damaged_leftovers_are_not_gone_on_with(source: Any, tmp_path: Path) -> None:
    view, calibration, _ = source
    run(view, calibration, tmp_path / "undisturbed")
    ended_at("open", 2, view, calibration, tmp_path / "out", kill)
    (hidden,) = tmp_path.glob(".out.*.resume/files/hidden-0002.bin")
    hidden.write_bytes(hidden.read_bytes()[:-1] + b"x")
    run(view, calibration, tmp_path / "out")
    assert hashes(tmp_path / "out") == hashes(tmp_path / "undisturbed")


class NoEncoder:
    def encode(self, name: str, weights: Any, factor: Any, log: RoundingLog) -> Any:
        raise AssertionError

    decode = embedding = encode


def test_what_is_no_matrix_is_found_at_once(source: Any, tmp_path: Path) -> None:
    view, calibration, _ = source
    with pytest.MonkeyPatch.context() as patch, pytest.raises(DataError) as caught:
        patch.delattr(Replay, "open")
        layerwise.round_layers(view, calibration, ["model.norm.weight"], NoEncoder(), tmp_path, SILENT)  # type: ignore[arg-type]
    assert caught.value.code == "rounding-gap"
    assert "model.norm.weight" in caught.value.why


def test_a_matrix_that_never_runs_is_not_passed_over(source: Any, tmp_path: Path) -> None:
    view, calibration, _ = source
    names = ["model.layers.0.mlp.down_proj.weight"]

    class Silent(Replay):
        def open(self, layer: int) -> list[list[str]]:
            return [group for group in super().open(layer) if group != names]

    with pytest.MonkeyPatch.context() as patch, pytest.raises(DataError) as caught:
        patch.setattr(layerwise, "Replay", Silent)
        layerwise.round_layers(view, calibration, names, NoEncoder(), tmp_path, SILENT, feedback=False)  # type: ignore[arg-type]
    assert caught.value.code == "rounding-gap"
    assert names[0] in caught.value.why
