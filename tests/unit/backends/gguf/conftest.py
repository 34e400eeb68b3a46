"""One tiny checkpoint and its GGUF file for all tests of llama.cpp's side."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny import make_checkpoint
from tests.unit.backends.gguf.plain_gguf import write_qwen2


@pytest.fixture(scope="session")
def qwen2_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("qwen2") / "checkpoint", "qwen2", dtype="float32")


@pytest.fixture(scope="session")
def qwen2_gguf(qwen2_checkpoint: Path) -> Path:
    return write_qwen2(qwen2_checkpoint, qwen2_checkpoint.parent / "model.gguf")
