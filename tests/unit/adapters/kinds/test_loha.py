from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peft import LoHaConfig

from lora2edge.adapters.kinds import loha
from lora2edge.errors import AdapterError
from tests.unit.adapters.kinds.live import (
    LINEAR,
    assert_same_as_live,
    edit,
    edit_config,
    read_parts,
    save_adapter,
)

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "alpha": {"alpha": 6.5},
    "head": {"target_modules": ["lm_head", "q_proj"]},
    "patterns": {
        "rank_pattern": {"q_proj": 3, r"layers\.1\.mlp\.down_proj": 5},
        "alpha_pattern": {"^model.layers.0.self_attn.k_proj": 32, "o_proj": 1, "v": 99},
    },
    "training-only": {
        "rank_dropout": 0.5,
        "module_dropout": 0.5,
        "init_weights": False,
        "use_effective_conv2d": True,
    },
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_same_as_live(setting: str, base: Path, tmp_path: Path) -> None:
    config = LoHaConfig(**{"r": 4, "alpha": 8, "target_modules": LINEAR, **SETTINGS[setting]})
    assert_same_as_live(loha.read, base, save_adapter(tmp_path / "adapter", base, config, strength=0.3))


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    return save_adapter(tmp_path / "adapter", base, LoHaConfig(r=4, alpha=8, target_modules=["q_proj"]))


def test_another_rank(adapter: Path) -> None:
    with pytest.raises(AdapterError, match=r"ranks 4, 4, 4 and 4, adapter_config\.json says 6") as error:
        read_parts(loha.read, edit_config(adapter, r=6))
    assert error.value.code == "adapter-rank"


def test_a_kernel(adapter: Path) -> None:
    name = "base_model.model.model.layers.0.self_attn.q_proj.hada_t1"
    edit(adapter, lambda tensors: tensors.update({name: next(iter(tensors.values())).reshape(4, -1, 1, 1)}))
    with pytest.raises(AdapterError, match="is a convolution") as error:
        read_parts(loha.read, adapter)
    assert error.value.code == "adapter-setting"


def test_products_of_two_shapes(adapter: Path) -> None:
    def cut(tensors: dict[str, Any]) -> None:
        name = next(name for name in tensors if name.endswith("hada_w2_b"))
        tensors[name] = tensors[name][:, :-1]

    with pytest.raises(AdapterError, match="two products") as error:
        read_parts(loha.read, edit(adapter, cut))
    assert error.value.code == "adapter-shape"
