"""GPTQ against the paper's equations, against brute force, on integer grids and on GGUF's blocks."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora2edge.backends.gguf.blocks import header_grid, replace_codes
from lora2edge.backends.gguf.llama_cpp import Library, load_library
from lora2edge.backends.gguf.mix import TYPES, row_bytes
from lora2edge.checkpoint import slabs
from lora2edge.quantize import (
    Factor,
    GptqOptions,
    Gram,
    Grid,
    corrected,
    factorize,
    fit_mse,
    fit_range,
    gptq,
    gptq_codes,
    gptq_refit,
)
from tests.unit.quantize.reference import output_errors, plain_gptq

few = settings(max_examples=25, deadline=None, derandomize=True, database=None)


def inputs_of(generator: np.random.Generator, tokens: int, columns: int) -> np.ndarray:
    """Correlated channels of different sizes, as a transformer's are."""
    mixing = generator.standard_normal((columns, columns)) / np.sqrt(columns)
    x = generator.standard_normal((tokens, columns)) @ (np.eye(columns) + mixing)
    return (x * np.exp(generator.standard_normal(columns))).astype(np.float32)


def mean_of(x: np.ndarray) -> np.ndarray:
    gram = Gram(x.shape[1], dtype="float64")
    gram.add(x)
    return gram.mean()


def layer(seed: int, rows: int, columns: int, tokens: int = 300) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    return generator.standard_normal((rows, columns)).astype(np.float32), inputs_of(generator, tokens, columns)


@pytest.mark.parametrize("activation_order", [False, True])
@pytest.mark.parametrize("columns", [64, 300, 520])
@pytest.mark.parametrize("bits", [2, 4])
def test_the_codes_are_the_papers(bits: int, columns: int, activation_order: bool) -> None:
    weights, x = layer(columns + bits, 40, columns)
    h = mean_of(x)
    grid = fit_range(weights, bits, 64, symmetric=bits == 4).affine
    expected = plain_gptq(weights, grid, h, 0.01, activation_order)
    double = factorize(h, len(x), GptqOptions(activation_order=activation_order, dtype="float64"))
    np.testing.assert_array_equal(gptq_codes(weights, grid, double), expected)
    single = factorize(h.astype(np.float32), len(x), GptqOptions(activation_order=activation_order))
    assert (gptq_codes(weights, grid, single) == expected).mean() >= 0.995
    assert (expected != grid.codes(weights)).mean() > 0.05  # the feedback does something


@given(seed=st.integers(0, 2**32 - 1))
@few
def test_the_codes_are_the_papers_for_any_small_layer(seed: int) -> None:
    generator = np.random.default_rng(seed)
    rows, columns, tokens = generator.integers(1, 9), generator.integers(1, 40), generator.integers(1, 60)
    weights, x = layer(seed, rows, columns, tokens)
    x[:, generator.random(columns) < 0.1] = 0
    h, grid = mean_of(x), fit_range(weights, 3, 16, symmetric=False).affine
    damping = float(10 ** generator.uniform(-4, -1))
    result = factorize(h, tokens, GptqOptions(damping=damping, dtype="float64"))
    expected = plain_gptq(weights, grid, h, damping, True) if not result.fallback else grid.codes(weights)
    # Of one rank the elimination loses digits that the factorization keeps.
    assert (gptq_codes(weights, grid, result) == expected).mean() > 0.97


@pytest.mark.parametrize("seed", range(6))
def test_the_last_column_is_the_best_that_is_left(seed: int) -> None:
    weights, x = layer(seed, 50, 2)
    grid = fit_range(weights, 2, symmetric=False).affine
    result = factorize(mean_of(x), len(x), GptqOptions(dtype="float64"))
    codes = gptq_codes(weights, grid, result)
    first, second = result.order
    np.testing.assert_array_equal(codes[:, first], grid.codes(weights)[:, first])
    h = mean_of(x)
    h += 0.01 * np.diag(h).mean() * np.eye(2)
    errors = []
    for code in range(4):
        tried = codes.copy()
        tried[:, second] = code
        errors.append(output_errors(weights, grid.values(tried), h))
    np.testing.assert_array_equal(codes[:, second], np.argmin(errors, axis=0))


