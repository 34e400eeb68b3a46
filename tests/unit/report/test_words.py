from __future__ import annotations

from itertools import pairwise

import pytest

from lora2edge.report import words
from lora2edge.report.svg import Scale, linear, logarithmic, spread, steps


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"), (0, "0"), (0.6, "0.600"), (1.018, "1.02"), (97.14, "97.1"), (1234.5, "1234"), (-2.5, "-2.50"),
        (6.1e-4, "6.10e-4"), (2e7, "2.00e7"), (0.00123, "0.00123"),
    ],
)  # fmt: skip
def test_figures(value: float | None, text: str) -> None:
    assert words.figure(value) == text


def test_units() -> None:
    assert words.size(531_068_480) == "531 MB" and words.size(1.78e9) == "1.78 GB" and words.size(12) == "12 B"
    assert words.duration(0.52) == "0.52 s" and words.duration(59) == "59 s" and words.duration(3700) == "1 h 1 min"
    assert words.percent(0.9714) == "97.1\u00a0%" and words.times(2.31) == "2.31\u00a0×"
    assert words.count(18233) == "18\u202f233"
    assert words.bound("gain_kept", "≥ 0.95 and ≤ 1.5") == "≥ 95\u00a0% and ≤ 150\u00a0%"
    assert words.bound("flips", "≤ 1e-05") == "≤ 0.001\u00a0%"
    assert words.bound("kl_mean", "≤ 0.05") == "≤ 0.05"


def test_an_interval_without_ends_is_not_made_up() -> None:
    assert words.interval({"low": None, "high": None}) == "" and words.interval(None) == ""


@pytest.mark.parametrize(
    ("low", "high", "log"), [(0, 988, False), (0.54, 1.03, False), (1e-6, 0.5, True), (17, 58, True)]
)
def test_ticks_are_few_round_and_inside(low: float, high: float, log: bool) -> None:
    ticks = Scale(low, high, 0, 100, log).ticks()
    assert 2 <= len(ticks) <= 8 and ticks == sorted(ticks)
    assert all(low <= tick <= high for tick in ticks)
    assert all(len(f"{tick:.3g}") <= 6 for tick in ticks)


@pytest.mark.parametrize("values", [[1.0], [0.5, 0.5], [1e-9, 1.0]])
def test_scales_of_few_or_equal_values(values: list[float]) -> None:
    for scale in (linear(values, 10, 90), logarithmic(values, 10, 90), linear(values, 10, 90, zero=True)):
        assert all(10 <= scale(value) <= 90 for value in values) and scale.ticks()


def test_a_logarithmic_scale_is_logarithmic() -> None:
    scale = Scale(0.01, 100, 0, 400, log=True)
    assert [scale(value) for value in (0.01, 0.1, 1, 10, 100)] == [0, 100, 200, 300, 400]


def test_labels_are_kept_apart_and_inside() -> None:
    placed = spread([50, 51, 52, 99, 100], 14, 10, 100)
    assert all(10 <= place <= 100 for place in placed)
    ordered = sorted(placed)
    assert all(after - before >= 13.999 for before, after in pairwise(ordered))


def test_steps_are_the_empirical_distribution() -> None:
    corners = steps([1.0, 2.0, 4.0, 8.0])
    assert (2.0, 0.5) in corners and corners[0] == (1.0, 0.0) and corners[-1] == (8.0, 1.0)
