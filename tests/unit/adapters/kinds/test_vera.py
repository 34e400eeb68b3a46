from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import VeraConfig
from safetensors.torch import load_file

from lora2edge.adapters.kinds import vera
from lora2edge.errors import AdapterError, MissingExtraError
from tests.unit.adapters.kinds.live import (
    LINEAR,
    WEIGHTS,
    assert_same_as_live,
    edit,
    edit_config,
    live_model,
    load_base,
    read_parts,
    save_adapter,
)

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "one-shape": {"target_modules": ["q_proj", "o_proj"]},
    "drawn-again": {"save_projection": False},
    "drawn-from-another-key": {"save_projection": False, "projection_prng_key": 20_000_000_007},
    "drawn-of-some-layers": {
        "save_projection": False,
        "target_modules": r".*layers\.1\.(mlp\.up|self_attn\.k)_proj",
    },
    "training-only": {"vera_dropout": 0.5, "d_initial": 0.3},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_same_as_live(setting: str, base: Path, tmp_path: Path) -> None:
    config = VeraConfig(**{"r": 8, "target_modules": LINEAR, **SETTINGS[setting]})
    folder = save_adapter(tmp_path / "adapter", base, config, strength=0.3)
    saved = any(name.endswith("vera_A") for name in load_file(folder / WEIGHTS))
    assert saved is config.save_projection
    assert_same_as_live(vera.read, base, folder)


@pytest.mark.parametrize("saved", [True, False], ids=["saved", "drawn"])
def test_conv1d(saved: bool, gpt2: Path, tmp_path: Path) -> None:
    config = VeraConfig(r=8, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, save_projection=saved)
    assert_same_as_live(vera.read, gpt2, save_adapter(tmp_path / "adapter", gpt2, config, strength=0.3))


def test_drawn_to_the_last_bit(base: Path, tmp_path: Path) -> None:
    config = VeraConfig(r=8, target_modules=LINEAR, save_projection=False, projection_prng_key=5)
    folder = save_adapter(tmp_path / "adapter", base, config)
    parts = read_parts(vera.read, folder)
    for part in parts:
        assert part.misfit(tuple(load_base(base).get_submodule(part.module).weight.shape)) is None
    a, b = parts[0].projection.load(40)
    live = live_model(base, folder).base_model
    assert torch.equal(torch.from_numpy(a), live.vera_A["default"])
    assert torch.equal(torch.from_numpy(b), live.vera_B["default"][:40])


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    return save_adapter(tmp_path / "adapter", base, VeraConfig(r=8, target_modules=["q_proj", "up_proj"]))


def test_saved_matrices_that_peft_passes_over(adapter: Path) -> None:
    with pytest.raises(AdapterError, match="save_projection is false, and the file holds") as error:
        read_parts(vera.read, edit_config(adapter, save_projection=False))
    assert error.value.code == "adapter-setting"


def test_no_saved_matrices(adapter: Path) -> None:
    edit(adapter, lambda tensors: [tensors.pop(f"base_model.vera_{side}") for side in "AB"])
    with pytest.raises(AdapterError, match="no vera_A and no vera_B") as error:
        read_parts(vera.read, adapter)
    assert error.value.code == "adapter-incomplete"


def test_no_vectors(adapter: Path) -> None:
    edit(adapter, lambda tensors: [tensors.pop(name) for name in list(tensors) if "lambda" in name])
    with pytest.raises(AdapterError, match="vectors of no module"):
        read_parts(vera.read, adapter)


def test_another_rank(adapter: Path) -> None:
    with pytest.raises(AdapterError, match="vera_A has rank 8, vera_B 8") as error:
        read_parts(vera.read, edit_config(adapter, r=4))
    assert error.value.code == "adapter-rank"


def test_matrices_too_small_for_the_base(adapter: Path) -> None:
    part = next(part for part in read_parts(vera.read, adapter) if part.module.endswith("up_proj"))
    assert part.misfit((96, 64)) is None
    assert "are for weights up to [96, 64], the base has [96, 65]" in str(part.misfit((96, 65)))
    assert "96 outputs, the base 95" in str(part.misfit((95, 64)))


def test_drawing_needs_torch(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = VeraConfig(r=8, target_modules=["q_proj"], save_projection=False)
    folder = save_adapter(tmp_path / "adapter", base, config)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match="torch is not installed"):
        read_parts(vera.read, folder)
