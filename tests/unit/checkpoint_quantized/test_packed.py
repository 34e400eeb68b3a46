"""GPTQ and AWQ checkpoints: packed here from the formats' definitions, one integer at a time, with torch."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lora2edge.checkpoint import open_checkpoint
from lora2edge.errors import CheckpointError
from tests.tiny import make_checkpoint
from tests.unit.checkpoint_quantized.folders import assert_rows, configure, rewrite

UP = "model.layers.0.mlp.up_proj.weight"
IN, OUT = 64, 128
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("plain") / "base", "llama", dtype="float16")


@pytest.fixture
def plain(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "base"))


def int32(value: int) -> int:
    return value - (1 << 32) if value >= 1 << 31 else value


def pack_rows(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """`[n, m]` integers to `[n × bits / 32, m]`: consecutive rows in one word, the first lowest."""
    each = 32 // bits
    out = torch.zeros(codes.shape[0] // each, codes.shape[1], dtype=torch.int64)
    for row in range(codes.shape[0]):
        out[row // each] |= codes[row].long() << (bits * (row % each))
    return torch.tensor([[int32(int(v)) for v in line] for line in out], dtype=torch.int32)


def pack_awq(codes: torch.Tensor) -> torch.Tensor:
    """`[n, m]` to `[n, m / 8]`: nibble i of a word is column AWQ_ORDER[i] of its eight."""
    out = torch.zeros(codes.shape[0], codes.shape[1] // 8, dtype=torch.int64)
    for nibble, column in enumerate(AWQ_ORDER):
        out |= codes[:, column::8].long() << (4 * nibble)
    return torch.tensor([[int32(int(v)) for v in line] for line in out], dtype=torch.int32)


def quantization(
    bits: int, group: int, *, sym: bool, desc_act: bool, seed: int = 0, dtype: torch.dtype = torch.float16
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes `[in, out]`, zeros and scales `[groups, out]`, the group of each input, and the weight `[out, in]`."""
    generator = torch.Generator().manual_seed(seed)
    top = 1 << bits
    groups = IN // group if group > 0 else 1
    codes = torch.randint(0, top, (IN, OUT), generator=generator)
    zeros = torch.full((groups, OUT), top // 2) if sym else torch.randint(0, top, (groups, OUT), generator=generator)
    scales = (torch.rand(groups, OUT, generator=generator) * 0.02 + 1e-3).to(dtype)
    index = torch.arange(IN) // (group if group > 0 else IN)
    if desc_act:
        index = index[torch.randperm(IN, generator=generator)]
    weight = (codes - zeros[index]).to(dtype) * scales[index]
    return codes, zeros, scales, index.int(), weight.T


def gptq_parts(bits: int, group: int, *, v2: bool, **options: Any) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    codes, zeros, scales, index, weight = quantization(bits, group, **options)
    stored = zeros if v2 else (zeros - 1) % (1 << bits)
    module = UP.removesuffix(".weight")
    return {
        f"{module}.qweight": pack_rows(codes, bits),
        f"{module}.qzeros": pack_rows(stored.T, bits).T,
        f"{module}.scales": scales,
        f"{module}.g_idx": index,
    }, weight


def awq_parts(group: int, **options: Any) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    codes, zeros, scales, _, weight = quantization(4, group, sym=False, desc_act=False, **options)
    module = UP.removesuffix(".weight")
    return {
        f"{module}.qweight": pack_awq(codes),
        f"{module}.qzeros": pack_awq(zeros),
        f"{module}.scales": scales,
    }, weight


def gptq(bits: int = 4, group: int = 32, **more: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": bits, "group_size": group, **more}


AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("v2", [False, True])
@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize(("group", "desc_act"), [(32, False), (32, True), (-1, False)])
def test_gptq(bits: int, v2: bool, sym: bool, group: int, desc_act: bool, plain: Path) -> None:
    parts, expected = gptq_parts(bits, group, v2=v2, sym=sym, desc_act=desc_act)
    settings = gptq(bits, group, sym=sym, desc_act=desc_act, checkpoint_format="gptq_v2" if v2 else "gptq")
    checkpoint = open_checkpoint(rewrite(plain, settings, {UP: parts}))
    assert_rows(checkpoint, UP, expected)
    assert checkpoint.tensors[UP].dtype == "F16"
    assert "quantization_config" not in checkpoint.config
    assert not [name for name in checkpoint.tensors if name.endswith(("qweight", "qzeros", "scales", "g_idx"))]


def test_gptq_without_g_idx(plain: Path) -> None:
    parts, expected = gptq_parts(4, 32, v2=False, sym=True, desc_act=False)
    del parts[f"{UP.removesuffix('.weight')}.g_idx"]
    assert_rows(open_checkpoint(rewrite(plain, gptq(), {UP: parts})), UP, expected)


@pytest.mark.parametrize("group", [32, 16, -1])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_awq(group: int, dtype: torch.dtype, plain: Path) -> None:
    parts, expected = awq_parts(group, dtype=dtype)
    checkpoint = open_checkpoint(rewrite(plain, {**AWQ, "group_size": group}, {UP: parts}))
    assert_rows(checkpoint, UP, expected)
    assert checkpoint.tensors[UP].dtype == {torch.float16: "F16", torch.bfloat16: "BF16"}[dtype]


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_matrices_wider_than_a_block(method: str, plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns come from several blocks, and blocks that were dropped are read again."""
    monkeypatch.setattr("lora2edge.checkpoint.quantized.packed._BLOCK_BYTES", 1024)
    monkeypatch.setattr("lora2edge.checkpoint.quantized.packed._BLOCKS_KEPT", 2)
    parts, expected = gptq_parts(4, 32, v2=False, sym=False, desc_act=True) if method == "gptq" else awq_parts(32)
    checkpoint = open_checkpoint(rewrite(plain, gptq() if method == "gptq" else AWQ, {UP: parts}))
    assert_rows(checkpoint, UP, expected)
    for start in range(0, OUT, 11):
        rows = checkpoint.rows(UP, start, min(start + 11, OUT))
        np.testing.assert_array_equal(rows, expected[start : start + 11].float().numpy())


# ---------------------------------------------------------------- refused and damaged

MODULE = UP.removesuffix(".weight")


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        (gptq(3), "bits"),
        (gptq(None), "bits"),  # type: ignore[arg-type]
        (gptq([4]), "bits"),  # type: ignore[arg-type]
        (gptq(checkpoint_format="marlin"), "marlin"),
        (gptq(checkpoint_format={"a": 1}), "format"),
        (gptq(is_marlin_format=True), "format"),
        (gptq(group=0), "group_size"),
        (gptq(group="32"), "group_size"),  # type: ignore[arg-type]
        (gptq(dynamic={"+:.*down.*": {"bits": 8}}), "dynamic"),
        (gptq(dynamic=[1]), "dynamic"),
        ({**AWQ, "bits": 8}, "bits"),
        ({**AWQ, "version": "gemv"}, "gemv"),
        ({**AWQ, "version": 3}, "version"),
        ({**AWQ, "zero_point": False}, "zero point"),
        ({**AWQ, "group_size": 1.5}, "group_size"),
    ],
)
def test_unknown_settings_are_refused(settings: dict[str, Any], word: str, plain: Path) -> None:
    parts = (
        gptq_parts(4, 32, v2=False, sym=True, desc_act=False)[0] if "awq" not in settings.values() else awq_parts(32)[0]
    )
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(rewrite(plain, settings, {UP: parts}))
    assert error.value.code == "quantized-base"
    assert word in error.value.why
    assert "--base" in error.value.hint


Parts = dict[str, torch.Tensor]
DAMAGE: dict[str, Callable[[Parts], object]] = {
    "no qzeros": lambda parts: parts.pop(f"{MODULE}.qzeros"),
    "no scales": lambda parts: parts.pop(f"{MODULE}.scales"),
    "no qweight": lambda parts: parts.pop(f"{MODULE}.qweight"),
    "short scales": lambda parts: parts.update({f"{MODULE}.scales": parts[f"{MODULE}.scales"][:1]}),
    "short qzeros": lambda parts: parts.update({f"{MODULE}.qzeros": parts[f"{MODULE}.qzeros"][:, :3]}),
    "integer scales": lambda parts: parts.update({f"{MODULE}.scales": torch.ones(2, OUT, dtype=torch.int32)}),
    "flat qweight": lambda parts: parts.update({f"{MODULE}.qweight": parts[f"{MODULE}.qweight"].flatten()}),
    "float qweight": lambda parts: parts.update({f"{MODULE}.qweight": parts[f"{MODULE}.qweight"].half()}),
}
GPTQ_DAMAGE: dict[str, Callable[[Parts], object]] = {
    "short g_idx": lambda parts: parts.update({f"{MODULE}.g_idx": parts[f"{MODULE}.g_idx"][:-1]}),
    "g_idx too large": lambda parts: parts[f"{MODULE}.g_idx"].__setitem__(3, 2),
    "g_idx negative": lambda parts: parts[f"{MODULE}.g_idx"].__setitem__(3, -1),
}


@pytest.mark.parametrize(
    ("method", "damage"),
    [*[("gptq", key) for key in (*DAMAGE, *GPTQ_DAMAGE)], *[("awq", key) for key in DAMAGE]],
)
def test_damaged(method: str, damage: str, plain: Path) -> None:
    """One weight is whole, so that the checkpoint is a quantized one."""
    whole = "model.layers.1.mlp.up_proj.weight"
    parts, _ = gptq_parts(4, 32, v2=False, sym=True, desc_act=True) if method == "gptq" else awq_parts(32)
    other = {key.replace("layers.0", "layers.1"): value.clone() for key, value in parts.items()}
    {**DAMAGE, **GPTQ_DAMAGE}[damage](parts)
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(rewrite(plain, gptq() if method == "gptq" else AWQ, {UP: parts, whole: other}))
    assert error.value.code == "damaged-quantization"
    assert MODULE in error.value.what
    assert error.value.hint


def test_a_weight_both_plain_and_packed(plain: Path) -> None:
    parts, _ = awq_parts(32)
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(rewrite(plain, AWQ, {UP: {**parts, UP: torch.zeros(OUT, IN)}}))
    assert error.value.code == "tensor-twice"


def test_bits_that_are_not_the_files(plain: Path) -> None:
    parts, _ = gptq_parts(4, 32, v2=False, sym=True, desc_act=False)
    folder = rewrite(plain, gptq(8), {UP: parts})
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(folder)
    assert error.value.code == "damaged-quantization"
    configure(folder, quantization_config=gptq(4))
    open_checkpoint(folder).close()