def test_between_the_best_of_all_codes_and_the_nearest() -> None:
    shares = []
    for seed in range(20):
        weights, x = layer(seed, 4, 5, 40)
        h, grid = mean_of(x), fit_range(weights, 2, symmetric=False).affine
        every = np.array(list(itertools.product(range(4), repeat=5)), np.uint8)
        best = [
            min(output_errors(row[None].repeat(len(every), 0), grid.rows(i, i + 1).values(every), h))
            for i, row in enumerate(weights)
        ]
        result = factorize(h, len(x), GptqOptions(damping=1e-6))
        mine = output_errors(weights, grid.values(gptq_codes(weights, grid, result)), h)
        nearest = output_errors(weights, grid.values(grid.codes(weights)), h)
        assert (mine >= np.array(best) * (1 - 1e-5)).all()
        shares.append(mine.sum() / nearest.sum())
    assert np.mean(shares) < 0.8


@pytest.fixture(scope="module")
def library() -> Library:
    return load_library()


class Headers:
    """ggml's bytes for columns as they stand, kept."""

    def __init__(self, library: Library, name: str, factor: Factor) -> None:
        self.library, self.name, self.factor = library, name, factor
        self.data: list[np.ndarray] = []

    def fit(self, columns: np.ndarray, start: int, stop: int) -> Grid:
        rows, width = columns.shape
        data = np.empty(rows * row_bytes(self.name, width), np.uint8)
        importance = self.factor.importance[start:stop].copy()
        self.library.quantize_chunk(
            TYPES[self.name].id, columns.ctypes.data, data.ctypes.data, 0, rows, width, importance.ctypes.data
        )
        self.data.append(data)
        return header_grid(data, self.name, width)


