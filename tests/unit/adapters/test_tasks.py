"""Encoder-decoders and classifiers: what they share, and `lora2edge merge` of them, against PEFT's live model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BertForSequenceClassification,
    MT5ForConditionalGeneration,
    T5ForConditionalGeneration,
)

from lora2edge.adapters import merge, read_adapter
from lora2edge.checkpoint import open_checkpoint
from lora2edge.errors import AdapterError, CheckpointError, InputError, Refusals
from lora2edge.progress import SILENT
from lora2edge.recipe import Recipe
from lora2edge.survey import survey_build
from lora2edge.target import load_target
from lora2edge.verbs import merge_to
from tests.architectures import ARCHITECTURES, make_model
from tests.tiny import make_checkpoint, make_data, shake_adapter

IDS = torch.tensor([[5, 30, 77, 40, 12, 9, 60, 33, 3, 41, 150, 7]])
TOLERANCE = 1e-5
"""Of the largest logit."""
CLASSES = {"t5": T5ForConditionalGeneration, "mt5": MT5ForConditionalGeneration, "bert": BertForSequenceClassification}


def logits(folder: Path, model_class: Any, adapter: Path | None = None) -> torch.Tensor:
    model = model_class.from_pretrained(folder, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    inputs = {"input_ids": IDS}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = IDS[:, :7]
    with torch.no_grad():
        return model.eval()(**inputs).logits


def save_adapter(base: Path, folder: Path, name: str, **settings: Any) -> Path:
    """Of the architecture `name`, every trained parameter moved away from its start."""
    architecture = ARCHITECTURES[name.removeprefix("m")]
    settings = {"target_modules": list(architecture.layers), **settings}
    config = LoraConfig(r=4, lora_alpha=6, task_type=architecture.task, **settings)
    peft = get_peft_model(CLASSES[name].from_pretrained(base, dtype=torch.float32), config)
    shake_adapter(peft)
    peft.save_pretrained(folder)
    return folder


def merge_here(base: Path, adapter: Path, out: Path) -> dict[str, Any]:
    return merge_to(Recipe(base=str(base), adapter=str(adapter)), out, prove=False, force=False, progress=SILENT)


def assert_same_as_live(base: Path, adapter: Path, out: Path, model_class: Any) -> set[str]:
    """Writes the merged folder; the names of its tensors."""
    merge_here(base, adapter, out)
    live = logits(base, model_class, adapter)
    assert (live - logits(base, model_class)).abs().max() > 1e-3, "the adapter does nothing"
    assert (live - logits(out, model_class)).abs().max() <= TOLERANCE * live.abs().max()
    return set(load_file(out / "model.safetensors"))


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As T5 1.0: one weight for encoder, decoder and head, stored once."""
    base = tmp_path_factory.mktemp("t5") / "base"
    make_model(ARCHITECTURES["t5"], base)
    return base


