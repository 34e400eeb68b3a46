"""The tiny bases that adapters of every kind are put on."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import GPT2Config, GPT2LMHeadModel

from tests.tiny import make_checkpoint, randomize


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen2: biases on q, k and v; widths of 64, 32 and 96, and its head is a matrix of its own."""
    folder = tmp_path_factory.mktemp("kinds") / "qwen2"
    return make_checkpoint(folder, "qwen2", dtype="float32", tied=False, hidden=64, intermediate=96)


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Linear layers that are stored `[in, out]`, all with biases."""
    folder = tmp_path_factory.mktemp("kinds") / "gpt2"
    config = GPT2Config(
        vocab_size=768, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=None, eos_token_id=None
    )
    model = GPT2LMHeadModel(config)
    randomize(model, 0)
    model.save_pretrained(folder)
    return folder
