"""Sessions of models whose angles change with the length (LongRoPE): what transformers' generation gives."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from lora2edge.backends.onnxruntime import engine
from lora2edge.backends.onnxruntime import session as session_module
from lora2edge.backends.onnxruntime.session import OnnxSession, open_session
from tests.tiny import make_checkpoint
from tests.unit.graph.decoders import lower

SWITCH, MOST = 64, 300


@pytest.fixture(scope="module", params=["phi3", "qwen2"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, OnnxSession]]:
    """Phi-3's generation fills its cache again at the switch; no other family's does."""
    root = tmp_path_factory.mktemp("longrope")
    rope = {
        "rope_type": "longrope",
        "short_factor": [1.0 + 0.1 * index for index in range(8)],
        "long_factor": [2.0 + 0.3 * index for index in range(8)],
    }
    base = make_checkpoint(
        root / "base",
        request.param,
        dtype="float32",
        rope_parameters=rope,
        original_max_position_embeddings=SWITCH,
    )
    lower(base, root / "onnx")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager").eval()
    with open_session(root / "onnx", device="cpu", threads=1, slots=3, max_length=MOST) as session:
        yield model, session


def prompt(length: int) -> list[int]:
    return np.random.default_rng(length).integers(0, 700, length).tolist()


def generated(model: Any, ids: list[int], count: int) -> list[int]:
    found = model.generate(
        torch.tensor([ids]), max_new_tokens=count, min_new_tokens=count, do_sample=False, eos_token_id=None
    )
    return found[0, len(ids) :].tolist()


def test_answers_that_grow_past_the_switch(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone and beside each other; prompts before, at and behind it, and longer than a chunk."""
    monkeypatch.setitem(engine.CHUNK_TOKENS, "cpu", 32)
    model, session = made
    lengths = (40, 62, 63, 64, 65, 66, 200)
    expected = [generated(model, prompt(length), 30) for length in lengths]
    assert [list(session.generate(prompt(length), max_new=30, stop=[])) for length in lengths] == expected
    with ThreadPoolExecutor(len(lengths)) as pool:
        found = list(pool.map(lambda length: list(session.generate(prompt(length), max_new=30, stop=[])), lengths))
    assert found == expected


def test_scores_of_long_texts(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in chunks: the first ones would be turned by the short factors."""
    model, session = made
    monkeypatch.setattr(session_module, "BATCH_TOKENS", 50)
    for length in (60, 64, 65, 200):
        ids = prompt(length)
        with torch.no_grad():
            expected = model(torch.tensor([ids])).logits[0].numpy()
        (found,) = session.logits([ids], [range(length)])
        assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()
