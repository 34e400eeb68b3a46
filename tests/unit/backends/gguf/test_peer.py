"""Tensors against llama.cpp's own tools: `benchmarks/build_peers.sh OUT`, then `LLAMA_CPP_TOOLS=OUT pytest -m peer`."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from lora2edge.adapters import merge, read_adapter
from lora2edge.backends.gguf.container import read_header
from lora2edge.backends.gguf.mix import FILE_TYPES
from lora2edge.checkpoint import open_checkpoint
from tests.tiny import make_adapter, make_checkpoint
from tests.unit.backends.gguf.lowering import RandomStatistics, lower

pytestmark = pytest.mark.peer

WIDE: dict[str, Any] = {"hidden": 256, "intermediate": 512, "heads": 8}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("qwen2", {**WIDE, "layers": 4, "kv_heads": 2}),
    "qwen2-96": ("qwen2", {"hidden": 96, "intermediate": 160, "layers": 9, "kv_heads": 1, "tied": False}),
    "llama": ("llama", {**WIDE, "layers": 18, "kv_heads": 4, "tied": False}),
    "llama-80-layers": ("llama", {**WIDE, "intermediate": 256, "layers": 80, "kv_heads": 1}),
    "qwen3": ("qwen3", {**WIDE, "layers": 9, "kv_heads": 4, "tied": False}),
    "gemma2": ("gemma2", {**WIDE, "layers": 3, "kv_heads": 4}),
    "gemma3": ("gemma3", {**WIDE, "layers": 7, "kv_heads": 1}),
    "phi3": ("phi3", {**WIDE, "layers": 9, "kv_heads": 2}),
}


@pytest.fixture(scope="module")
def quantize() -> Path:
    folder = os.environ.get("LLAMA_CPP_TOOLS")
    if not folder:
        pytest.fail("set LLAMA_CPP_TOOLS to the folder that benchmarks/build_peers.sh filled")
    return Path(folder) / "llama-quantize"


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", MODELS)
def test_tensors_are_those_of_llama_quantize(quantize: Path, name: str, tmp_path: Path) -> None:
    arch, settings = MODELS[name]
    base = make_checkpoint(tmp_path / "base", arch, **settings)
    view = merge(open_checkpoint(base), [read_adapter(str(make_adapter(tmp_path / "adapter", base)))])
    lower(view, tmp_path / "f32", "f32")
    for file_type in FILE_TYPES.values():
        for imatrix in (False, True) if file_type.default not in {"F32", "F16", "BF16"} else (False,):
            out = tmp_path / f"{file_type.name}-{imatrix}"
            lower(view, out, file_type.name.lower(), RandomStatistics(view) if imatrix else None, imatrix=imatrix)
            command = [str(quantize), *(["--imatrix", str(out / "imatrix.gguf")] if imatrix else [])]
            command += [str(tmp_path / "f32" / "model.gguf"), str(out / "peer.gguf"), file_type.name, "2"]
            subprocess.run(command, check=True, capture_output=True)
            assert tensors(out / "model.gguf") == tensors(out / "peer.gguf"), f"{file_type.name}, imatrix {imatrix}"


def tensors(path: Path) -> list[tuple[str, str, tuple[int, ...], bytes]]:
    """Name, type, shape and bytes of every tensor, in the file's order."""
    data = path.read_bytes()
    return [
        (item.name, item.type, item.shape, data[item.offset : item.offset + item.size_bytes])
        for item in read_header(path).values()
    ]
