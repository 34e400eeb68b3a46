"""The grids that weights are rounded to: step × code + offset, one step and offset for some columns of a row."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

import numpy as np

from lora2edge.checkpoint import in_order

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from lora2edge.contracts import FloatArray

    Codes = NDArray[np.uint8]

ScaleDtype = Literal["float32", "float16", "bfloat16"]

BITS = (2, 3, 4, 8)
_SLAB_ELEMENTS = 1 << 20
"""Weights that a core takes at a time."""
_SHRINK = tuple(1 - 0.01 * step for step in range(51))
"""Shares of a block's range that the clipping search tries: clipping half of it has never been the best."""
_TINY = {"float32": 2.0**-126, "bfloat16": 2.0**-126, "float16": 2.0**-24}
"""The smallest step: below it the stored scale would be 0, or lose its digits."""


@dataclass(frozen=True, slots=True)
class Grid:
    """An affine grid for a matrix `[rows, columns]`: column k of a row has the values step × code + offset.

    What int grids and the blocks of GGUF have in common, and all that a rounding method needs to know of either.
    """

    step: FloatArray
    """float32 `[rows, groups]`; may be negative; 0 in a block of zeros."""
    offset: FloatArray
    """float32 `[rows, groups]`."""
    width: int
    """Columns of one group. The last group may be shorter."""
    low: int
    """The smallest code, 0 or more."""
    high: int
    """The largest code, 255 or less."""

    def codes(self, weights: FloatArray) -> Codes:
        """The nearest code of each weight: `[rows, columns]` uint8. Ties go to the even code; 0 where the step is 0."""
        columns = weights.shape[1]
        scaled = weights - spread(self.offset, self.width, columns)
        scaled /= spread(divisors(self.step), self.width, columns)
        np.rint(scaled, out=scaled)
        return np.clip(scaled, self.low, self.high, out=scaled).astype(np.uint8)

    def values(self, codes: Codes) -> FloatArray:
        """step × code + offset: float32 of the codes' shape."""
        columns = codes.shape[1]
        values = codes * spread(self.step, self.width, columns)
        values += spread(self.offset, self.width, columns)
        return values

    def rows(self, start: int, stop: int) -> Grid:
        """The grid of rows `start:stop`, a view."""
        return Grid(self.step[start:stop], self.offset[start:stop], self.width, self.low, self.high)


@dataclass(frozen=True, slots=True)
class IntGrid:
    """An integer grid as checkpoints and runtimes state it: value = scale × (code − zero), codes unsigned.

    A format with signed codes stores code − 2^(bits − 1) and zero − 2^(bits − 1).
    """

    bits: int
    scales: FloatArray
    """float32 `[rows, groups]`, above 0, exactly representable in the dtype that was asked for."""
    zeros: Codes
    """uint8 `[rows, groups]`."""
    width: int
    """Columns of one group; of a channel-wise grid, all."""
    low: int = 0

    @property
    def affine(self) -> Grid:
        """The same as an affine grid; of 16-bit scales with exactly the same values."""
        return Grid(self.scales, -self.scales * self.zeros, self.width, self.low, 2**self.bits - 1)

    def values(self, codes: Codes) -> FloatArray:
        """scale × (code − zero): float32, one rounding."""
        columns = codes.shape[1]
        steps = codes.astype(np.float32) - spread(self.zeros, self.width, columns)
        steps *= spread(self.scales, self.width, columns)
        return steps


def fit_range(
    weights: FloatArray,
    bits: int,
    group: int | None = None,
    *,
    symmetric: bool = True,
    narrow: bool = False,
    scale_dtype: ScaleDtype = "float32",
) -> IntGrid:
    """The grid that covers each group's whole range; `group` None is one group a row (a channel).

    `symmetric`: zero is 2^(bits − 1) and scale is 2 × largest magnitude / (2^bits − 1), as GPTQ's and
    compressed-tensors' files have it. `narrow` (symmetric only): the code 0 is left out and the scale is largest
    magnitude / (2^(bits − 1) − 1), so that the grid is as wide on both sides: the int8 weights of ONNX Runtime and
    TensorRT. Asymmetric: the range is widened to hold 0, and 0 is exactly a grid value.
    """
    return _fit_slabs(weights, partial(_fit, bits, group, symmetric, narrow, scale_dtype, (1.0,), None))


