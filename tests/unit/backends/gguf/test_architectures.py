"""llama.cpp on our F32 file against transformers: every architecture, and every rope and bias that is let through."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lora2edge.checkpoint import open_checkpoint
from tests.tiny import ARCHES, make_checkpoint
from tests.unit.backends.gguf.lowering import divergence, lower

ROUNDING = 5e-6
"""Keys and values are kept in float16; a wrong graph gives 1e-2 and more."""
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 128,
    "long_factor": [1.0 + 0.3 * i for i in range(8)],
    "short_factor": [1.0 + 0.05 * i for i in range(8)],
}
GEMMA3_ROPES = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-biases-untied": ("llama", {"attention_bias": True, "mlp_bias": True, "tied": False}),
    "llama3-rope-wide-heads": ("llama", {"rope_parameters": LLAMA3, "head_dim": 32}),
    "llama-linear": ("llama", {"rope_parameters": LINEAR, "shards": 3}),
    "qwen2-yarn-untied": ("qwen2", {"rope_parameters": YARN, "tied": False}),
    "qwen3-yarn-factor": ("qwen3", {"rope_parameters": {**YARN, "attention_factor": 1.3}, "head_dim": 32}),
    "gemma3-both-ropes": ("gemma3", {"layers": 7, "rope_parameters": GEMMA3_ROPES}),
    "gemma3-untied-capped": ("gemma3", {"tied": False, "final_logit_softcapping": 20.0}),
    "phi3-partial-rotary": ("phi3", {"partial_rotary_factor": 0.5}),
    "phi3-longrope": ("phi3", {"original_max_position_embeddings": 128, "rope_parameters": LONGROPE}),
}


@pytest.mark.parametrize("arch", ARCHES)
def test_logits_are_those_of_transformers(arch: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "hf", arch)
    lower(open_checkpoint(folder), tmp_path / "out", "f32")
    assert divergence(folder, tmp_path / "out") < ROUNDING


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_are_held_exactly(name: str, tmp_path: Path) -> None:
    arch, config = VARIANTS[name]
    folder = make_checkpoint(tmp_path / "hf", arch, **config)
    lower(open_checkpoint(folder), tmp_path / "out", "f32")
    assert divergence(folder, tmp_path / "out") < ROUNDING


@pytest.mark.parametrize("arch", ["mistral", "phi3"])
def test_a_window_that_llama_cpp_ignores_caps_the_context(arch: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "hf", arch, sliding_window=96)
    lowered = lower(open_checkpoint(folder), tmp_path / "out", "f32")
    assert lowered.notes["context_length"] == 96
    assert "window of 96" in lowered.notes["notes"][0]
    assert divergence(folder, tmp_path / "out", length=96, context=96) < ROUNDING