@pytest.fixture(scope="module")
def t5_v1_1(t5: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A head of its own, whose inputs are not scaled: config.json says both with `tie_word_embeddings`."""
    base = tmp_path_factory.mktemp("t5") / "v1_1"
    base.mkdir()
    for file in t5.iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    config = {key: value for key, value in read_config(t5).items() if key != "scale_decoder_outputs"}
    (base / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    store(base, **{"lm_head.weight": torch.randn(384, 32, generator=torch.Generator().manual_seed(3))})
    return base


def read_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def store(base: Path, **tensors: torch.Tensor) -> None:
    weights = {**load_file(base / "model.safetensors"), **tensors}
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})


def test_mt5(tmp_path: Path) -> None:
    """Its head's inputs are never scaled."""
    make_model(
        replace(ARCHITECTURES["t5"], model_class="MT5ForConditionalGeneration", config_class="MT5Config"),
        tmp_path / "base",
    )
    adapter = save_adapter(tmp_path / "base", tmp_path / "adapter", "mt5", target_modules=["q", "lm_head"])
    assert_same_as_live(tmp_path / "base", adapter, tmp_path / "out", MT5ForConditionalGeneration)


@pytest.mark.parametrize("name", ["t5", "bert"])
def test_merge_writes_what_the_live_model_answers(name: str, tmp_path: Path) -> None:
    make_model(ARCHITECTURES[name], tmp_path / "base")
    adapter = save_adapter(tmp_path / "base", tmp_path / "adapter", name)
    assert_same_as_live(tmp_path / "base", adapter, tmp_path / "out", CLASSES[name])


STACKS = {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}
UNTIED: dict[str, tuple[dict[str, Any], set[str]]] = {
    "linear": ({}, set()),
    "both-stacks": ({"target_modules": ["embed_tokens"]}, STACKS),
    "encoder": ({"target_modules": ["encoder.embed_tokens", "q"]}, {"encoder.embed_tokens.weight"}),
    "head": ({"target_modules": ["lm_head", "q"]}, {"lm_head.weight"}),
    "saved-head": ({"modules_to_save": ["lm_head"]}, {"lm_head.weight"}),
    "all-three": ({"target_modules": ["embed_tokens", "lm_head"]}, {*STACKS, "lm_head.weight"}),
    "tokens": ({"trainable_token_indices": [5, 77]}, set()),
    "tokens-of-stacks": ({"trainable_token_indices": {"embed_tokens": [5, 77]}}, STACKS),
    "tokens-by-name": ({"trainable_token_indices": {"shared": [5, 77]}}, set()),
}


@pytest.mark.parametrize("kind", UNTIED)
def test_t5_is_untied_where_the_live_model_is(kind: str, t5: Path, tmp_path: Path) -> None:
    settings, expected = UNTIED[kind]
    adapter = save_adapter(t5, tmp_path / "adapter", "t5", **settings)
    names = assert_same_as_live(t5, adapter, tmp_path / "out", T5ForConditionalGeneration)
    assert names - set(load_file(t5 / "model.safetensors")) == expected
    config = read_config(tmp_path / "out")
    assert config["tie_word_embeddings"] is ("lm_head.weight" not in expected)
    assert config["scale_decoder_outputs"] is True


@pytest.mark.parametrize("kind", UNTIED)
def test_t5_with_a_head_of_its_own(kind: str, t5_v1_1: Path, tmp_path: Path) -> None:
    settings, expected = UNTIED[kind]
    adapter = save_adapter(t5_v1_1, tmp_path / "adapter", "t5", **settings)
    names = assert_same_as_live(t5_v1_1, adapter, tmp_path / "out", T5ForConditionalGeneration)
    assert names - set(load_file(t5_v1_1 / "model.safetensors")) == expected - {"lm_head.weight"}
    assert read_config(tmp_path / "out")["tie_word_embeddings"] is False
    assert not T5ForConditionalGeneration.from_pretrained(tmp_path / "out").config.scale_decoder_outputs


@pytest.mark.parametrize("kind", ["linear", "head", "encoder", "tokens", "all-three"])
def test_t5_that_stores_every_copy(kind: str, t5: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for file in t5.iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    shared = load_file(base / "model.safetensors")["shared.weight"]
    store(base, **{name: shared.clone() for name in (*STACKS, "lm_head.weight")})
    adapter = save_adapter(base, tmp_path / "adapter", "t5", **UNTIED[kind][0])
    assert_same_as_live(base, adapter, tmp_path / "out", T5ForConditionalGeneration)


def test_a_merged_t5_is_a_base_again(t5: Path, tmp_path: Path) -> None:
    first = save_adapter(t5, tmp_path / "first", "t5", target_modules=["encoder.embed_tokens", "lm_head"])
    assert_same_as_live(t5, first, tmp_path / "once", T5ForConditionalGeneration)
    second = save_adapter(tmp_path / "once", tmp_path / "second", "t5", target_modules=["embed_tokens", "q"])
    assert_same_as_live(tmp_path / "once", second, tmp_path / "twice", T5ForConditionalGeneration)


@pytest.mark.parametrize("settings", [{"target_modules": ["shared", "q"]}, {"modules_to_save": ["shared"]}])
def test_what_the_live_model_does_not_compute_with(settings: dict[str, Any], t5: Path, tmp_path: Path) -> None:
    adapter = save_adapter(t5, tmp_path / "adapter", "t5", **settings)
    with pytest.raises(AdapterError, match=r"shared\.weight") as error:
        merge(open_checkpoint(t5), [read_adapter(adapter)])
    assert error.value.code == "adapter-without-effect"


def test_tokens_of_the_shared_weight_beside_a_stack_of_its_own(t5: Path, tmp_path: Path) -> None:
    adapter = save_adapter(t5, tmp_path / "adapter", "t5", target_modules=["q"], trainable_token_indices=[5, 77])
    weights = load_file(adapter / "adapter_model.safetensors")
    weights["base_model.model.lm_head.weight"] = torch.ones(384, 32)
    save_file(weights, adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "modules_to_save": ["lm_head"]}))
    with pytest.raises(AdapterError, match="tied") as error:
        merge(open_checkpoint(t5), [read_adapter(adapter)])
    assert error.value.code == "adapter-tie-ambiguous"


