"""Intervals: what would change if other texts of the same kind had been measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lora2edge.quality.divergence import Divergence

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Float64Array = NDArray[np.float64]

RESAMPLES = 10_000
PERCENTILE_RESAMPLES = 1_000
"""Of the 99th percentile, which has to sort every position's weight."""
LEAST_GAIN = 1e-4
"""Nats per token, 0.01 % of perplexity: a smaller gain cannot be told from float32 noise, nor a share of it."""
_CHUNK = 500


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure with its 95 % interval; the ends are None where there was one item."""

    value: float
    low: float | None
    high: float | None

    def to_json(self) -> dict[str, float | None]:
        return {"value": self.value, "low": self.low, "high": self.high}


def estimate(
    figure: Callable[..., Any], sums: Mapping[str, Float64Array], seed: int, resamples: int = RESAMPLES
) -> Estimate:
    """`figure` of the sums over all items, with a percentile bootstrap interval (Efron, 1979) over items.

    `sums`: name → `[S]` per-item sums; `figure` takes them by name as numbers, or as arrays of one number a
    resample; of `[S, k]` as k numbers, or as `[resamples, k]`.
    Items, not tokens, are drawn again: tokens of one answer are not independent. Deterministic in `seed`.
    """
    value = float(figure(**{name: values.sum(axis=0) for name, values in sums.items()}))
    items = len(next(iter(sums.values())))
    if items < 2:
        return Estimate(value, None, None)
    drawn = []
    with np.errstate(divide="ignore", invalid="ignore"):
        for weights in _weights(items, resamples, seed):
            drawn.append(figure(**{name: weights @ values for name, values in sums.items()}))
    low, high = np.quantile(np.concatenate(drawn), [0.025, 0.975])
    return Estimate(value, float(low), float(high))


def percentile_estimate(divergence: Divergence, percent: float, seed: int) -> Estimate:
    """A percentile of KL over positions, with its bootstrap interval over items."""
    value = float(np.percentile(divergence.kl_positions, percent))
    items = len(divergence.count)
    if items < 2:
        return Estimate(value, None, None)
    order = np.argsort(divergence.kl_positions)
    ordered = divergence.kl_positions[order]
    owner = np.repeat(np.arange(items), divergence.count)[order]
    drawn = []
    for weights in _weights(items, PERCENTILE_RESAMPLES, seed):
        for row in weights:
            reached = np.cumsum(row[owner])
            drawn.append(ordered[np.searchsorted(reached, percent / 100 * reached[-1])])
    low, high = np.quantile(np.array(drawn, np.float64), [0.025, 0.975])
    return Estimate(value, float(low), float(high))


def gain(base_nll: Float64Array, divergence_nll: Float64Array, count: NDArray[np.int64], seed: int) -> Estimate:
    """NLL(base) − NLL(baseline) in nats per token; arguments are `[S]` sums per item."""
    sums = {"base": base_nll, "tuned": divergence_nll, "count": count.astype(np.float64)}
    return estimate(lambda base, tuned, count: (base - tuned) / count, sums, seed)


def gain_kept(
    base_nll: Float64Array, divergence: Divergence, seed: int, unit: str = "token"
) -> tuple[Estimate | None, str]:
    """(NLL(base) − NLL(artifact)) / gain, or None and the reason why it means nothing here. `unit`: what is scored."""
    bought = gain(base_nll, divergence.nll_reference, divergence.count, seed)
    if bought.low is None:
        return None, "one item is too few for an interval"
    if bought.low <= LEAST_GAIN:
        return None, (
            f"on this text the adapter's gain is {bought.value:.4f} nats per {unit}, and its 95 % interval "
            f"({bought.low:.4f} to {bought.high:.4f}) reaches 0: a share of it means nothing"
        )
    sums = {"base": base_nll, "tuned": divergence.nll_reference, "artifact": divergence.nll_artifact}
    return estimate(lambda base, tuned, artifact: (base - artifact) / (base - tuned), sums, seed), ""


def _weights(items: int, resamples: int, seed: int) -> Iterator[Float64Array]:
    """`[chunk, S]`: how often each item was drawn, `resamples` rows in all."""
    generator = np.random.default_rng(seed)
    share = np.full(items, 1.0 / items)
    for start in range(0, resamples, _CHUNK):
        yield generator.multinomial(items, share, size=min(_CHUNK, resamples - start)).astype(np.float64)
