"""Quantized bases whose config.json does not say so: refused, where they would pass for plain."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora2edge.checkpoint import open_checkpoint
from lora2edge.errors import CheckpointError
from tests.tiny import make_checkpoint

Tensors = dict[str, torch.Tensor]
NAME = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "base")


def change(base: Path, spoil: Callable[[Tensors], object]) -> None:
    tensors = load_file(base / "model.safetensors")
    spoil(tensors)
    save_file(tensors, base / "model.safetensors", {"format": "pt"})


def cast(kind: torch.dtype) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({NAME: tensors[NAME].to(kind)})


def with_scale(tensors: Tensors) -> None:
    tensors[NAME + "_scale"] = torch.ones(1)


@pytest.mark.parametrize(
    "spoil", [*map(cast, (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8, torch.int32)), with_scale]
)
def test_codes_and_scales_are_refused(base: Path, spoil: Callable[[Tensors], object]) -> None:
    change(base, spoil)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(base)
    assert caught.value.code == "quantized-base" and NAME in caught.value.why


def test_a_file_of_modelopt_is_refused(base: Path) -> None:
    (base / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8"}}')
    with pytest.raises(CheckpointError, match="quantization_config") as caught:
        open_checkpoint(base)
    assert "hf_quant_config.json" in caught.value.hint


def test_buffers_of_plain_checkpoints_are_none(base: Path) -> None:
    def add(tensors: Tensors) -> None:
        tensors["model.layers.0.attn.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.uint8)
        tensors["model.layers.0.attn.mask"] = torch.ones(8, 8, dtype=torch.bool)
        tensors["model.position_ids"] = torch.arange(8)[None]

    change(base, add)
    assert not open_checkpoint(base).is_quantized
