"""Embedding and output head: what the live adapter computes where they are one weight, also by the class alone."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from lora2edge.adapters import merge, read_adapter
from lora2edge.adapters.heads import LAYOUTS
from lora2edge.backends.hf.write import write_checkpoint
from lora2edge.checkpoint import open_checkpoint
from lora2edge.checkpoint.tying import TIED, UNTIED, says_tied
from lora2edge.errors import AdapterError, CheckpointError
from lora2edge.progress import SILENT
from tests.architectures import ARCHITECTURES, make_model
from tests.tiny import make_adapter, make_checkpoint, shake_adapter
from tests.unit.adapters.test_merge import assert_same_as_live

TOKENS = [3, 5, 99, 300]
ALONG = (
    "embed_tokens.weight",
    "wte.weight",
    "embeddings.weight",
    "embed_in.weight",
    "shared.weight",
    "base_layer.weight",
    "lm_head.weight",
)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """PEFT draws lora_A."""
    torch.manual_seed(0)


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
    adapter = make_adapter(tmp_path / "adapter", base, trainable_token_indices=TOKENS)
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


SAVED_ALONG = ["llama", "qwen2", "gpt2", "gpt_neox", "bert", "roberta", "deberta-v2", "t5"]
WITH_TOKENS = [name for name in SAVED_ALONG if name != "t5"]
"""T5's are trained on a module that only lends its weight: test_tasks.py has them."""
IDS = torch.tensor([[5, 30, 77, 40, 12, 9, 60, 33, 3, 41, 150, 7]])


def logits_of(model: Any) -> torch.Tensor:
    inputs = {"input_ids": IDS, **({"decoder_input_ids": IDS[:, :7]} if model.config.is_encoder_decoder else {})}
    with torch.no_grad():
        return model.eval()(**inputs).logits


@pytest.mark.parametrize("changed", [False, True], ids=["as-in-the-base", "changed"])
@pytest.mark.parametrize(("name", "tokens"), [(name, False) for name in SAVED_ALONG] + [(n, True) for n in WITH_TOKENS])
def test_embeddings_that_were_saved_along(name: str, tokens: bool, changed: bool, tmp_path: Path) -> None:
    """`save_embedding_layers=True`: PEFT loads what the file holds, whatever the base has."""
    architecture = ARCHITECTURES[name]
    model = make_model(architecture, tmp_path / "base")
    layers = list(architecture.layers)
    indices = {architecture.embedding: TOKENS} if tokens else None
    config = LoraConfig(r=4, task_type=architecture.task, target_modules=layers, trainable_token_indices=indices)
    peft_model = get_peft_model(copy.deepcopy(model), config)
    shake_adapter(peft_model)
    peft_model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    if changed:
        file = tmp_path / "adapter" / "adapter_model.safetensors"
        weights = load_file(file)
        embeddings = [
            key for key in weights if key.endswith(ALONG) and weights[key].shape[0] == model.config.vocab_size
        ]
        assert embeddings
        save_file({key: weights[key] * (1.5 if key in embeddings else 1) for key in weights}, file)
    live = logits_of(PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "adapter"))
    view = merge(open_checkpoint(tmp_path / "base"), [read_adapter(tmp_path / "adapter")])
    (tmp_path / "out").mkdir()
    write_checkpoint(view, tmp_path / "out", SILENT)
    merged = logits_of(type(model).from_pretrained(tmp_path / "out", dtype=torch.float32))
    assert (live - logits_of(model)).abs().max() > 1e-3 * live.abs().max(), "the adapter does nothing"
    assert (live - merged).abs().max() <= 1e-5 * live.abs().max()


def test_tokens_of_a_tied_weight_that_was_saved_along(tmp_path: Path) -> None:
    """The file says once what the one weight is, and once which of its rows were trained: both ends have both."""
    base = make_checkpoint(tmp_path / "base", "qwen2", dtype="float32", tied=True)
    adapter = make_adapter(tmp_path / "adapter", base, trainable_token_indices=TOKENS)
    file = adapter / "adapter_model.safetensors"
    name = "base_model.model.model.embed_tokens.token_adapter.base_layer.weight"
    embedding = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    save_file({**load_file(file), name: embedding * 1.5}, file)
    view = assert_same_as_live(base, adapter, tmp_path / "out")
    assert "lm_head.weight" not in view.tensors


TYING: list[dict[str, Any]] = [
    {"targets": ["q_proj", "embed_tokens"], "rank_pattern": {"embed_tokens": 2}},
    {"targets": ["q_proj", "embed_tokens"], "rank_pattern": {"embed_tokens": 2, "lm_head": 2}},
    {"targets": ["q_proj", "embed_tokens"], "rank_pattern": {"embed_tokens": 2}, "use_rslora": True},
    {"targets": ["q_proj", "embed_tokens"], "rank_pattern": {"lm_head": 2}},
    {"targets": ["q_proj", "embed_tokens"], "alpha_pattern": {"embed_tokens": 3}},
    {"targets": ["q_proj", "lm_head"], "rank_pattern": {"lm_head": 2}},
    {"targets": ["q_proj", "lm_head", "embed_tokens"], "alpha_pattern": {"lm_head": 3}},
    {"targets": ["q_proj", "embed_tokens"], "use_dora": True},
]


@pytest.mark.parametrize("arch", ["qwen2", "gemma2"])
@pytest.mark.parametrize("settings", TYING, ids=str)
def test_one_pair_for_both_ends(settings: dict[str, Any], arch: str, tmp_path: Path) -> None:
    """`ensure_weight_tying`: PEFT shares the factors and goes by the patterns of each end for its scale."""
    base = make_checkpoint(tmp_path / "base", arch, dtype="float32", tied=True)
    adapter = make_adapter(tmp_path / "adapter", base, ensure_weight_tying=True, strength=0.3, **settings)
    assert_same_as_live(base, adapter, tmp_path / "out")


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("entry", ["lm_head", "embed_tokens"])
def test_an_end_that_was_trained_whole_and_saved_along(entry: str, tied: bool, tmp_path: Path) -> None:
    """PEFT saves it three times: as it was trained, the same again, and as the base has it."""
    base = make_checkpoint(tmp_path / "base", "qwen2", dtype="float32", tied=tied)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=[entry], task_type="CAUSAL_LM")
    peft_model = get_peft_model(model, config)
    shake_adapter(peft_model, 0.3)
    adapter = tmp_path / "adapter"
    peft_model.save_pretrained(adapter, save_embedding_layers=True)
    weights = load_file(adapter / "adapter_model.safetensors")
    again = [name for name in weights if ".original_module." in name or ".modules_to_save." in name]
    assert len(again) == 2
    assert_same_as_live(base, adapter, tmp_path / "out")
    for name in again:
        save_file({**weights, name: weights[name] * 1.5}, adapter / "adapter_model.safetensors")
        with pytest.raises(AdapterError, match=re.escape(name)) as error:
            merge(open_checkpoint(base), [read_adapter(adapter)])
        assert error.value.code == "adapter-shape"
