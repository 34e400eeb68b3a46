"""One tiny decoder as ONNX artifacts, for all tests of ONNX Runtime's side."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import onnxruntime
import pytest

from lora2edge.contracts import Manifest
from lora2edge.graph.builder import BlockFormat
from lora2edge.storage import sha256_file
from tests.tiny import make_checkpoint
from tests.unit.backends.onnxruntime.plain_graph import write_qwen2
from tests.unit.graph.decoders import lower

Copy = Callable[[], Path]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("qwen2") / "checkpoint", "qwen2", dtype="float32")


@pytest.fixture(scope="session")
def decoder(checkpoint: Path) -> Path:
    """Float32, with the checkpoint's own JSON files."""
    return _artifact(lower(checkpoint, checkpoint.parent / "decoder").folder, checkpoint)


@pytest.fixture(scope="session")
def int4_decoder(checkpoint: Path) -> Path:
    lowered = lower(checkpoint, checkpoint.parent / "int4", BlockFormat(4, 32), accuracy_level=4)
    return _artifact(lowered.folder, checkpoint)


@pytest.fixture(scope="session")
def foreign_decoder(checkpoint: Path) -> Path:
    """A graph that gives all logits."""
    return write_qwen2(checkpoint, checkpoint.parent / "foreign")


@pytest.fixture
def int4_copy(int4_decoder: Path, tmp_path: Path) -> Path:
    """An artifact that a test may damage, with a manifest."""
    folder = tmp_path / "artifact"
    shutil.copytree(int4_decoder, folder)
    write_manifest(folder)
    return folder


def write_manifest(folder: Path, backend: str = "onnxruntime") -> None:
    files = {path.name: sha256_file(path) for path in folder.iterdir() if path.is_file()}
    options = {"name": f"{backend}/tiny", "backend": backend, "precision": "q8_0"}
    manifest = Manifest(1, f"{backend}/tiny", backend, "causal-lm", "key", {}, options, {}, files)
    (folder / "manifest.json").write_text(manifest.to_json())


def _artifact(folder: Path, checkpoint: Path) -> Path:
    for path in checkpoint.iterdir():
        if path.suffix in {".json", ".jinja"}:
            shutil.copy(path, folder)
    (folder / "genai_config.json").unlink()
    (folder / "journal.jsonl").unlink(missing_ok=True)
    assert json.loads((folder / "config.json").read_text())["max_position_embeddings"] == 512
    return folder


@pytest.fixture
def without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """onnxruntime as it is on the CPU, also where a GPU's build is installed."""
    found = [name for name in onnxruntime.get_available_providers() if name != "CUDAExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: found)
