"""What becomes of several changes of one tensor: task arithmetic (arXiv 2212.04089), TIES (2306.01708), DARE
(2311.03099) and magnitude pruning, as `peft.utils.merge_utils` computes them, in float32.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lora2edge.contracts import FloatArray


def keep_largest(values: FloatArray, density: float) -> FloatArray:
    """`values` with all but the `int(density * size)` largest magnitudes set to zero; of equal ones the first stay."""
    count = int(density * values.size)
    if density >= 1:
        return values
    sizes = np.abs(values).ravel()
    kept = np.zeros(sizes.size, bool)
    if count:
        bound = np.partition(sizes, sizes.size - count)[sizes.size - count]
        kept = sizes > bound
        kept[np.flatnonzero(sizes == bound)[: count - int(kept.sum())]] = True
    return np.where(kept.reshape(values.shape), values, np.float32(0))


def random_mask(shape: tuple[int, ...], density: float, seed: int, name: str, adapter: int) -> NDArray[np.bool_]:
    """Which entries DARE keeps: a pure function of its arguments (Philox, keyed by seed, tensor and adapter)."""
    key = hashlib.sha256(f"{seed}/{adapter}/{name}".encode()).digest()
    generator = np.random.Generator(np.random.Philox(key=np.frombuffer(key[:16], "<u8")))
    mask: NDArray[np.bool_] = generator.random(shape, dtype=np.float32) < density
    return mask


def drop_random(values: FloatArray, density: float, mask: NDArray[np.bool_]) -> FloatArray:
    """The entries in `mask` divided by `density`, the others zero: the expected value stays."""
    if density >= 1:
        return values
    return np.where(mask, values / np.float32(density), np.float32(0))


def add_weighted(changes: Sequence[FloatArray], weights: Sequence[float]) -> FloatArray:
    """Σ weight · change."""
    total = changes[0] * np.float32(weights[0])
    for change, weight in zip(changes[1:], weights[1:], strict=True):
        total += change * np.float32(weight)
    return total


def merge_elected(changes: Sequence[FloatArray], weights: Sequence[float], majority_sign: str) -> FloatArray:
    """TIES after its pruning: of each entry the mean of the weighted changes that have the sign of the majority.

    `majority_sign`: "total", the sign of the sum of the (unweighted) changes, or "frequency", that of most of them.
    """
    if majority_sign == "total":
        ballot = add_weighted(changes, [1.0] * len(changes))
    else:
        ballot = add_weighted([np.sign(change) for change in changes], [1.0] * len(changes))
    elected = np.where(ballot >= 0, np.float32(1), np.float32(-1))
    total = np.zeros_like(changes[0])
    count = np.zeros_like(changes[0])
    for change, weight in zip(changes, weights, strict=True):
        agrees = np.sign(change) == elected
        total += np.where(agrees, change * np.float32(weight), np.float32(0))
        count += agrees
    total /= np.maximum(count, np.float32(1))
    return total
