"""A pass that was killed goes on with the first layer that is not finished, and ends with the same bytes."""

from __future__ import annotations

import hashlib
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from lora2edge.cache import Cache
from lora2edge.calibration import calibrate, open_calibration
from lora2edge.calibration.layers import LayeredModel
from lora2edge.checkpoint import open_checkpoint
from lora2edge.contracts import Checkpoint
from lora2edge.progress import SILENT
from tests.architectures import ARCHITECTURES, make_model
from tests.tiny import make_checkpoint
from tests.unit.calibration.whole import samples
from tests.unit.killed import in_child

LAYERS = 4


def run(view: Checkpoint, root: Path, kept: bool = True) -> None:
    with Cache(root).writing("calibrate", "0" * 64, resumable=True) as folder:
        calibrate(view, samples(9, vocab=370), folder, SILENT, device="cpu", threads=1, layer_inputs=kept)


def hashes(root: Path) -> dict[str, str]:
    folder = Cache(root).root / "calibrate" / ("0" * 32)
    files = (path for path in folder.iterdir() if path.name != "stage.json")
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def killed_at(layer: int, batch: int, view: Checkpoint, root: Path, end: Any = None) -> int:
    """Exit status of a pass that ends itself before that batch of that layer."""
    model_run = LayeredModel.run
    seen = 0

    def counted(self: Any, *arguments: Any, **named: Any) -> Any:
        nonlocal seen
        if self.loaded == layer:
            if seen == batch:
                (end or (lambda: os.kill(os.getpid(), signal.SIGKILL)))()
            seen += 1
        return model_run(self, *arguments, **named)

    def work() -> int:
        LayeredModel.run = counted  # type: ignore[method-assign]
        try:
            run(view, root)
        except KeyboardInterrupt:
            return 1
        return 0

    return in_child(work)[0]


@pytest.mark.parametrize(("layer", "batch"), [(0, 0), (1, 1), (2, 0), (3, 1)])
def test_a_killed_pass_goes_on(tmp_path: Path, layer: int, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    view = open_checkpoint(make_checkpoint(tmp_path / "base", "gemma3", layers=LAYERS))
    monkeypatch.setattr("lora2edge.calibration.layout._BATCH_TOKENS", 64)
    run(view, tmp_path / "undisturbed")
    assert killed_at(layer, batch, view, tmp_path / "killed") == -signal.SIGKILL
    loaded = []
    load = LayeredModel.load
    monkeypatch.setattr(LayeredModel, "load", lambda self, index: (loaded.append(index), load(self, index))[1])
    run(view, tmp_path / "killed")
    assert [index for index in loaded if index >= layer] == list(range(layer, LAYERS))
    assert sum(index < layer for index in loaded) <= 1  # one token through the first, to see what a layer returns
    assert hashes(tmp_path / "killed") == hashes(tmp_path / "undisturbed")
    assert not [path for path in hashes(tmp_path / "killed") if path.startswith("hidden")]
    assert [path.name for path in (tmp_path / "killed" / "calibrate").iterdir()] == ["0" * 32]


def test_an_interrupt_keeps_what_is_finished(tmp_path: Path) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    make_model(ARCHITECTURES["bert"], tmp_path / "base")
    view = open_checkpoint(tmp_path / "base")
    run(view, tmp_path / "undisturbed")
    assert killed_at(1, 0, view, tmp_path / "out", interrupt) == 0
    assert not (tmp_path / "out" / "calibrate" / ("0" * 32)).exists()
    run(view, tmp_path / "out")
    assert hashes(tmp_path / "out") == hashes(tmp_path / "undisturbed")


def test_prune_removes_what_a_killed_pass_left(tmp_path: Path) -> None:
    view = open_checkpoint(make_checkpoint(tmp_path / "base", "llama", layers=LAYERS))
    killed_at(2, 0, view, tmp_path / "out")
    cache = Cache(tmp_path / "out")
    cache.prune(older_than_days=1)
    (left,) = cache.root.glob("*/*.resume")
    os.utime(left / "journal.jsonl", (0, 0))
    cache.prune(older_than_days=1)
    assert not left.exists()


def test_damaged_leftovers_are_not_gone_on_with(tmp_path: Path) -> None:
    view = open_checkpoint(make_checkpoint(tmp_path / "base", "llama", layers=LAYERS))
    run(view, tmp_path / "undisturbed")
    killed_at(2, 0, view, tmp_path / "out")
    (left,) = (tmp_path / "out" / "calibrate").glob("*.resume")
    (hidden,) = left.glob("files/hidden-0002.bin")
    hidden.write_bytes(hidden.read_bytes()[:-1] + b"x")
    run(view, tmp_path / "out")
    assert hashes(tmp_path / "out") == hashes(tmp_path / "undisturbed")


def test_a_second_build_does_not_wait_for_the_first(tmp_path: Path) -> None:
    view = open_checkpoint(make_checkpoint(tmp_path / "base", "llama"))
    with Cache(tmp_path / "out").writing("calibrate", "0" * 64, resumable=True) as folder:
        run(view, tmp_path / "out", kept=False)
        calibrate(view, samples(9, vocab=370), folder, SILENT, device="cpu", threads=1)
    assert open_calibration(tmp_path / "out" / "calibrate" / ("0" * 32)).names
