"""GPTQ (https://arxiv.org/abs/2210.17323): each column's rounding error is made up for in the columns after it.

Rows do not depend on each other: whoever has a slab of rows, its grid and the layer's factor can round it. The grid is
any affine one, of integers or of GGUF's blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

from lora2edge.checkpoint import cores, one_blas_thread
from lora2edge.errors import CheckpointError
from lora2edge.quantize.factor import Factor
from lora2edge.quantize.grid import Grid, divisors, nearest_codes

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lora2edge.contracts import FloatArray
    from lora2edge.quantize.grid import Codes

    Fit = Callable[[FloatArray, int, int], Grid]

_BLOCK = 128
"""Columns after which the later ones get their share of the errors."""
_INNER = 32
"""The same within a block: vectors times matrix inside, one product of matrices after."""
_SLAB_ELEMENTS = 1 << 24
"""Weights rounded at a time. The walk over the columns has one thread, for which long columns are cheap; slabs on a
thread each waited for Python's lock, and two of them took longer than one."""
_LARGEST_HALF = np.float32(65504)
_PART_ROWS = 512
"""Rows of one product of matrices, each on a core. Fixed, so that codes do not depend on the number of cores."""


def gptq_codes(weights: FloatArray, grid: Grid, factor: Factor) -> Codes:
    """Codes of `weights` (`[rows, columns]` float32) on `grid`: uint8 of the same shape.

    Uses all cores; takes 13 bytes a weight beside, of at most 16 million weights (or 512 rows) at a time. Where the
    factor is a fall-back, the nearest codes. Raises CheckpointError for a weight or a grid that is not finite.
    """
    _check(weights, grid)
    if factor.fallback:
        return nearest_codes(weights, grid)
    codes = np.empty(weights.shape, np.uint8)
    rows = max(_SLAB_ELEMENTS // weights.shape[1] // _PART_ROWS, 1) * _PART_ROWS
    with one_blas_thread(), ThreadPoolExecutor(cores()) as pool:
        for start in range(0, len(weights), rows):
            stop = start + rows
            slab = _Slab(weights[start:stop], factor, pool)
            slab.round_static(grid.rows(start, stop))
            codes[start:stop] = slab.finished()
    return codes


def gptq_refit(weights: FloatArray, width: int, fit: Fit, factor: Factor) -> tuple[Codes, Grid]:
    """The same with grids that `fit` makes of the columns as they stand when their turn comes.

    `fit(columns, start, stop)`: `[rows, stop − start]` float32 → their grid, each `width` columns; what else it learns
    (the bytes of a header) it keeps. All rows at once: 13 bytes a weight. Raises ValueError with activation order,
    whose columns come in no groups, and for a `width` that is no multiple of 32.
    """
    columns = weights.shape[1]
    if width % _INNER or (factor.order != np.arange(columns)).any():
        raise ValueError(f"grids of {width} columns cannot be fitted on the way in this order of columns")
    _check(weights, None)
    if factor.fallback:
        grids = [fit(weights[:, start : start + width], start, start + width) for start in range(0, columns, width)]
        joined = _joined(grids)
        return nearest_codes(weights, joined), joined
    with one_blas_thread(), ThreadPoolExecutor(cores()) as pool:
        slab = _Slab(weights, factor, pool)
        joined = _joined(slab.round_refitted(width, fit))
    return slab.finished(), joined


def corrected(weights: FloatArray, shift: NDArray[Any], factor: Factor) -> FloatArray:
    """W* = W + W (R − X)ᵀX / n (H + λ)⁻¹: what to round so that the outputs come near those for the inputs R.

    Least squares towards the 16-bit model's outputs W R, given the inputs X of the layers quantized so far (GPTAQ,
    https://arxiv.org/abs/2504.02692, has the same aim). `shift`: W times `Gram.mean_difference()`, `[rows, columns]`.
    `weights` themselves where the factor is a fall-back, and rows of them where the correction is not finite or leaves
    the range of a half, which the scales of a grid may be stored in.
    """
    if factor.fallback:
        return weights
    with np.errstate(over="ignore", invalid="ignore"):
        target: FloatArray = (weights + factor.solve(shift)).astype(np.float32)
        peaks = np.maximum(target.max(1), -target.min(1))
    wild = ~(peaks <= np.maximum(np.maximum(weights.max(1), -weights.min(1)), _LARGEST_HALF))
    target[wild] = weights[wild]
    return target


class _Slab:
    """Some rows while they are rounded, turned so that a column lies in one piece: `[columns, rows]`."""

    def __init__(self, weights: FloatArray, factor: Factor, pool: ThreadPoolExecutor) -> None:
        self._factor = factor
        self._pool = pool
        dtype = factor.unit.dtype
        self._weights = weights.T[factor.order].astype(dtype)
        self._shift = np.zeros_like(self._weights)
        """What the errors of the columns before add to each column."""
        self._codes = np.empty(self._weights.shape, np.uint8)

    def finished(self) -> Codes:
        """`[rows, columns]`, in the matrix' order. Raises CheckpointError where the feedback left its dtype."""
        if not np.isfinite(self._shift).all():
            raise _not_finite("the errors of a matrix' columns add up to NaN or infinity")
        codes = np.empty_like(self._codes)
        codes[self._factor.order] = self._codes
        return np.ascontiguousarray(codes.T)

    def round_static(self, grid: Grid) -> None:
        turned = _Turned(grid, self._weights.dtype)
        groups = self._factor.order // grid.width
        for start in range(0, len(self._weights), _BLOCK):
            self._block(start, min(start + _BLOCK, len(self._weights)), turned, groups)

    def round_refitted(self, width: int, fit: Fit) -> list[Grid]:
        """The grids of each `width` columns."""
        unit, grids = self._factor.unit, []
        for start in range(0, len(self._weights), width):
            stop = min(start + width, len(self._weights))
            # Where these columns would stand if none of them were rounded.
            drift = np.linalg.solve(unit[start:stop, start:stop].T, self._shift[start:stop])
            columns = np.ascontiguousarray((self._weights[start:stop] + drift).T, np.float32)
            grid = fit(columns, start, stop)
            _check(columns, grid)
            self._block(start, stop, _Turned(grid, unit.dtype), (np.arange(stop) - start) // grid.width)
            grids.append(grid)
        return grids

    def _block(self, start: int, stop: int, grid: _Turned, groups: NDArray[np.int64]) -> None:
        errors = np.empty((stop - start, self._weights.shape[1]), self._weights.dtype)
        for first in range(start, stop, _INNER):
            last = min(first + _INNER, stop)
            part = errors[first - start : last - start]
            self._columns(first, last, grid, groups, part)
            self._pass_on(part, first, slice(last, stop))
        self._pass_on(errors, start, slice(stop, len(self._weights)))

    def _pass_on(self, errors: NDArray[Any], first: int, later: slice) -> None:
        """Adds to the `later` columns what the errors of the columns from `first` on mean for them."""
        shares = self._factor.unit[first : first + len(errors), later].T
        if not len(shares):
            return

        def add(start: int) -> None:
            rows = slice(start, start + _PART_ROWS)
            with np.errstate(over="ignore", invalid="ignore"):  # found when all is finished
                self._shift[later, rows] += shares @ errors[:, rows]

        for _ in self._pool.map(add, range(0, errors.shape[1], _PART_ROWS)):
            pass

    def _columns(self, first: int, last: int, grid: _Turned, groups: NDArray[np.int64], errors: NDArray[Any]) -> None:
        """Columns one after the other; every line is a pass over one column of all rows."""
        before = np.ascontiguousarray(self._factor.unit[first:last, first:last].T)
        code, part = np.empty_like(errors[0]), np.empty_like(errors[0])
        low, high = grid.low, grid.high
        for place in range(last - first):
            column, group = first + place, groups[first + place]
            np.add(self._weights[column], self._shift[column], out=code)
            if place:
                np.dot(before[place, :place], errors[:place], out=part)
                np.add(code, part, out=code)
            np.subtract(code, grid.offset[group], out=code)
            np.divide(code, grid.divisor[group], out=code)
            np.rint(code, out=code)
            np.maximum(code, low, out=code)
            np.minimum(code, high, out=code)
            self._codes[column] = code
            np.multiply(code, grid.step[group], out=code)
            np.add(code, grid.offset[group], out=code)
            np.subtract(self._weights[column], code, out=errors[place])


class _Turned:
    """A grid with one contiguous row a group, in the dtype of the feedback."""

    def __init__(self, grid: Grid, dtype: Any) -> None:
        self.step = np.ascontiguousarray(grid.step.T, dtype)
        self.offset = np.ascontiguousarray(grid.offset.T, dtype)
        self.divisor = np.ascontiguousarray(divisors(grid.step).T, dtype)
        self.low, self.high = grid.low, grid.high


def _joined(grids: list[Grid]) -> Grid:
    step, offset = (np.concatenate([getattr(grid, name) for grid in grids], axis=1) for name in ("step", "offset"))
    return Grid(step, offset, grids[0].width, grids[0].low, grids[0].high)


def _check(weights: FloatArray, grid: Grid | None) -> None:
    if not np.isfinite(weights).all():
        what = "a weight that is to be rounded is NaN or infinite"
    elif grid is not None and not (np.isfinite(grid.step).all() and np.isfinite(grid.offset).all()):
        what = "the grid of a block is NaN or infinite"
    else:
        return
    raise _not_finite(what)


def _not_finite(what: str) -> CheckpointError:
    return CheckpointError(
        "rounding-not-finite", what, why="the weights leave the range of a block's scale, or float32"
    )
