from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoKrConfig
from safetensors.torch import load_file

from lora2edge.adapters.kinds import lokr
from lora2edge.errors import AdapterError
from tests.unit.adapters.kinds.live import (
    LINEAR,
    WEIGHTS,
    assert_same_as_live,
    edit,
    edit_config,
    read_parts,
    save_adapter,
)

SETTINGS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "plain": ({}, {"lokr_w1", "lokr_w2", "lokr_w2_a", "lokr_w2_b"}),
    "both-dense": ({"r": 64, "alpha": 32}, {"lokr_w1", "lokr_w2"}),
    "both-factored": (
        {"r": 2, "decompose_both": True},
        {"lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b"},
    ),
    "factor": ({"decompose_factor": 4, "r": 3}, {"lokr_w1", "lokr_w2_a", "lokr_w2_b"}),
    "factor-that-does-not-divide": ({"decompose_factor": 5, "r": 3}, {"lokr_w1", "lokr_w2_a", "lokr_w2_b"}),
    "patterns": (
        {"rank_pattern": {"q_proj": 2, "v_proj": 40}, "alpha_pattern": {r"layers\.0\.mlp\.up_proj": 31}},
        {"lokr_w1", "lokr_w2", "lokr_w2_a", "lokr_w2_b"},
    ),
    "training-only": (
        {"rank_dropout": 0.5, "module_dropout": 0.5, "rank_dropout_scale": True, "init_weights": "lycoris"},
        {"lokr_w1", "lokr_w2", "lokr_w2_a", "lokr_w2_b"},
    ),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_same_as_live(setting: str, base: Path, tmp_path: Path) -> None:
    settings, roles = SETTINGS[setting]
    config = LoKrConfig(**{"r": 4, "alpha": 6, "target_modules": LINEAR, **settings})
    folder = save_adapter(tmp_path / "adapter", base, config, strength=0.2)
    assert {name.rpartition(".")[2] for name in load_file(folder / WEIGHTS)} == roles
    assert_same_as_live(lokr.read, base, folder)


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    return save_adapter(tmp_path / "adapter", base, LoKrConfig(r=2, alpha=4, target_modules=["q_proj"]))


@pytest.mark.parametrize("changes", [{"r": 3}, {"r": 64}, {"decompose_both": True}])
def test_another_rank(changes: dict[str, Any], adapter: Path) -> None:
    """PEFT would leave such a side as it was started, with a warning."""
    with pytest.raises(AdapterError) as error:
        read_parts(lokr.read, edit_config(adapter, **changes))
    assert error.value.code == "adapter-rank"


def test_trained_before_the_scale_was_applied(adapter: Path) -> None:
    """PEFT 0.13 saved no rank_dropout_scale, and trained without alpha / r."""
    with pytest.raises(AdapterError, match=r"alpha / r is 2 in an adapter of PEFT 0\.13") as error:
        read_parts(lokr.read, edit_config(adapter, "rank_dropout_scale"))
    assert error.value.code == "adapter-setting"
    assert read_parts(lokr.read, edit_config(adapter, "rank_dropout_scale", alpha=2))


def test_a_side_twice(adapter: Path) -> None:
    name = "base_model.model.model.layers.0.self_attn.q_proj.lokr_w2"
    with pytest.raises(AdapterError, match="both lokr_w2 and its factors") as error:
        read_parts(lokr.read, edit(adapter, lambda tensors: tensors.update({name: torch.ones(8, 8)})))
    assert error.value.code == "adapter-ambiguous"


@pytest.mark.parametrize("shape", [(2, 2, 3, 3), (2, 2, 3)])
def test_a_kernel(shape: tuple[int, ...], adapter: Path) -> None:
    def core(tensors: dict[str, torch.Tensor]) -> None:
        tensors["base_model.model.model.layers.0.self_attn.q_proj.lokr_t2"] = torch.ones(shape)

    with pytest.raises(AdapterError, match="is a convolution"):
        read_parts(lokr.read, edit(adapter, core))
