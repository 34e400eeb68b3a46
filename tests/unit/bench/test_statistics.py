from __future__ import annotations

import numpy as np
import pytest

from lora2edge.bench.statistics import geometric_mean, percentiles, ratio_of_rounds, student_t95, thin


def test_percentiles_say_how_many_values_they_are_of() -> None:
    assert percentiles([]) == {"p50": None, "p95": None, "p99": None, "n": 0}
    assert percentiles([3.0]) == {"p50": 3.0, "p95": 3.0, "p99": 3.0, "n": 1}
    result = percentiles(list(range(101)))
    assert (result["p50"], result["p95"], result["p99"], result["n"]) == (50, 95, 99, 101)


def test_the_mean_of_a_ratio_and_of_its_inverse_agree() -> None:
    assert geometric_mean([2.0, 0.5]) == pytest.approx(1)
    ratio, inverse = ratio_of_rounds([1.5, 2.0, 3.0]), ratio_of_rounds([1 / 1.5, 1 / 2.0, 1 / 3.0])
    assert ratio.low is not None and inverse.high is not None
    assert ratio.value == pytest.approx(1 / inverse.value)
    assert ratio.low == pytest.approx(1 / inverse.high)


def test_the_interval_is_that_of_a_textbook() -> None:
    # logs 0, 1, 2: mean 1, standard error 1/sqrt(3), t(2) = 4.303
    ratio = ratio_of_rounds([1.0, np.e, np.e**2])
    assert ratio.low is not None and ratio.high is not None
    assert np.log([ratio.low, ratio.value, ratio.high]) == pytest.approx([1 - 4.303 / 3**0.5, 1, 1 + 4.303 / 3**0.5])


def test_one_round_has_no_interval() -> None:
    assert ratio_of_rounds([2.0]).low is None and ratio_of_rounds([2.0]).value == pytest.approx(2)


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    random = np.random.default_rng(7)
    for rounds in (3, 6):
        held = 0
        for _ in range(2000):
            ratio = ratio_of_rounds(list(2.0 * np.exp(random.normal(0, 0.05, rounds))))
            assert ratio.low is not None and ratio.high is not None
            held += ratio.low <= 2.0 <= ratio.high
        assert 0.93 < held / 2000 < 0.97


def test_student_t_joins_its_expansion() -> None:
    assert student_t95(31) == pytest.approx(2.0395, abs=1e-4)
    assert student_t95(1000) == pytest.approx(1.9623, abs=1e-4)
    values = [student_t95(freedom) for freedom in range(1, 60)]
    assert values == sorted(values, reverse=True)


def test_thinning_keeps_ends_and_shape() -> None:
    values = list(np.random.default_rng(0).exponential(10, 5000))
    kept = thin(values)
    assert len(kept) == 400 and kept == sorted(kept)
    assert (kept[0], kept[-1]) == pytest.approx((min(values), max(values)), abs=1e-3)
    assert np.median(kept) == pytest.approx(np.median(values), rel=0.02)
    assert thin([3.0, 1.0]) == [1.0, 3.0]
