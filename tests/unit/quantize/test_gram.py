"""XᵀX from slabs, and the tokens that must not get in."""

from __future__ import annotations

import numpy as np
import pytest

from lora2edge.checkpoint import slabs
from lora2edge.quantize import Gram

X = np.random.default_rng(0).standard_normal((2500, 300)).astype(np.float32)
R = X + np.float32(0.1) * np.random.default_rng(1).standard_normal(X.shape).astype(np.float32)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_mean_is_numpys(dtype: str) -> None:
    gram = Gram(300, paired=True, dtype=dtype)  # type: ignore[arg-type]
    for start in range(0, 2500, 700):
        gram.add(X[start : start + 700], R[start : start + 700])
    assert gram.tokens == 2500
    wide, reference = X.astype(np.float64), R.astype(np.float64)
    tolerance = 1e-6 if dtype == "float32" else 1e-14
    difference = gram.mean_difference()
    assert difference is not None
    np.testing.assert_allclose(difference, (reference - wide).T @ wide / 2500, atol=1e-6)
    mean = gram.mean()
    np.testing.assert_array_equal(mean, mean.T)
    np.testing.assert_allclose(mean, wide.T @ wide / 2500, atol=tolerance)


def test_the_sum_does_not_depend_on_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    means = []
    for count in (1, 2, 7):
        monkeypatch.setattr(slabs, "cores", lambda count=count: count)
        gram = Gram(300)
        gram.add(X)
        means.append(gram.mean())
    np.testing.assert_array_equal(means[0], means[1])
    np.testing.assert_array_equal(means[0], means[2])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_token_that_is_not_finite_is_left_out(value: float) -> None:
    broken, other = X.copy(), R.copy()
    broken[3, 5] = broken[1999, 0] = value
    other[77, 299] = value
    gram = Gram(300, paired=True)
    gram.add(broken, other)
    assert (gram.tokens, gram.dropped_tokens) == (2497, 3)
    sound = np.delete(np.arange(2500), [3, 77, 1999])
    clean = Gram(300)
    clean.add(X[sound])
    np.testing.assert_allclose(gram.mean(), clean.mean(), atol=1e-6)


def test_without_a_token_it_is_zero() -> None:
    gram = Gram(4)
    gram.add(np.full((3, 4), np.nan, np.float32))
    assert (gram.tokens, gram.dropped_tokens) == (0, 3)
    assert not gram.mean().any()


def test_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="300"):
        Gram(300).add(X[:, :200])
    with pytest.raises(ValueError, match="reference"):
        Gram(300).add(X, R)
    with pytest.raises(ValueError, match="reference"):
        Gram(300, paired=True).add(X)


def test_weights_times_the_difference() -> None:
    generator = np.random.default_rng(3)
    inputs, reference = (generator.standard_normal((1500, 300)).astype(np.float32) for _ in range(2))
    inputs[7, 3] = np.nan
    weights = generator.standard_normal((40, 300)).astype(np.float32)
    whole, product = Gram(300, paired=True), Gram(300, weights=weights)
    for gram in (whole, product):
        gram.add(inputs, reference)
    assert product.dropped_tokens == 1
    np.testing.assert_array_equal(product.mean(), whole.mean())
    difference, found = whole.mean_difference(), product.mean_difference()
    assert difference is not None and found is not None
    assert found.shape == (40, 300)
    np.testing.assert_allclose(found, weights @ difference, rtol=1e-3, atol=1e-2)