@pytest.mark.parametrize("lost", ["shared.weight", "lm_head.weight"])
def test_a_t5_that_lacks_an_end(lost: str, t5_v1_1: Path, tmp_path: Path) -> None:
    for file in t5_v1_1.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    del weights[lost]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(tmp_path)
    assert error.value.code == "missing-tensor"


def test_models_that_see_are_no_encoder_decoders_of_text(t5: Path, tmp_path: Path) -> None:
    for file in t5.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text(
        json.dumps({**read_config(t5), "architectures": ["Gemma3ForConditionalGeneration"]})
    )
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(tmp_path)
    assert error.value.code == "unknown-task"


def test_an_adapter_of_another_task(t5: Path, tmp_path: Path) -> None:
    adapter = save_adapter(t5, tmp_path / "adapter", "t5")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "task_type": "CAUSAL_LM"}))
    with pytest.raises(AdapterError) as error:
        merge(open_checkpoint(t5), [read_adapter(adapter)])
    assert error.value.code == "adapter-other-task"


@pytest.mark.parametrize(
    ("name", "target", "code"),
    [
        ("t5", "hf/merged", "task"),
        ("t5", "gguf/q8_0", "gguf-task"),
        ("bert", "hf/merged", "bad-line"),  # prompts and responses are no data for a classifier
        ("bert", "gguf/q8_0", "gguf-task"),
    ],
)
def test_what_cannot_be_measured_or_lowered_is_refused(name: str, target: str, code: str, tmp_path: Path) -> None:
    make_model(ARCHITECTURES[name], tmp_path / "base")
    data = str(make_data(tmp_path / "data.jsonl"))
    refusals = survey_build(Recipe(base=str(tmp_path / "base"), data=data), [load_target(target)]).refusals
    codes = [error.code for error in refusals]
    assert ("task" if name == "t5" else "bad-line") in codes
    assert code in codes
    assert len(set(codes)) == len(codes), "each told once"
    with pytest.raises((InputError, Refusals)):
        merge_to(
            Recipe(base=str(tmp_path / "base"), data=data), tmp_path / "out", prove=True, force=False, progress=SILENT
        )
    assert not (tmp_path / "out").exists()


def test_tokens_go_with_a_head_that_only_config_json_calls_tied(tmp_path: Path) -> None:
    """PEFT goes by config.json: it writes the trained rows into a stored head that transformers does not tie."""
    base = make_checkpoint(tmp_path / "base", "qwen2", dtype="float32", tied=True)
    store(base, **{"lm_head.weight": load_file(base / "model.safetensors")["model.embed_tokens.weight"] * 1.1})
    model = AutoModelForCausalLM.from_pretrained(base)
    peft = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[5, 30]))
    shake_adapter(peft)
    peft.save_pretrained(tmp_path / "adapter")
    assert_same_as_live(base, tmp_path / "adapter", tmp_path / "out", AutoModelForCausalLM)
