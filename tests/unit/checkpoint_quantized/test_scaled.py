"""FP8 and int8 checkpoints: against transformers' and compressed-tensors' own dequantization."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lora2edge.checkpoint import StoredCheckpoint, encode_rows, open_checkpoint
from lora2edge.checkpoint.quantized.scaled import _float8
from lora2edge.errors import CheckpointError
from tests.tiny import make_checkpoint
from tests.unit.checkpoint_quantized.folders import assert_rows, rewrite

UP = "model.layers.0.mlp.up_proj.weight"
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("plain") / "base", "llama")


@pytest.fixture
def plain(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "base"))


@pytest.mark.parametrize(("name", "dtype"), [("F8_E4M3", torch.float8_e4m3fn), ("F8_E5M2", torch.float8_e5m2)])
def test_every_float8_is_torchs(name: str, dtype: torch.dtype) -> None:
    expected = torch.arange(256, dtype=torch.uint8).view(dtype).float().numpy()
    np.testing.assert_array_equal(_float8(name), expected)


def codes(shape: tuple[int, int], dtype: torch.dtype = torch.float8_e4m3fn) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 20).to(dtype)


def scales(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 1e-3 + 1e-5


def opened(folder: Path, quantization: dict[str, Any], parts: dict[str, torch.Tensor]) -> StoredCheckpoint:
    return open_checkpoint(rewrite(folder, quantization, {UP: parts}))


@pytest.mark.parametrize(("shape", "block"), [((256, 384), [128, 128]), ((96, 64), [32, 16]), ((64, 64), [1, 32])])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_block_scales_are_those_of_transformers(
    shape: tuple[int, int], block: list[int], dtype: torch.dtype, plain: Path
) -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    weight, grid = codes(shape, dtype), scales(shape[0] // block[0], shape[1] // block[1])
    checkpoint = opened(plain, {**FP8, "weight_block_size": block}, {UP: weight, f"{UP}_scale_inv": grid})
    exact = Fp8Dequantize(None)._dequantize_one(weight, grid, torch.float32)
    assert_rows(checkpoint, UP, exact)
    in_bfloat16 = Fp8Dequantize(None)._dequantize_one(weight, grid, torch.bfloat16)
    ours = encode_rows(checkpoint.rows(UP, 0, shape[0]), checkpoint.tensors[UP].dtype)
    np.testing.assert_array_equal(ours, in_bfloat16.view(torch.int16).numpy().view(np.uint16))
    assert checkpoint.tensors[UP].dtype == "BF16"
    assert f"{UP}_scale_inv" not in checkpoint.tensors


def test_the_last_blocks_are_cut_off(plain: Path) -> None:
    """DeepSeek-V3's kv_a_proj_with_mqa has 576 rows: four and a half blocks."""
    weight, grid = codes((576, 200)), scales(5, 2)
    wide = grid.repeat_interleave(128, 0)[:576].repeat_interleave(128, 1)[:, :200]
    assert_rows(opened(plain, FP8, {UP: weight, f"{UP}_scale_inv": grid}), UP, weight.float() * wide)


def test_scales_that_are_powers_of_two(plain: Path) -> None:
    weight, grid = codes((256, 128)), torch.tensor([[119], [130]], dtype=torch.uint8)
    expected = weight.float() * torch.tensor([2.0**-8, 2.0**3]).repeat_interleave(128)[:, None]
    parts = {UP: weight, f"{UP}_scale_inv": grid.view(torch.float8_e8m0fnu)}
    assert_rows(opened(plain, {**FP8, "scale_fmt": "ue8m0"}, parts), UP, expected)


@pytest.mark.parametrize("shape", [(), (1,), (96,), (96, 1)])
def test_scales_of_tensors_and_rows(shape: tuple[int, ...], plain: Path) -> None:
    weight, scale = codes((96, 64)), scales(*shape)
    module = UP.removesuffix(".weight")
    parts = {UP: weight, f"{UP}_scale": scale, f"{module}.input_scale": torch.tensor(0.5)}
    parts["model.layers.0.self_attn.k_scale"] = torch.tensor(1.0)
    checkpoint = opened(plain, {"quant_method": "fp8", "activation_scheme": "static"}, parts)
    assert_rows(checkpoint, UP, weight.float() * (scale.reshape(-1, 1) if shape else scale))
    assert not [name for name in checkpoint.tensors if "scale" in name]


