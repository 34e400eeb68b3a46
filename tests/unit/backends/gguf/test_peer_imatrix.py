"""The importance matrix against llama-imatrix's on the same tokens; see test_peer.py for how to run it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora2edge.adapters import merge, read_adapter
from lora2edge.backends.gguf import IMATRIX_FILE
from lora2edge.calibration import calibrate
from lora2edge.checkpoint import open_checkpoint
from lora2edge.contracts import Item, Sample
from lora2edge.progress import SILENT
from tests.tiny import QUESTIONS, make_adapter, make_checkpoint
from tests.unit.backends.gguf.lowering import lower

pytestmark = pytest.mark.peer

CHUNK = 64
ITEM = Item(({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}))
WIDE: dict[str, Any] = {"hidden": 256, "intermediate": 512, "heads": 8, "layers": 3}


@pytest.mark.parametrize("arch", ["qwen2", "llama", "qwen3", "phi3", "gemma2", "gemma3"])
def test_the_importance_matrix_is_that_of_llama_imatrix(arch: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = os.environ.get("LLAMA_CPP_TOOLS")
    if not folder:
        pytest.fail("set LLAMA_CPP_TOOLS to the folder that benchmarks/build_peers.sh filled")
    base = make_checkpoint(tmp_path / "base", arch, **WIDE)
    view = merge(open_checkpoint(base), [read_adapter(str(make_adapter(tmp_path / "adapter", base)))])
    lower(view, tmp_path / "f32", "f32")
    text = " ".join(f"{question} {answer}" for question, answer in QUESTIONS * 20)
    (tmp_path / "text").write_text(text, encoding="utf-8")
    command = [Path(folder) / "llama-imatrix", "-m", tmp_path / "f32" / "model.gguf", "-f", tmp_path / "text"]
    command += ["-o", tmp_path / "peer.gguf", "-c", CHUNK, "-b", CHUNK, "-t", 1, "-fa", "off"]
    command += ["-ctk", "f32", "-ctv", "f32"]
    subprocess.run([str(part) for part in command], check=True, capture_output=True)

    tokenizer = AutoTokenizer.from_pretrained(base)
    ids = tokenizer(text).input_ids
    chunks = [ids[start : start + CHUNK] for start in range(0, len(ids) - CHUNK + 1, CHUNK)]
    (tmp_path / "calibration").mkdir()
    texts = [Sample(tuple(chunk), 1, ITEM) for chunk in chunks]
    ours = calibrate(view, texts, tmp_path / "calibration", SILENT, device="cpu", threads=1)
    lower(view, tmp_path / "out", "q4_k_m", ours, rounding="llama.cpp")
    found, expected = read(tmp_path / "out" / IMATRIX_FILE), read(tmp_path / "peer.gguf")
    assert len(expected) > 6 * WIDE["layers"] or arch == "phi3"
    assert set(expected) <= set(found)
    differences = []
    for name, (sums, count) in expected.items():
        own, own_count = found[name]
        assert own_count == count
        differences.append(np.abs(own / sums - 1))
    print(arch, "median", np.median(np.concatenate(differences)), "largest", np.concatenate(differences).max())
    assert np.median(np.concatenate(differences)) <= 1e-4
    assert max(map(np.median, differences)) <= 1e-4


def read(path: Path) -> dict[str, tuple[Any, int]]:
    """Sums and count by tensor."""
    from gguf import GGUFReader

    tensors = {tensor.name: tensor.data for tensor in GGUFReader(path).tensors}
    names = {name.rpartition(".")[0] for name in tensors}
    return {name: (tensors[f"{name}.in_sum2"].ravel(), int(tensors[f"{name}.counts"].ravel()[0])) for name in names}