@pytest.mark.parametrize("name", ["Q4_0", "Q8_0", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q5_0"])
def test_blocks_of_gguf_lose_less_than_llama_cpps_codes(library: Library, name: str) -> None:
    import gguf

    weights, x = layer(3, 32, 512, 2000)
    h = mean_of(x)
    result = factorize(h.astype(np.float32), len(x))
    headers = Headers(library, name, result)
    grid = headers.fit(weights, 0, 512)
    data = replace_codes(headers.data[0], name, gptq_codes(weights, grid, result))
    kind = gguf.GGMLQuantizationType[name]
    mine = output_errors(weights, gguf.quants.dequantize(data, kind).reshape(weights.shape), h).sum()
    theirs = output_errors(weights, gguf.quants.dequantize(headers.data[0], kind).reshape(weights.shape), h).sum()
    assert mine < 0.75 * theirs
    reference = plain_gptq(weights, grid, h, 0.01, True)
    double = factorize(h, len(x), GptqOptions(dtype="float64"))
    np.testing.assert_array_equal(gptq_codes(weights, grid, double), reference)


@pytest.mark.parametrize("name", ["Q4_0", "Q4_K", "Q6_K"])
def test_headers_fitted_on_the_way(library: Library, name: str) -> None:
    weights, x = layer(4, 24, 768, 2000)
    h = mean_of(x)
    result = factorize(h, len(x), GptqOptions(activation_order=False, dtype="float64"))
    headers = Headers(library, name, result)
    codes, grid = gptq_refit(weights, 256, headers.fit, result)
    assert len(headers.data) == 3
    # The same by hand: the columns as the paper's updates leave them.
    damped = h + 0.01 * np.diag(h).mean() * np.eye(768)
    w, again = weights.astype(np.float64), Headers(library, name, result)
    for start in range(0, 768, 256):
        stop = start + 256
        part = again.fit(np.ascontiguousarray(w[:, start:stop], np.float32), start, stop)
        np.testing.assert_array_equal(again.data[-1], headers.data[len(again.data) - 1])
        apart = weights[:, :stop] - grid.values(codes)[:, :stop].astype(np.float64)
        assert part.width == grid.width
        w[:, stop:] = weights[:, stop:] + apart @ damped[:stop, stop:] @ np.linalg.inv(damped[stop:, stop:])
    fixed = Headers(library, name, result).fit(weights, 0, 768)
    static = output_errors(weights, fixed.values(gptq_codes(weights, fixed, result)), h).sum()
    assert output_errors(weights, grid.values(codes), h).sum() < 1.05 * static


def test_refitting_integer_grids() -> None:
    weights, x = layer(5, 16, 256, 1000)
    result = factorize(mean_of(x), len(x), GptqOptions(activation_order=False))
    codes, grid = gptq_refit(weights, 64, lambda columns, _start, _stop: fit_mse(columns, 4).affine, result)
    assert grid.step.shape == (16, 4)
    nearest = fit_mse(weights, 4, 64).affine
    h = mean_of(x)
    mine = output_errors(weights, grid.values(codes), h).sum()
    assert mine < 0.7 * output_errors(weights, nearest.values(nearest.codes(weights)), h).sum()
    with pytest.raises(ValueError, match="order"):
        gptq_refit(weights, 64, lambda columns, *_: fit_range(columns, 4).affine, factorize(mean_of(x), len(x)))


def test_the_corrected_target_is_the_least_squares_one() -> None:
    weights, x = layer(6, 20, 96, 800)
    drifted = (x + 0.1 * np.random.default_rng(1).standard_normal(x.shape)).astype(np.float32)
    gram = Gram(96, paired=True, dtype="float64")
    gram.add(drifted, x)
    difference, h = gram.mean_difference(), gram.mean()
    assert difference is not None
    result = factorize(h, len(x), GptqOptions(damping=0.01, dtype="float64"))
    damping = np.sqrt(len(x) * 0.01 * np.diag(h).mean()) * np.eye(96)
    # Least squares with the weights' change damped: rows of tokens, then of damping.
    change, *_ = np.linalg.lstsq(
        np.concatenate([drifted.astype(np.float64), damping]),
        np.concatenate([(x.astype(np.float64) - drifted) @ weights.T, np.zeros((96, 20))]),
        rcond=None,
    )
    target = corrected(weights, weights @ difference, result)
    np.testing.assert_allclose(target - weights, change.T, atol=2e-5 * np.abs(change).max() + 2e-6)
    outputs = x @ weights.T
    assert np.square(drifted @ target.T - outputs).sum() < np.square(drifted @ weights.T - outputs).sum()


def test_solving_by_blocks_is_solving() -> None:
    weights, x = layer(7, 5, 700, 1500)
    h = mean_of(x)
    result = factorize(h, len(x), GptqOptions(dtype="float64"))
    damped = h + 0.01 * np.diag(h).mean() * np.eye(700)
    expected = np.linalg.solve(damped, weights.T.astype(np.float64)).T
    np.testing.assert_allclose(result.solve(weights), expected, rtol=1e-7, atol=1e-9 * np.abs(expected).max())


def test_codes_do_not_depend_on_cores_or_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, x = layer(8, 600, 320, 700)
    grid = fit_range(weights, 4, 32).affine

    def rounded() -> np.ndarray:
        gram = Gram(320)
        gram.add(x)
        return gptq_codes(weights, grid, factorize(gram.mean(), gram.tokens))

    first = rounded()
    for count in (1, 5):
        for module in (slabs, gptq):
            monkeypatch.setattr(module, "cores", lambda count=count: count)
        np.testing.assert_array_equal(rounded(), first)
    monkeypatch.setattr(gptq, "_SLAB_ELEMENTS", 1)
    np.testing.assert_array_equal(rounded(), first)
    result = factorize(mean_of(x).astype(np.float32), len(x))
    np.testing.assert_array_equal(
        gptq_codes(weights, grid, result)[512:], gptq_codes(weights[512:], grid.rows(512, 600), result)
    )
