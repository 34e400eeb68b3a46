"""Embedding and output head: what the live adapter computes where they are one weight, also by the class alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING

from lora2edge.adapters import merge, read_adapter
from lora2edge.adapters.heads import LAYOUTS
from lora2edge.checkpoint import open_checkpoint
from lora2edge.checkpoint.tying import TIED, UNTIED, says_tied
from lora2edge.errors import AdapterError, CheckpointError
from tests.architectures import ARCHITECTURES
from tests.tiny import make_adapter, make_checkpoint
from tests.unit.adapters.test_merge import assert_same_as_live

TOKENS = [3, 5, 99, 300]


def edit_base(base: Path, *without: str, head: str = "") -> Path:
    """`without`: keys of config.json. `head`: "copy" of the embedding or "other"."""
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({key: config[key] for key in config if key not in without}))
    weights = load_file(base / "model.safetensors")
    embedding = weights["model.embed_tokens.weight"]
    if head:
        other = torch.randn(embedding.shape, generator=torch.Generator().manual_seed(3)) * embedding.std()
        weights["lm_head.weight"] = embedding.clone() if head == "copy" else other
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    return base


@pytest.mark.parametrize("arch", ["qwen2", "gemma2", "gemma3"])
@pytest.mark.parametrize("head", ["", "copy"])
@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"lora_bias": False, "rank_pattern": {"lm_head": 2}}])
def test_lora_on_a_head_that_has_trained_tokens_too(
    arch: str, head: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    """Live, the head is a LoRA over the one weight with the trained tokens in it."""
    base = edit_base(make_checkpoint(tmp_path / "base", arch, dtype="float32", tied=True), head=head)
    adapter = make_adapter(
        tmp_path / "adapter",
        base,
        targets=["q_proj", "lm_head"],
        trainable_token_indices=TOKENS,
        strength=0.3,
        **settings,
    )
    view = assert_same_as_live(base, adapter, tmp_path / "out")
    assert view.config["tie_word_embeddings"] is False
    embedding, head_rows = view.rows("model.embed_tokens.weight", 3, 4), view.rows("lm_head.weight", 3, 4)
    assert abs(embedding - head_rows).max() > 1e-3


def test_dora_on_a_head_that_has_trained_tokens_too(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base", "qwen2", dtype="float32", tied=True)
    adapter = make_adapter(
        tmp_path / "adapter", base, targets=["q_proj", "lm_head"], trainable_token_indices=TOKENS, use_dora=True
    )
    with pytest.raises(AdapterError) as error:
        merge(open_checkpoint(base), [read_adapter(adapter)])
    assert error.value.code == "adapter-tie-ambiguous"


@pytest.mark.parametrize("head", ["copy", "other"])
@pytest.mark.parametrize(
    ("arch", "without"),
    [("qwen2", ""), ("llama", ""), ("gemma2", "tie_word_embeddings"), ("gemma3", "tie_word_embeddings")],
)
def test_tokens_of_a_head_that_is_stored(arch: str, without: str, head: str, tmp_path: Path) -> None:
    """PEFT goes by config.json, and by the class where that is silent: the head's tokens follow."""
    base = edit_base(make_checkpoint(tmp_path / "base", arch, dtype="float32", tied=True), without, head=head)
    adapter = make_adapter(tmp_path / "adapter", base, trainable_token_indices=TOKENS, strength=0.3)
    assert_same_as_live(base, adapter, tmp_path / "out")


@pytest.mark.parametrize("head", ["", "copy", "other"])
@pytest.mark.parametrize(
    "settings", [{"targets": ["embed_tokens", "q_proj"]}, {"modules_to_save": ["lm_head"]}], ids=str
)
def test_a_class_that_is_tied_by_itself_is_untied_in_words(settings: dict[str, Any], head: str, tmp_path: Path) -> None:
    """transformers 4 and vLLM would tie what config.json says nothing about."""
    base = make_checkpoint(tmp_path / "base", "gemma2", dtype="float32", tied=True)
    edit_base(base, "tie_word_embeddings", head=head)
    adapter = make_adapter(tmp_path / "adapter", base, **settings)
    view = assert_same_as_live(base, adapter, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    assert "lm_head.weight" in view.tensors


@pytest.mark.parametrize("kind", sorted(TIED | UNTIED))
def test_what_transformers_ties_by_itself(kind: str) -> None:
    assert CONFIG_MAPPING[kind]().tie_word_embeddings is (kind in TIED) is not (kind in UNTIED)
    assert says_tied({"model_type": kind}) is (kind in TIED)
    assert says_tied({"model_type": kind, "tie_word_embeddings": kind in UNTIED}) is (kind in UNTIED)


def test_the_architectures_that_are_tested_are_known() -> None:
    tested = {getattr(__import__("transformers"), each.config_class).model_type for each in ARCHITECTURES.values()}
    encoders = {"bert", "roberta", "xlm-roberta", "electra", "deberta-v2", "distilbert", "t5"}
    assert (tested | LAYOUTS.keys()) - encoders <= TIED | UNTIED


@pytest.mark.parametrize("arch", ["qwen2", "llama"])
def test_a_head_that_is_nowhere(arch: str, tmp_path: Path) -> None:
    """By its class it is not tied, and each load would draw another one."""
    base = make_checkpoint(tmp_path / "base", arch, tied=True)
    assert open_checkpoint(base)
    edit_base(base, "tie_word_embeddings")
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(base)
    assert error.value.code == "missing-tensor"
    assert f"false for {arch}" in error.value.why