def fit_mse(
    weights: FloatArray,
    bits: int,
    group: int | None = None,
    *,
    symmetric: bool = True,
    narrow: bool = False,
    scale_dtype: ScaleDtype = "float32",
    importance: FloatArray | None = None,
) -> IntGrid:
    """The grid over that share of each group's range, 100 % to 50 %, whose squared error is least.

    `importance`: `[columns]` weights of the squares, such as the mean squares of the inputs. Never above the error of
    `fit_range`, which is among what is tried.
    """
    return _fit_slabs(weights, partial(_fit, bits, group, symmetric, narrow, scale_dtype, _SHRINK, importance))


def nearest_codes(weights: FloatArray, grid: Grid) -> Codes:
    """Round-to-nearest: `Grid.codes` of all rows, on all cores, with the memory of a slab a core."""
    codes = np.empty(weights.shape, np.uint8)

    def round_slab(rows: slice) -> None:
        codes[rows] = grid.rows(rows.start, rows.stop).codes(weights[rows])

    for _ in in_order(round_slab, _slabs(weights)):
        pass
    return codes


def spread(of_groups: NDArray[np.generic], width: int, columns: int) -> FloatArray:
    """`[rows, groups]` repeated to one value a column: `[rows, columns]`."""
    return np.repeat(of_groups, width, axis=1)[:, :columns]


def divisors(step: FloatArray) -> FloatArray:
    """What to divide by: the step, and infinity instead of 0, so that such a block's codes are 0 (or the lowest)."""
    return np.where(step == 0, np.float32(np.inf), step)


def _slabs(weights: FloatArray) -> Iterator[slice]:
    rows = max(_SLAB_ELEMENTS // weights.shape[1], 1)
    return (slice(start, start + rows) for start in range(0, len(weights), rows))


def _fit_slabs(weights: FloatArray, fit: Callable[[FloatArray], IntGrid]) -> IntGrid:
    """`fit` of all rows, on all cores, with the memory of a slab a core."""
    grids = [grid for _, grid in in_order(lambda rows: fit(weights[rows]), _slabs(weights))]
    scales, zeros = (np.concatenate([getattr(grid, name) for grid in grids]) for name in ("scales", "zeros"))
    return IntGrid(grids[0].bits, scales, zeros, grids[0].width, grids[0].low)


def _fit(
    bits: int,
    group: int | None,
    symmetric: bool,
    narrow: bool,
    scale_dtype: ScaleDtype,
    shares: tuple[float, ...],
    importance: FloatArray | None,
    weights: FloatArray,
) -> IntGrid:
    if bits not in BITS or (narrow and not symmetric):
        raise ValueError(f"{bits} bits, symmetric {symmetric}, narrow {narrow}: no such grid")
    columns = weights.shape[1]
    width = min(group or columns, columns)
    starts = np.arange(0, columns, width)
    bottom = np.minimum(np.minimum.reduceat(weights, starts, axis=1), 0)
    top = np.maximum(np.maximum.reduceat(weights, starts, axis=1), 0)
    if symmetric:
        top = np.maximum(-bottom, top)
        bottom = -top
    low, high = int(narrow), 2**bits - 1

    def over(share: float) -> IntGrid:
        scales = _stored((top - bottom) * np.float32(share / (high - low)), scale_dtype)
        zeros = np.full(scales.shape, 2.0 ** (bits - 1)) if symmetric else np.rint(-bottom * np.float32(share) / scales)
        return IntGrid(bits, scales, np.clip(zeros, 0, high).astype(np.uint8), width, low)

    best = over(shares[0])
    if len(shares) == 1:
        return best

    def errors_of(grid: IntGrid) -> NDArray[np.float64]:
        squares = np.square(grid.values(grid.affine.codes(weights)) - weights, dtype=np.float64)
        return np.add.reduceat(squares if importance is None else squares * importance, starts, axis=1)

    least = errors_of(best)
    scales, zeros = best.scales, best.zeros
    for share in shares[1:]:
        tried = over(share)
        errors = errors_of(tried)
        better = errors < least
        least = np.minimum(errors, least)
        scales, zeros = np.where(better, tried.scales, scales), np.where(better, tried.zeros, zeros)
    return IntGrid(bits, scales, zeros, width, low)


def _stored(scales: FloatArray, dtype: ScaleDtype) -> FloatArray:
    """`scales` rounded to what the file stores, as float32; never 0, subnormal or infinite in float32."""
    if dtype == "float16":
        with np.errstate(over="ignore"):
            scales = np.minimum(scales.astype(np.float16), np.float16(65504)).astype(np.float32)
    elif dtype == "bfloat16":
        bits = np.ascontiguousarray(scales, np.float32).view(np.uint32)
        scales = ((bits + 0x7FFF + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)).view(np.float32)
    return np.maximum(scales.astype(np.float32), np.float32(_TINY[dtype]))
