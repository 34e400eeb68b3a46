"""Integer grids against torch's quantized tensors and straightforward loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora2edge.quantize import BITS, fit_mse, fit_range, nearest_codes
from lora2edge.quantize import grid as grids

few = settings(max_examples=25, deadline=None, derandomize=True, database=None)


def weights_of(seed: int, rows: int = 6, columns: int = 200) -> np.ndarray:
    generator = np.random.default_rng(seed)
    weights = generator.standard_normal((rows, columns)) * 10.0 ** generator.uniform(-6, 3, (rows, 1))
    weights[generator.random(weights.shape) < 0.02] *= 10
    weights[0, :64] = 0
    return weights.astype(np.float32)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", [32, 64, 128, None])
@pytest.mark.parametrize("symmetric", [True, False])
def test_scales_and_zeros_by_hand(bits: int, group: int | None, symmetric: bool) -> None:
    weights = weights_of(1)
    grid = fit_range(weights, bits, group, symmetric=symmetric)
    width = group or 200
    for row in range(6):
        for number, start in enumerate(range(0, 200, width)):
            part = weights[row, start : start + width].astype(np.float64)
            low, high = min(part.min(), 0), max(part.max(), 0)
            if symmetric:
                high = max(-low, high)
                low = -high
            scale = max((high - low) / (2**bits - 1), 2.0**-126)
            assert grid.scales[row, number] == pytest.approx(scale, rel=1e-6)
            zero = 2 ** (bits - 1) if symmetric else round(-low / scale)
            assert abs(int(grid.zeros[row, number]) - zero) <= (0 if symmetric or -low / scale % 1 != 0.5 else 1)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("scale_dtype", ["float32", "float16", "bfloat16"])
def test_values_are_torchs(bits: int, symmetric: bool, scale_dtype: str) -> None:
    weights = np.clip(weights_of(2), -3000, 3000)
    grid = fit_range(weights, bits, symmetric=symmetric, scale_dtype=scale_dtype)  # type: ignore[arg-type]
    codes = grid.affine.codes(weights)
    scales = torch.from_numpy(grid.scales[:, 0])
    stored = scales.to(getattr(torch, scale_dtype)).float()
    assert torch.equal(stored, scales)
    from torch.ao.quantization.fx._decomposed import dequantize_per_channel

    expected = dequantize_per_channel(
        torch.from_numpy(codes), scales, torch.from_numpy(grid.zeros[:, 0]).long(), 0, 0, 255, torch.uint8
    )
    np.testing.assert_array_equal(grid.values(codes), expected.numpy())
    if scale_dtype != "float32":
        np.testing.assert_array_equal(grid.affine.values(codes), expected.numpy())
    # Torch multiplies by the reciprocal: equal but for ties that its rounding makes.
    theirs = torch.fake_quantize_per_channel_affine(
        torch.from_numpy(weights), scales, torch.from_numpy(grid.zeros[:, 0].astype(np.float32)), 0, 0, 2**bits - 1
    )
    assert (theirs.numpy() == grid.values(codes)).mean() > 0.999


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, 128, None])
def test_the_whole_range_is_within_half_a_step(symmetric: bool, group: int | None) -> None:
    weights = weights_of(3)
    grid = fit_range(weights, 4, group, symmetric=symmetric)
    apart = np.abs(grid.values(grid.affine.codes(weights)) - weights)
    steps = np.repeat(grid.scales, grid.width, axis=1)[:, :200]
    # Asymmetric: the zero is rounded, too, and may push one end out by another half.
    assert (apart <= steps * (0.5001 if symmetric else 1.0001)).all()
    assert not grid.values(grid.affine.codes(np.zeros_like(weights))).any() or symmetric is False


def test_narrow_grids_are_as_wide_on_both_sides() -> None:
    weights = weights_of(4)
    grid = fit_range(weights, 8, narrow=True)
    codes = grid.affine.codes(weights).astype(int) - grid.zeros
    assert codes.min() >= -127
    assert np.abs(codes[1:]).max(axis=1).tolist() == [127] * 5
    np.testing.assert_allclose(grid.scales[1:, 0], np.abs(weights[1:]).max(axis=1) / 127, rtol=1e-6)


@pytest.mark.parametrize("bits", BITS)
def test_codes_are_the_nearest_of_all(bits: int) -> None:
    weights = weights_of(5, 3, 64)
    grid = fit_range(weights, bits, 32, symmetric=False).affine
    every = np.arange(2**bits, dtype=np.uint8)
    for row, column in np.ndindex(weights.shape):
        values = grid.step[row, column // 32] * every.astype(np.float64) + grid.offset[row, column // 32]
        best = np.abs(values - weights[row, column]).min()
        chosen = abs(float(values[grid.codes(weights)[row, column]]) - weights[row, column])
        assert chosen <= best + 2e-5 * grid.step[row, column // 32]


@given(seed=st.integers(0, 2**32 - 1), bits=st.sampled_from(BITS), symmetric=st.booleans())
@few
def test_clipping_never_costs_in_any_group(seed: int, bits: int, symmetric: bool) -> None:
    weights = weights_of(seed, 3, 128)
    importance = np.random.default_rng(seed).exponential(size=128)
    errors = []
    for grid in (
        fit_range(weights, bits, 64, symmetric=symmetric),
        fit_mse(weights, bits, 64, symmetric=symmetric, importance=importance),
    ):
        squares = np.square(grid.values(grid.affine.codes(weights)) - weights, dtype=np.float64) * importance
        errors.append(squares.reshape(3, 2, 64).sum(axis=2))
    assert (errors[1] <= errors[0]).all()


def test_clipping_is_worth_it_at_few_bits() -> None:
    weights = np.random.default_rng(0).standard_normal((16, 128)).astype(np.float32)
    errors = []
    for grid in (fit_range(weights, 3, 128), fit_mse(weights, 3, 128)):
        errors.append(np.square(grid.values(grid.affine.codes(weights)) - weights).sum())
    assert errors[1] < 0.8 * errors[0]


def test_tiny_weights_stay_finite() -> None:
    weights = np.array([[0, 0, 1e-45, -1e-45], [0, 1e-30, 1e-38, 0]], np.float32)
    with np.errstate(divide="raise", invalid="raise"):
        for scale_dtype in ("float32", "float16", "bfloat16"):
            for symmetric in (True, False):
                grid = fit_range(weights, 4, scale_dtype=scale_dtype, symmetric=symmetric)  # type: ignore[arg-type]
                assert (grid.scales > 0).all()
                assert np.isfinite(grid.values(grid.affine.codes(weights))).all()


def test_slabs_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, importance = weights_of(6, 50), np.random.default_rng(0).exponential(size=200).astype(np.float32)
    whole = fit_mse(weights, 4, 64, symmetric=False, importance=importance)
    codes = nearest_codes(weights, whole.affine)
    np.testing.assert_array_equal(codes, whole.affine.codes(weights))
    monkeypatch.setattr(grids, "_SLAB_ELEMENTS", 7 * 200)
    cut = fit_mse(weights, 4, 64, symmetric=False, importance=importance)
    np.testing.assert_array_equal(cut.scales, whole.scales)
    np.testing.assert_array_equal(cut.zeros, whole.zeros)
    np.testing.assert_array_equal(nearest_codes(weights, cut.affine), codes)


def test_no_grid_of_five_bits() -> None:
    with pytest.raises(ValueError, match="5 bits"):
        fit_range(weights_of(0), 5)