@pytest.mark.parametrize(
    ("weights", "format_", "shape"),
    [
        ({"type": "float", "strategy": "tensor"}, "float-quantized", (1,)),
        ({"type": "float", "strategy": "channel"}, "float-quantized", (128, 1)),
        ({"type": "float", "strategy": "block", "block_structure": [64, 32]}, "float-quantized", (2, 2)),
        ({"type": "int", "strategy": "channel"}, "int-quantized", (128, 1)),
        ({"type": "int", "strategy": "tensor"}, "naive-quantized", (1,)),
        ({"type": "int", "strategy": "group", "group_size": 16}, "int-quantized", (128, 4)),
    ],
)
def test_compressed_tensors(weights: dict[str, Any], format_: str, shape: tuple[int, ...], plain: Path) -> None:
    """Its library computes in the scales' dtype, here bfloat16: equal to ours after the one rounding."""
    library = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    quantization = pytest.importorskip("compressed_tensors.quantization")

    whole = weights["type"] == "int"
    weight = torch.randint(-128, 128, (128, 64), dtype=torch.int8) if whole else codes((128, 64))
    scale = scales(*shape).bfloat16()
    arguments = quantization.QuantizationArgs(num_bits=8, symmetric=True, **weights)
    expected = library.dequantize(weight, scale, args=arguments)
    assert expected.dtype == torch.bfloat16
    settings = {
        "quant_method": "compressed-tensors",
        "format": format_,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 8, "symmetric": True, **weights}}},
    }
    zero = torch.zeros(shape, dtype=torch.int8)
    checkpoint = opened(plain, settings, {UP: weight, f"{UP}_scale": scale, f"{UP}_zero_point": zero})
    ours = encode_rows(checkpoint.rows(UP, 0, 128), checkpoint.tensors[UP].dtype)
    np.testing.assert_array_equal(ours, expected.contiguous().view(torch.int16).numpy().view(np.uint16))
    np.testing.assert_array_equal(checkpoint.rows(UP, 33, 70), checkpoint.rows(UP, 0, 128)[33:70])


def compressed(weights: Any, **more: Any) -> dict[str, Any]:
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": groups, **more}


CHANNEL = {"num_bits": 8, "type": "float", "strategy": "channel"}


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        (compressed(CHANNEL, format="pack-quantized"), "pack-quantized"),
        (compressed(CHANNEL, format="nvfp4-pack-quantized"), "nvfp4"),
        (compressed(CHANNEL, format=None), "format"),
        (compressed(None), "no weights"),
        (compressed({**CHANNEL, "num_bits": 4}), "4"),
        (compressed({**CHANNEL, "strategy": "block", "block_structure": [0, 128]}), "blocks"),
        (compressed({**CHANNEL, "strategy": "block", "block_structure": "128x128"}), "blocks"),
        (compressed({**CHANNEL, "strategy": "group", "group_size": None}), "blocks"),
        (compressed({**CHANNEL, "actorder": "group"}), "actorder"),
        (compressed(CHANNEL, sparsity_config={"format": "sparse-24-bitmask"}), "sparse"),
        (compressed(CHANNEL, transform_config={"config_groups": {}}), "rotated"),
        (compressed(CHANNEL, config_groups=[1]), "config_groups"),
        (compressed(CHANNEL, config_groups={"a": 1}), "config_groups"),
        ({**FP8, "weight_block_size": [128]}, "blocks"),
        ({**FP8, "weight_block_size": [128, -1]}, "blocks"),
        ({**FP8, "weight_block_size": [True, 1]}, "blocks"),
    ],
)
def test_unknown_settings_are_refused(settings: dict[str, Any], word: str, plain: Path) -> None:
    with pytest.raises(CheckpointError) as error:
        opened(plain, settings, {UP: codes((128, 64)), f"{UP}_scale": scales(128, 1)})
    assert error.value.code == "quantized-base"
    assert word in error.value.why


def test_asymmetric_weights_are_refused(plain: Path) -> None:
    parts = {UP: torch.ones(128, 64, dtype=torch.int8), f"{UP}_scale": scales(128, 1)}
    parts[f"{UP}_zero_point"] = torch.ones(128, 1, dtype=torch.int8)
    settings = compressed({**CHANNEL, "type": "int"}, format="int-quantized")
    with pytest.raises(CheckpointError, match="compressed-tensors") as error:
        opened(plain, settings, parts)
    assert "asymmetric" in error.value.why


WHOLE = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("parts", "word"),
    [
        ({UP: codes((128, 64))}, "missing"),
        ({UP: codes((128, 64)), f"{UP}_scale_inv": scales(1, 2)}, "[1, 2]"),
        ({UP: codes((128, 64)), f"{UP}_scale_inv": scales(64)}, "[64]"),
        ({UP: codes((128, 64)), f"{UP}_scale_inv": scales(1, 1).int()}, "I32"),
        ({UP: codes((128, 64)), f"{UP}_scale_inv": scales(1, 1), f"{UP}_scale": scales(1)}, "both"),
        ({UP: codes((128, 64)).flatten(), f"{UP}_scale_inv": scales(1, 1)}, "two axes"),
        ({f"{UP}_scale_inv": scales(1, 1)}, "of the same weight"),
        ({UP: torch.ones(128, 64, dtype=torch.int8), f"{UP}_scale_inv": scales(1, 1)}, "of the same weight"),
        ({UP.removesuffix(".weight"): codes((128, 64))}, "of the same weight"),
    ],
)
def test_damaged(parts: dict[str, torch.Tensor], word: str, plain: Path) -> None:
    whole = {WHOLE: codes((128, 64)), f"{WHOLE}_scale_inv": scales(1, 1)}
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(rewrite(plain, FP8, {UP: parts, WHOLE: whole}))
    assert error.value.code == "damaged-quantization"
    assert word in error.value.why
    assert error.value.hint
