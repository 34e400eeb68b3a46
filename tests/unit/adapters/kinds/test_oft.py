from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import OFTConfig

from lora2edge.adapters.kinds import oft
from lora2edge.errors import AdapterError
from tests.unit.adapters.kinds.live import (
    LINEAR,
    assert_same_as_live,
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
    "exact": {"use_cayley_neumann": False},
    "blocks": {"oft_block_size": 0, "r": 4},
    "blocks-of-one": {"oft_block_size": 0, "r": 32, "use_cayley_neumann": False},
    "one-block": {"oft_block_size": 0, "r": 1, "use_cayley_neumann": False},
    "size-that-does-not-divide": {"oft_block_size": 20},
    "number-that-does-not-divide": {"oft_block_size": 0, "r": 5},
    "size-beyond-the-width": {"oft_block_size": 80, "use_cayley_neumann": False},
    "shared": {"block_share": True},
    "constrained": {"coft": True, "eps": 0.3},
    "constrained-within": {"coft": True, "eps": 50.0},
    "constrained-shared-exact": {"coft": True, "eps": 0.5, "block_share": True, "use_cayley_neumann": False},
    "training-only": {"module_dropout": 0.5, "init_weights": False},
    **{f"{terms}-terms": {"num_cayley_neumann_terms": terms} for terms in (2, 3, 4, 6, 9)},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_same_as_live(setting: str, base: Path, tmp_path: Path) -> None:
    config = OFTConfig(**{"oft_block_size": 16, "target_modules": LINEAR, **SETTINGS[setting]})
    assert_same_as_live(oft.read, base, save_adapter(tmp_path / "adapter", base, config, strength=0.05))


@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
def test_embedding(shared: bool, base: Path, tmp_path: Path) -> None:
    """Its outputs are turned, not its inputs."""
    config = OFTConfig(oft_block_size=16, target_modules=["embed_tokens", "lm_head"], block_share=shared)
    assert_same_as_live(oft.read, base, save_adapter(tmp_path / "adapter", base, config, strength=0.05))


def test_exact_rotations_are_orthogonal(base: Path, tmp_path: Path) -> None:
    config = OFTConfig(oft_block_size=16, target_modules=["q_proj"], use_cayley_neumann=False)
    part = read_parts(oft.read, save_adapter(tmp_path / "adapter", base, config, strength=0.5))[0]
    turned = part.load().apply(np.eye(64, dtype=np.float32), 0, 64)
    np.testing.assert_allclose(turned @ turned.T, np.eye(64), atol=2e-6)


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    return save_adapter(tmp_path / "adapter", base, OFTConfig(oft_block_size=16, target_modules=["q_proj"]))


@pytest.mark.parametrize("version", ["0.17.1", "0.18.0.dev0@abc", "0.9", None, 18])
def test_the_series_of_older_versions(version: Any, adapter: Path) -> None:
    with pytest.raises(AdapterError, match=r"PEFT 0\.17 or older") as error:
        read_parts(oft.read, edit_config(adapter, peft_version=version))
    assert error.value.code == "adapter-setting"
    assert read_parts(oft.read, edit_config(adapter, use_cayley_neumann=False))


@pytest.mark.parametrize("version", ["0.18.0", "0.19.0.dev0@abc", "1.0.0"])
def test_the_series_of_newer_versions(version: str, adapter: Path) -> None:
    assert read_parts(oft.read, edit_config(adapter, peft_version=version))


def test_files_of_older_versions(adapter: Path, base: Path) -> None:
    """PEFT passes over them with a warning: what it then computes is the base."""

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            del tensors[name]
            tensors[name.replace("oft_R.weight", "oft_r")] = torch.randn(4, 16, 16)

    edit(adapter, rename)
    assert torch.equal(logits(live_model(base, adapter)), logits(load_base(base)))
    with pytest.raises(AdapterError, match=r"OFT adapter of PEFT 0\.15") as error:
        read_parts(oft.read, adapter)
    assert error.value.code == "adapter-setting"


@pytest.mark.parametrize("changes", [{"oft_block_size": 8}, {"oft_block_size": 0, "r": 8}, {"block_share": True}])
def test_another_block_size(changes: dict[str, Any], adapter: Path) -> None:
    part = read_parts(oft.read, edit_config(adapter, **changes))[0]
    assert "oft_R is [4, 120], for 64 channels of the base it must be" in str(part.misfit((64, 64)))


@pytest.mark.parametrize("changes", [{"r": 4}, {"oft_block_size": 0}])
def test_size_and_number_of_blocks(changes: dict[str, Any], adapter: Path) -> None:
    with pytest.raises(AdapterError) as error:
        read_parts(oft.read, edit_config(adapter, **changes))
    assert error.value.code == "bad-adapter-config"


def test_no_triangle(adapter: Path) -> None:
    def cut(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            tensors[name] = tensors[name][:, :-1]

    with pytest.raises(AdapterError, match="upper triangle") as error:
        read_parts(oft.read, edit(adapter, cut))
    assert error.value.code == "adapter-shape"
