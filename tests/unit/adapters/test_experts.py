"""Adapters that PEFT put on the layers of experts by their old names, which transformers 5 stacks in one parameter."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lora2edge.adapters import merge, read_adapter
from lora2edge.backends.hf.write import write_checkpoint
from lora2edge.checkpoint import open_checkpoint
from lora2edge.errors import AdapterError
from lora2edge.progress import SILENT
from tests.architectures import ARCHITECTURES, make_model
from tests.tiny import shake_adapter

IDS = torch.tensor([[5, 30, 77, 40, 12, 9, 60, 33, 3, 41, 150, 7]])
TOLERANCE = 1e-5
"""Of the largest logit."""


@pytest.fixture(autouse=True)
def seeded() -> None:
    """PEFT draws lora_A."""
    torch.manual_seed(0)


def make(folder: Path, arch: str, **settings: Any) -> tuple[Path, Path]:
    model = make_model(ARCHITECTURES[arch], folder / "base")
    peft_model = get_peft_model(model, LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **settings))
    shake_adapter(peft_model)
    peft_model.save_pretrained(folder / "adapter")
    return folder / "base", folder / "adapter"


def logits(folder: Path, adapter: Path | None = None) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, adapter) if adapter else model
    with torch.no_grad():
        return model.eval()(IDS).logits


def assert_same_as_live(base: Path, adapter: Path, out: Path) -> None:
    view = merge(open_checkpoint(base), [read_adapter(adapter)])
    out.mkdir()
    write_checkpoint(view, out, SILENT)
    live = logits(base, adapter)
    assert (live - logits(base)).abs().max() > 0.01 * live.abs().max(), "the adapter does nothing"
    assert (live - logits(out)).abs().max() <= TOLERANCE * live.abs().max()


CASES: list[tuple[str, dict[str, Any]]] = [
    ("mixtral", {"target_modules": ["q_proj", "w1", "w2", "w3"]}),
    ("mixtral", {"target_modules": ["q_proj", "w2"]}),
    ("mixtral", {"target_modules": "all-linear"}),
    ("mixtral", {"target_modules": ["gate", "q_proj"], "alpha_pattern": {"gate.weight": 11, "gate": 3}}),
    ("mixtral", {"target_modules": "all-linear", "rank_pattern": {"down_proj": 2, "mlp.gate.weight": 3}}),
    ("qwen3_moe", {"target_modules": "all-linear"}),
    ("qwen3_moe", {"target_modules": ["v_proj", "gate_proj", "up_proj", "down_proj"]}),
    (
        "qwen3_moe",
        {"target_modules": ["v_proj"], "target_parameters": ["gate_up_proj"], "alpha_pattern": {"v_proj": 9}},
    ),
]


@pytest.mark.parametrize(("arch", "settings"), CASES, ids=str)
def test_layers_of_experts_by_their_old_names(arch: str, settings: dict[str, Any], tmp_path: Path) -> None:
    base, adapter = make(tmp_path, arch, **settings)
    assert_same_as_live(base, adapter, tmp_path / "out")


def test_a_layer_that_lost_its_experts(tmp_path: Path) -> None:
    base, adapter = make(tmp_path, "mixtral", target_modules=["q_proj", "w1", "w2", "w3"])
    weights = load_file(adapter / "adapter_model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if "layers.1.mlp.experts" not in name}
    assert len(kept) == len(weights) - 4
    save_file(kept, adapter / "adapter_model.safetensors")
    with pytest.raises(AdapterError) as error:
        merge(open_checkpoint(base), [read_adapter(adapter)])
    assert error.value.code == "adapter-incomplete"


def test_the_patterns_are_needed(tmp_path: Path) -> None:
    """PEFT doubles rank and alpha of the two layers that it fuses, in the configuration that it saves."""
    base, adapter = make(tmp_path, "mixtral", target_modules=["w1", "w2", "w3"])
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "rank_pattern": {}}))
    with pytest.raises(AdapterError):
        merge(open_checkpoint(base), [read_adapter(adapter)])


@pytest.mark.parametrize("arch", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("entries", [["mlp"], ["experts"], ["mlp", "lm_head"]], ids=str)
def test_experts_that_were_trained_whole(arch: str, entries: list[str], tmp_path: Path) -> None:
    """modules_to_save holds a layer's experts as one tensor; the base has a matrix for each."""
    base, adapter = make(tmp_path, arch, target_modules=["v_proj"], modules_to_save=entries)
    assert_same_as_live(base, adapter, tmp_path / "out")
    view = merge(open_checkpoint(base), [read_adapter(adapter)])
    name = next(name for name in view.tensors if "experts.1" in name)
    rows = view.tensors[name].shape[0]
    whole = view.rows(name, 0, rows)
    assert (view.rows(name, 3, 7) == whole[3:7]).all()
    assert view.account()["adapter"]["equal"] == []
    assert name in view.account()["base"]["replaced"]


def test_experts_that_were_trained_whole_on_another_base(tmp_path: Path) -> None:
    _, adapter = make(tmp_path, "mixtral", target_modules=["v_proj"], modules_to_save=["mlp"])
    architecture = dataclasses.replace(
        ARCHITECTURES["mixtral"], settings={**ARCHITECTURES["mixtral"].settings, "num_local_experts": 2}
    )
    make_model(architecture, tmp_path / "other")
    with pytest.raises(AdapterError) as error:
        merge(open_checkpoint(tmp_path / "other"), [read_adapter(adapter)])
    assert error.value.code == "adapter-other-base"
    assert "[4, 96, 32] in the adapter, [2, 96, 32] in the base" in error.value.why
