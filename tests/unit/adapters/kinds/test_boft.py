from __future__ import annotations

from pathlib import Path
from typing import Any

import peft.tuners.boft.layer
import pytest
import torch
from peft import BOFTConfig

from lora2edge.adapters import read_adapter
from lora2edge.adapters.kinds import boft
from lora2edge.errors import AdapterError, UnsupportedError
from lora2edge.survey import check_butterflies
from tests.unit.adapters.kinds.live import (
    LINEAR,
    assert_same_as_live,
    edit,
    edit_config,
    read_parts,
    save_adapter,
)


class BlockDiagonal:
    """What PEFT's CUDA extension computes; without it PEFT trains one factor, whatever is asked for."""

    @staticmethod
    def forward(blocks: torch.Tensor) -> list[torch.Tensor]:
        return [torch.stack([torch.block_diag(*factor) for factor in blocks])]


@pytest.fixture
def extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peft.tuners.boft.layer, "_FBD_CUDA", BlockDiagonal)


@pytest.fixture
def no_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even an attempt at building it."""
    monkeypatch.setattr(peft.tuners.boft.layer, "get_fbd_cuda", lambda: None)


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "size": {"boft_block_size": 16},
    "odd-size": {"boft_block_size": 1},
    "number": {"boft_block_size": 0, "boft_block_num": 8},
    "training-only": {"boft_dropout": 0.5, "init_weights": False},
}
FACTORS: dict[str, dict[str, Any]] = {
    "two": {"boft_n_butterfly_factor": 2},
    "three": {"boft_n_butterfly_factor": 3},
    "four-of-eight-blocks": {"boft_block_size": 0, "boft_block_num": 8, "boft_n_butterfly_factor": 4},
    "two-of-larger-blocks": {"boft_block_size": 16, "boft_n_butterfly_factor": 2},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_same_as_live(setting: str, no_extension: None, base: Path, tmp_path: Path) -> None:
    config = BOFTConfig(**{"target_modules": LINEAR, **SETTINGS[setting]})
    folder = save_adapter(tmp_path / "adapter", base, config, strength=0.3)
    assert_same_as_live(boft.read, base, folder)
    check_butterflies([read_adapter(folder)])


@pytest.mark.parametrize("setting", FACTORS)
def test_butterfly_factors(setting: str, extension: None, base: Path, tmp_path: Path) -> None:
    targets = [name for name in LINEAR if name != "down_proj"] if "eight" in setting else LINEAR
    config = BOFTConfig(**{"boft_block_size": 4, "target_modules": targets, **FACTORS[setting]})
    folder = save_adapter(tmp_path / "adapter", base, config, strength=0.3)
    parts = assert_same_as_live(boft.read, base, folder)
    shape = parts[0].reader.tensors[parts[0].tensors[0]].shape
    assert shape[0] == FACTORS[setting]["boft_n_butterfly_factor"]
    with pytest.raises(UnsupportedError) as caught:
        check_butterflies([read_adapter(folder)])
    assert caught.value.code == "boft-needs-cuda"


def test_factors_that_were_not_trained(no_extension: None, base: Path, tmp_path: Path) -> None:
    config = BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=3, target_modules=LINEAR)
    assert_same_as_live(boft.read, base, save_adapter(tmp_path / "adapter", base, config, strength=0.3))


@pytest.fixture
def adapter(extension: None, base: Path, tmp_path: Path) -> Path:
    config = BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=2, target_modules=["q_proj"])
    return save_adapter(tmp_path / "adapter", base, config)


@pytest.mark.parametrize(
    "changes",
    [
        {"boft_block_size": 8},
        {"boft_block_size": 0, "boft_block_num": 8},
        {"boft_n_butterfly_factor": 3},
        {"boft_n_butterfly_factor": 1},
    ],
)
def test_other_sizes(changes: dict[str, Any], adapter: Path) -> None:
    with pytest.raises(AdapterError) as error:
        read_parts(boft.read, edit_config(adapter, **changes))
    assert error.value.code == "adapter-rank"


def test_size_and_number_of_blocks(adapter: Path) -> None:
    with pytest.raises(AdapterError) as error:
        read_parts(boft.read, edit_config(adapter, boft_block_num=16))
    assert error.value.code == "bad-adapter-config"


@pytest.mark.parametrize("shape", [(2, 5, 4, 4), (5, 8, 4, 4)], ids=["odd-blocks", "too-many-factors"])
def test_no_butterfly(shape: tuple[int, ...], adapter: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({name: torch.zeros(shape) for name in tensors if name.endswith("boft_R")})

    with pytest.raises(AdapterError, match="butterfly factors of") as error:
        read_parts(boft.read, edit_config(edit(adapter, change), boft_n_butterfly_factor=shape[0]))
    assert error.value.code == "adapter-shape"
