from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, get_peft_model
from safetensors.torch import load_file

from lora2edge.adapters.kinds import adalora
from lora2edge.errors import AdapterError
from tests.tiny import shake_adapter
from tests.unit.adapters.kinds.live import (
    IDS,
    LARGEST_ERROR,
    LINEAR,
    WEIGHTS,
    assert_same_as_live,
    difference,
    edit,
    edit_config,
    live_model,
    load_base,
    logits,
    read_parts,
    save_adapter,
)

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "alpha": {"lora_alpha": 5},
    "no-alpha": {"lora_alpha": 0},
    "head": {"target_modules": ["lm_head", "q_proj"]},
    "of-lora": {"r": 3, "use_rslora": True, "alpha_pattern": {"q_proj": 99}, "init_lora_weights": "gaussian"},
    "training-only": {"lora_dropout": 0.5, "target_r": 2, "beta1": 0.5, "orth_reg_weight": 0.1, "deltaT": 3},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_same_as_live(setting: str, base: Path, tmp_path: Path) -> None:
    settings = {"init_r": 6, "lora_alpha": 24, "total_step": 10, "target_modules": LINEAR, **SETTINGS[setting]}
    assert_same_as_live(
        adalora.read, base, save_adapter(tmp_path / "adapter", base, AdaLoraConfig(**settings), strength=0.4)
    )


def test_conv1d(gpt2: Path, tmp_path: Path) -> None:
    config = AdaLoraConfig(
        init_r=6, lora_alpha=24, total_step=10, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True
    )
    assert_same_as_live(adalora.read, gpt2, save_adapter(tmp_path / "adapter", gpt2, config, strength=0.4))


def test_ranks_that_training_chose(base: Path, tmp_path: Path) -> None:
    """A real, short training: PEFT cuts ranks, some to 0, and saves what is left."""
    torch.manual_seed(0)
    config = AdaLoraConfig(
        init_r=6, target_r=2, lora_alpha=24, tinit=1, tfinal=1, total_step=6, deltaT=1, target_modules=LINEAR
    )
    model = get_peft_model(load_base(base), config)
    shake_adapter(model, 0.4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in range(6):
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    model.base_model.rankallocator.mask_using_rank_pattern(
        model.base_model.model, model.peft_config["default"].rank_pattern
    )
    trained = logits(model.eval())
    folder = tmp_path / "adapter"
    model.save_pretrained(folder)
    ranks = {tensor.shape[0] for name, tensor in load_file(folder / WEIGHTS).items() if name.endswith("lora_A")}
    assert len(ranks) > 2 and min(ranks) < 2
    assert_same_as_live(adalora.read, base, folder)
    assert difference(trained, logits(live_model(base, folder))) <= LARGEST_ERROR, "loading is not what was trained"


@pytest.fixture
def pruned(base: Path, tmp_path: Path) -> Path:
    config = AdaLoraConfig(init_r=3, lora_alpha=24, total_step=10, target_modules=["q_proj"])
    model = get_peft_model(load_base(base), config)
    shake_adapter(model, 0.4)
    name = "model.layers.{}.self_attn.q_proj.lora_E"
    model.peft_config["default"].rank_pattern = {
        name.format(0): [False, False, False],
        name.format(1): [True, False, True],
    }
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_nothing_left_of_a_module(pruned: Path, base: Path) -> None:
    parts = assert_same_as_live(adalora.read, base, pruned)
    first = next(part for part in parts if ".0." in part.module)
    assert first.reader.tensors[first.tensors[0]].shape == (0, 64)


@pytest.mark.parametrize("changes", [{"init_r": 4, "rank_pattern": None}, {"rank_pattern": {}}])
def test_another_rank(changes: dict[str, Any], pruned: Path) -> None:
    with pytest.raises(AdapterError) as error:
        read_parts(adalora.read, edit_config(pruned, **changes))
    assert error.value.code == "adapter-rank"


def test_a_divisor_that_changes_with_loading(pruned: Path) -> None:
    with pytest.raises(AdapterError, match="lora_alpha: 0 with a rank that was cut from 3") as error:
        read_parts(adalora.read, edit_config(pruned, lora_alpha=0))
    assert error.value.code == "adapter-setting"


def test_a_module_of_the_pattern_without_tensors(pruned: Path) -> None:
    edit(pruned, lambda tensors: [tensors.pop(name) for name in list(tensors) if ".layers.0." in name])
    with pytest.raises(AdapterError, match=r"rank_pattern have no tensors: model\.layers\.0") as error:
        read_parts(adalora.read, pruned)
    assert error.value.code == "adapter-incomplete"


@pytest.mark.parametrize("pattern", [{"q": [1, 0, 1]}, {"q": [True]}, {"q": 2}, [True], "q"])
def test_a_malformed_pattern(pattern: Any, pruned: Path) -> None:
    with pytest.raises(AdapterError, match="rank_pattern is") as error:
        read_parts(adalora.read, edit_config(pruned, rank_pattern=pattern))
    assert error.value.code == "bad-adapter-config"
