"""Planted faults: inputs and weights that break a plain GPTQ. Finite codes or one clear error, and the log tells."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from lora2edge.backends.gguf.blocks import header_grid, replace_codes
from lora2edge.backends.gguf.llama_cpp import load_library
from lora2edge.backends.gguf.mix import TYPES, row_bytes
from lora2edge.errors import CheckpointError
from lora2edge.quantize import (
    Factor,
    GptqOptions,
    Gram,
    Grid,
    RoundingLog,
    corrected,
    factorize,
    fit_range,
    gptq_codes,
    gptq_refit,
)

ROWS, COLUMNS = 24, 256
WEIGHTS = np.random.default_rng(0).standard_normal((ROWS, COLUMNS)).astype(np.float32)
INPUTS = np.random.default_rng(1).standard_normal((700, COLUMNS)).astype(np.float32)
GRID = fit_range(WEIGHTS, 4, 64).affine


def factor_of(inputs: np.ndarray, options: GptqOptions | None = None) -> Factor:
    gram = Gram(COLUMNS)
    gram.add(inputs)
    return factorize(gram.mean(), gram.tokens, options, dropped_tokens=gram.dropped_tokens)


def check(factor: Factor, weights: np.ndarray = WEIGHTS, grid: Grid = GRID) -> tuple[np.ndarray, RoundingLog]:
    """Codes in range and values finite, on integer grids and on blocks; the log can be written as JSON."""
    codes = gptq_codes(weights, grid, factor)
    assert codes.min() >= grid.low
    assert codes.max() <= grid.high
    assert np.isfinite(grid.values(codes)).all()
    assert np.isfinite(factor.importance).all()
    assert (factor.importance > 0).all()
    for name in ("Q4_0", "Q4_K", "Q6_K"):
        data = np.empty(ROWS * row_bytes(name, COLUMNS), np.uint8)
        load_library().quantize_chunk(
            TYPES[name].id, weights.ctypes.data, data.ctypes.data, 0, ROWS, COLUMNS, factor.importance.ctypes.data
        )
        blocks = header_grid(data, name, COLUMNS)
        other = gptq_codes(weights, blocks, factor)
        assert np.isfinite(blocks.values(other)).all()
        assert len(replace_codes(data, name, other)) == len(data)
    log = RoundingLog()
    log.add("blk.0.ffn_down.weight", grid, factor)
    assert json.loads(json.dumps(log.to_json(), allow_nan=False)) == log.to_json()
    return codes, log


def test_a_sound_layer_needs_no_words() -> None:
    _, log = check(factor_of(INPUTS))
    assert log.notes() == []
    assert log.to_json() == {"tensors": 1, "by_method": {"gptq": 1}, "unusual": []}


def test_tokens_that_are_not_finite() -> None:
    broken = INPUTS.copy()
    broken[5, 3], broken[8, 200], broken[8, 201] = np.nan, np.inf, -np.inf
    codes, log = check(factor_of(broken))
    np.testing.assert_array_equal(codes, gptq_codes(WEIGHTS, GRID, factor_of(np.delete(INPUTS, [5, 8], 0))))
    assert log.entries[0].dropped_tokens == 2
    assert "2 calibration tokens" in log.notes()[0]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_inputs_none_of_which_is_finite(value: float) -> None:
    codes, log = check(factor_of(np.full_like(INPUTS, value)))
    np.testing.assert_array_equal(codes, GRID.codes(WEIGHTS))
    assert log.entries[0].fallback == "no tokens"
    assert log.entries[0].dropped_tokens == 700
    assert "1 of 1 tensors were rounded to nearest, without GPTQ: no tokens" in log.notes()


def test_inputs_whose_squares_leave_float32() -> None:
    codes, log = check(factor_of(INPUTS * np.float32(1e30)))
    np.testing.assert_array_equal(codes, GRID.codes(WEIGHTS))
    assert log.entries[0].fallback == "H is not finite"


@pytest.mark.parametrize("size", [1e-30, 1e-15, 1e15])
def test_very_small_and_large_inputs(size: float) -> None:
    result = factor_of(INPUTS * np.float32(size))
    codes, _ = check(result)
    expected = GRID.codes(WEIGHTS) if size == 1e-30 else gptq_codes(WEIGHTS, GRID, factor_of(INPUTS))
    assert (codes == expected).mean() > 0.99


def test_channels_that_are_always_zero_are_rounded_to_nearest() -> None:
    dead = [0, 77, 255]
    inputs = INPUTS.copy()
    inputs[:, dead] = 0
    codes, log = check(factor_of(inputs))
    np.testing.assert_array_equal(codes[:, dead], GRID.codes(WEIGHTS)[:, dead])
    live = np.delete(np.arange(COLUMNS), dead)
    # The others come out as if the dead were not there.
    grid = fit_range(WEIGHTS, 4, 1).affine
    without = Grid(grid.step[:, live], grid.offset[:, live], 1, 0, 15)
    gram = Gram(len(live))
    gram.add(INPUTS[:, live])
    alone = gptq_codes(WEIGHTS[:, live], without, factorize(gram.mean(), gram.tokens))
    assert (gptq_codes(WEIGHTS, grid, factor_of(inputs))[:, live] == alone).mean() > 0.999
    assert log.entries[0].dead_channels == 3
    # In fitting a header they count for next to nothing.
    assert factor_of(inputs).importance[dead] == pytest.approx(0.01)
    assert log.notes() == ["3 input channels of 1 tensors were always zero: rounded to nearest there"]


def test_all_channels_zero() -> None:
    codes, log = check(factor_of(np.zeros_like(INPUTS)))
    np.testing.assert_array_equal(codes, GRID.codes(WEIGHTS))
    assert log.entries[0].fallback == "inputs all zero"


def test_no_token_and_one_token() -> None:
    codes, log = check(factor_of(INPUTS[:0]))
    np.testing.assert_array_equal(codes, GRID.codes(WEIGHTS))
    assert log.entries[0].fallback == "no tokens"
    codes, log = check(factor_of(INPUTS[:1]))
    assert log.entries[0].fallback is None
    # One input: its output comes out nearer than with the nearest codes.
    exact = WEIGHTS @ INPUTS[0]
    errors = [np.abs(GRID.values(tried) @ INPUTS[0] - exact).mean() for tried in (codes, GRID.codes(WEIGHTS))]
    assert errors[0] < 0.2 * errors[1]


def test_rank_one_without_damping_is_damped_until_it_factors() -> None:
    ones = np.ones((100, COLUMNS), np.float32)
    result = factor_of(ones, GptqOptions(damping=0.0))
    _, log = check(result)
    assert result.fallback is None
    assert 0 < result.damping <= 0.1
    assert log.entries[0].damping == result.damping


def test_damping_is_raised_tenfold_where_h_is_not_positive() -> None:
    gram = Gram(COLUMNS)
    gram.add(INPUTS)
    mean = gram.mean()
    mean -= np.float32(0.55 * mean.diagonal().mean()) * np.eye(COLUMNS, dtype=np.float32)
    result = factorize(mean, 700, GptqOptions(damping=0.01))
    _, log = check(result)
    assert result.damping == pytest.approx(1.0) or result.damping == pytest.approx(0.1)
    assert log.notes() == [f"1 tensors needed more damping than was asked for, up to {result.damping:g}"]


def test_where_no_damping_helps_the_nearest_codes_are_taken() -> None:
    mean = np.full((COLUMNS, COLUMNS), -5.0, np.float32)
    np.fill_diagonal(mean, 1.0)
    codes, log = check(factorize(mean, 700))
    np.testing.assert_array_equal(codes, GRID.codes(WEIGHTS))
    assert log.entries[0].fallback == "factorization failed"
    assert log.entries[0].method == "nearest"
    result = factorize(mean, 700, GptqOptions(activation_order=False))
    refitted, grid = gptq_refit(WEIGHTS, 64, lambda part, *_: fit_range(part, 4).affine, result)
    np.testing.assert_array_equal(refitted, GRID.codes(WEIGHTS))
    np.testing.assert_array_equal(grid.step, GRID.step)


def test_blocks_of_zeros() -> None:
    weights = WEIGHTS.copy()
    weights[:, :128], weights[3] = 0, 0
    grid = fit_range(weights, 4, 64, symmetric=False)
    zero = replace(grid.affine, step=np.where(grid.scales < 1e-30, 0, grid.scales))
    _, log = check(factor_of(INPUTS), weights, zero)
    assert log.entries[0].zero_groups == 2 * ROWS + 2


def test_weights_and_grids_that_are_not_finite_are_refused() -> None:
    broken = WEIGHTS.copy()
    broken[2, 2] = np.nan
    factor = factor_of(INPUTS)
    infinite = replace(GRID, step=np.where(GRID.step > 0, np.inf, GRID.step))
    for weights, grid, result in (
        (broken, GRID, factor),
        (WEIGHTS, infinite, factor),
        (broken, GRID, factor_of(INPUTS[:0])),
    ):
        with pytest.raises(CheckpointError) as caught:
            gptq_codes(weights, grid, result)
        assert caught.value.code == "rounding-not-finite"


def test_feedback_that_leaves_float32_is_refused() -> None:
    weights = WEIGHTS * np.float32(1e37)
    factor = factor_of(np.exp(5 * INPUTS[:1]), GptqOptions(damping=1e-6))
    with pytest.raises(CheckpointError) as caught, np.errstate(over="ignore", invalid="ignore"):
        gptq_codes(weights, fit_range(weights, 4, 64).affine, factor)
    assert caught.value.code == "rounding-not-finite"


@pytest.mark.parametrize("size", [np.inf, np.nan, 1e9])
def test_a_correction_that_no_grid_can_hold_is_not_made(size: float) -> None:
    """Of rows where it is not finite, or beyond what a half can scale; the others get theirs."""
    shift = np.full((ROWS, COLUMNS), 0.01, np.float32)
    shift[1:3] = size
    target = corrected(WEIGHTS, shift, factor_of(INPUTS))
    np.testing.assert_array_equal(target[1:3], WEIGHTS[1:3])
    assert (target[0] != WEIGHTS[0]).any()
    assert (target[3:] != WEIGHTS[3:]).any(axis=1).all()
    assert corrected(WEIGHTS, shift, factor_of(INPUTS[:0])) is WEIGHTS


def test_the_log_adds_up_slabs_and_tensors() -> None:
    log, factor = RoundingLog(), factor_of(INPUTS)
    zero = replace(GRID, step=np.zeros_like(GRID.step))
    for tensor, grid in (("b", zero.rows(0, 1)), ("a", zero.rows(0, 1)), ("b", zero.rows(1, 3)), ("c", GRID)):
        log.add(tensor, grid, factor)
    assert [(entry.tensor, entry.zero_groups) for entry in log.entries] == [("a", 4), ("b", 12), ("c", 0)]
    assert [entry["tensor"] for entry in log.to_json()["unusual"]] == ["a", "b"]


@pytest.mark.parametrize(("rows", "damping"), [(25600, 0.01), (2560, 0.1), (512, 0.5), (256, 1.0), (10, 1.0)])
def test_few_tokens_are_damped_more(rows: int, damping: float) -> None:
    gram = Gram(COLUMNS)
    gram.add(np.random.default_rng(2).standard_normal((rows, COLUMNS)).astype(np.float32))
    result = factorize(gram.mean(), gram.tokens, GptqOptions(sampling=1.0), rows=gram.rows)
    _, log = check(result)
    assert result.damping == pytest.approx(damping)
    assert result.scarce is (rows <= COLUMNS)
    assert ["as many input channels" in note for note in log.notes()] == [True] * result.scarce


def test_repetitions_are_no_more_text() -> None:
    gram = Gram(COLUMNS)
    gram.add(INPUTS[:100], times=50)
    assert (gram.tokens, gram.rows) == (5000, 100)
    whole = Gram(COLUMNS)
    whole.add(np.tile(INPUTS[:100], (50, 1)))
    mean = gram.mean()
    np.testing.assert_allclose(mean, whole.mean(), atol=1e-4)
    assert factorize(mean, 5000, GptqOptions(sampling=1.0), rows=100).damping == 1.0
