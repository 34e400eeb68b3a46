"""Modules that the file lacks: PEFT's own rule of which module has an adapter, and what is refused by it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists
from safetensors.torch import load_file, save_file

from lora2edge.adapters import merge, read_adapter
from lora2edge.adapters.targets import is_target
from lora2edge.checkpoint import open_checkpoint
from lora2edge.errors import AdapterError
from tests.architectures import ARCHITECTURES, KINDS, make_model
from tests.unit.adapters.kinds.live import edit, edit_config

MODULES = [
    *(f"model.layers.{i}.{m}" for i in (0, 1, 11) for m in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj")),
    *(f"model.layers.{i}.mlp.experts.{e}.up_proj" for i in (0, 1) for e in (0, 1)),
    *(f"transformer.h.{i}.attn.c_attn" for i in (0, 1)),
    *(f"{side}.block.{i}.layer.0.SelfAttention.q" for side in ("encoder", "decoder") for i in (0, 1)),
    "h.0.attn.c_attn", "lm_head", "model.embed_tokens", "model.my_q_proj", "q_proj", "score.dense",
    "classifier", "classifier.dense",
]  # fmt: skip
RULES: list[dict[str, Any]] = [
    {"target_modules": ["q_proj", "up_proj"]},
    {"target_modules": ["self_attn.q_proj"]},
    {"target_modules": ["model.layers.1.mlp.up_proj", "c_attn", "q"]},
    {"target_modules": ["q_proj", "lm_head", "embed_tokens", "dense"], "modules_to_save": ["classifier", "score"]},
    {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": 0},
    {"target_modules": ["q_proj"], "layers_to_transform": []},
    {"target_modules": ["model.layers.0.self_attn.q_proj", "k_proj"], "layers_to_transform": [1, 11]},
    {"target_modules": ["q_proj", "c_attn", "q"], "layers_to_transform": [0], "layers_pattern": "layers"},
    {"target_modules": ["q_proj", "c_attn", "q"], "layers_to_transform": [0], "layers_pattern": ["h", "block"]},
    {"target_modules": ["q_proj", "c_attn"], "layers_to_transform": [0], "layers_pattern": []},
    {"target_modules": ["up_proj"], "layers_to_transform": [1], "layers_pattern": ["experts"]},
    {"target_modules": r".*\.1\..*(q|up)_proj"},
    {"target_modules": r"model\.layers\.\d+\.mlp.*"},
    {"target_modules": ["q_proj", "up_proj"], "exclude_modules": ["model.layers.0.self_attn.q_proj", "up_proj"]},
    {"target_modules": ["q_proj", "up_proj"], "exclude_modules": r".*layers\.1.*"},
    {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head", "mlp"]},
    {"target_modules": []},
]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_the_rule_is_that_of_peft(rule: dict[str, Any]) -> None:
    config = LoraConfig(**rule)
    for module in MODULES:
        found = check_target_module_exists(config, module)
        expected = bool(found) and not isinstance(found, _ExcludedModule)
        assert is_target(rule, module) is expected, module


def make(folder: Path, name: str, config: peft.PeftConfig) -> tuple[Path, Path]:
    model = make_model(ARCHITECTURES[name], folder / "base")
    get_peft_model(model, config).save_pretrained(folder / "adapter")
    return folder / "base", folder / "adapter"


def drop(adapter: Path, part: str) -> None:
    """Takes everything away whose name holds `part`."""
    before = len(load_file(adapter / "adapter_model.safetensors"))
    edit(adapter, lambda tensors: [tensors.pop(key) for key in list(tensors) if part in key])
    assert 0 < len(load_file(adapter / "adapter_model.safetensors")) < before


def refused(base: Path, adapter: Path) -> AdapterError:
    with pytest.raises(AdapterError) as error:
        merge(open_checkpoint(base), [read_adapter(adapter)])
    assert error.value.code == "adapter-incomplete", error.value
    return error.value


@pytest.mark.parametrize("kind", ["LoRA", "DoRA", "LoHa", "LoKr", "IA³", "OFT", "BOFT", "VeRA"])
def test_a_module_of_one_layer(kind: str, tmp_path: Path) -> None:
    base, adapter = make(tmp_path, "llama", KINDS[kind](ARCHITECTURES["llama"]))
    drop(adapter, "layers.1.self_attn.q_proj")
    assert "model.layers.1.self_attn.q_proj" in refused(base, adapter).what
    with pytest.warns(UserWarning, match="missing adapter keys"):  # PEFT goes on
        peft.PeftModel.from_pretrained(make_model(ARCHITECTURES["llama"], tmp_path / "again"), adapter)


@pytest.mark.parametrize(
    ("name", "lost"),
    [
        ("gpt2", "h.0.attn.c_attn"),
        ("gpt_neox", "layers.1.attention.dense"),
        ("bert", "layer.0.attention.self.key"),
        ("t5", "decoder.block.1.layer.1.EncDecAttention.k"),
        ("mixtral", "layers.0.self_attn.q_proj"),
        ("phi3", "layers.1.mlp.gate_up_proj"),
    ],
)
def test_architectures(name: str, lost: str, tmp_path: Path) -> None:
    base, adapter = make(tmp_path, name, KINDS["LoRA"](ARCHITECTURES[name]))
    assert merge(open_checkpoint(base), [read_adapter(adapter)])
    drop(adapter, lost)
    error = refused(base, adapter)
    assert "lacks 1 of the modules" in error.what
    assert lost in error.what


def test_a_whole_kind_of_layer(tmp_path: Path) -> None:
    """Nothing of `k_proj` is there, and adapter_config.json names it."""
    base, adapter = make(tmp_path, "qwen2", LoraConfig(r=4, target_modules=["q_proj", "k_proj"]))
    drop(adapter, "k_proj")
    assert "lacks 2 of the modules" in refused(base, adapter).what


def test_a_tied_head(tmp_path: Path) -> None:
    base, adapter = make(tmp_path, "qwen2", LoraConfig(r=4, target_modules=["q_proj", "lm_head"]))
    drop(adapter, "lm_head")
    assert "lm_head" in refused(base, adapter).what


def test_experts_of_one_layer(tmp_path: Path) -> None:
    base, adapter = make(tmp_path, "qwen3_moe", KINDS["target_parameters (experts)"](ARCHITECTURES["qwen3_moe"]))
    assert merge(open_checkpoint(base), [read_adapter(adapter)])
    drop(adapter, "layers.0.")
    assert "model.layers.0.mlp.experts" in refused(base, adapter).what


@pytest.mark.parametrize(
    ("entries", "lost"), [(["lm_head", "norm"], "layers.0.input_layernorm"), (["mlp", "lm_head"], "1.mlp.up_proj")]
)
def test_a_part_of_what_was_saved_whole(entries: list[str], lost: str, tmp_path: Path) -> None:
    base, adapter = make(tmp_path, "llama", LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=entries))
    assert merge(open_checkpoint(base), [read_adapter(adapter)])
    drop(adapter, lost)
    assert lost in refused(base, adapter).what


def test_one_tensor_of_a_head_that_was_saved(tmp_path: Path) -> None:
    base, adapter = make(tmp_path, "roberta", KINDS["LoRA"](ARCHITECTURES["roberta"]))
    drop(adapter, "classifier.dense.bias")
    assert "classifier.dense.bias" in refused(base, adapter).what


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj"], "layers_to_transform": [1]},
        {"target_modules": r".*\.1\.self_attn\.q_proj"},
        {"target_modules": ["layers.1.self_attn.q_proj"]},
        {"target_modules": ["q_proj"], "exclude_modules": r".*\.0\..*"},
        {"target_modules": "all-linear"},
    ],
    ids=str,
)
def test_what_was_left_out_on_purpose(settings: dict[str, Any], tmp_path: Path) -> None:
    base, adapter = make(tmp_path, "llama", LoraConfig(r=4, task_type="CAUSAL_LM", **settings))
    assert merge(open_checkpoint(base), [read_adapter(adapter)])


def test_the_way_out(tmp_path: Path) -> None:
    base, adapter = make(tmp_path, "llama", KINDS["LoRA"](ARCHITECTURES["llama"]))
    drop(adapter, "layers.1.self_attn.q_proj")
    assert "exclude_modules" in refused(base, adapter).hint
    edit_config(adapter, exclude_modules=["layers.1.self_attn.q_proj"])
    assert merge(open_checkpoint(base), [read_adapter(adapter)])


def test_a_checkpoint_of_the_bare_model(tmp_path: Path) -> None:
    """GPT-2's on the hub has no `transformer.` before its names; the pattern is one for the model's."""
    config = LoraConfig(r=4, target_modules=r"transformer\.h\.\d+\.attn\.c_attn")
    base, adapter = make(tmp_path, "gpt2", config)
    weights = load_file(base / "model.safetensors")
    weights = {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    assert merge(open_checkpoint(base), [read_adapter(adapter)])
    drop(adapter, "h.1.")
    assert "transformer.h.1.attn.c_attn" in refused(base, adapter).what


def test_layers_that_transformers_does_not_build(tmp_path: Path) -> None:
    """Stored with the model, for predicting several tokens at once."""
    base, adapter = make(tmp_path, "llama", KINDS["LoRA"](ARCHITECTURES["llama"]))
    weights = load_file(base / "model.safetensors")
    for name in ("model.layers.2.self_attn.q_proj.weight", "mtp.layers.0.self_attn.q_proj.weight"):
        weights[name] = torch.ones(32, 32)
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    assert merge(open_checkpoint(base), [read_adapter(adapter)])


def test_a_pooler_that_transformers_does_not_build(tmp_path: Path) -> None:
    base, adapter = make(tmp_path, "roberta", LoraConfig(r=4, target_modules=["dense"], task_type="SEQ_CLS"))
    weights = load_file(base / "model.safetensors")
    weights["roberta.pooler.dense.weight"] = torch.ones(32, 32)
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    assert merge(open_checkpoint(base), [read_adapter(adapter)])


@pytest.mark.parametrize("pattern", ["q_proj(", "(a+)+(b+)+q_proj"])
def test_patterns_that_cannot_be_matched(pattern: str, tmp_path: Path) -> None:
    """Nothing can be told, and nothing hangs."""
    base, adapter = make(tmp_path, "llama", LoraConfig(r=4, target_modules=["q_proj"]))
    edit_config(adapter, target_modules=pattern)
    assert merge(open_checkpoint(base), [read_adapter(adapter)])
