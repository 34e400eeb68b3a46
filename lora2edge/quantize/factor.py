"""A layer's H = XᵀX / n, damped and factored: what GPTQ's error feedback is computed with.

GPTQ (https://arxiv.org/abs/2210.17323) spreads the error of a column over the later ones with the upper Cholesky
factor U of H⁻¹, H⁻¹ = UᵀU. With H = M D Mᵀ, M upper triangular with a diagonal of ones, U is D^(-1/2) M⁻¹, and the same
codes come from M alone: column j is rounded at w_j + Σ_{i<j} (w_i − q_i) M_ij. That needs one factorization, a third
of an inversion's work, and loses fewer digits.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from lora2edge.checkpoint import in_order, one_blas_thread

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lora2edge.contracts import FloatArray

_BLOCK = 256
_PANEL = 512
_LEAST = 1e-6
"""The least damping to try where none was asked for and some is needed."""


@dataclass(frozen=True, slots=True)
class GptqOptions:
    """How GPTQ rounds a layer."""

    damping: float = 0.01
    """Added to the diagonal of H at least, as a share of its mean over the channels that are not dead."""
    sampling: float = 0.0
    """Damping for each column per token, where that is more: H of few tokens is uncertain. 0 is the paper's GPTQ."""
    most_damping: float = 1.0
    """Where the factorization fails, damping is raised tenfold up to this; then weights are rounded to nearest."""
    activation_order: bool = True
    """Columns in order of their mean square input, largest first. Grids have to be fixed before."""
    dtype: Literal["float32", "float64"] = "float32"
    """Of the error feedback. The factorization is always in float64."""


Fallback = Literal["no tokens", "inputs all zero", "H is not finite", "factorization failed"]


@dataclass(frozen=True, slots=True)
class Factor:
    """H of one layer's inputs, factored; serves every weight that reads these inputs.

    Where `fallback` says why not, `unit` is empty and weights are rounded to nearest.
    """

    unit: NDArray[Any]
    """M: `[columns, columns]`, columns in `order`."""
    pivots: NDArray[np.float64]
    """D: `[columns]`, in `order`, of H over its mean diagonal."""
    order: NDArray[np.int64]
    """The column that comes at each place."""
    importance: FloatArray
    """The diagonal of H over its mean, and the least damping, by column: above 0, for fitting grids."""
    scale: float
    """The mean diagonal of H over the channels that are not dead."""
    damping: float
    """What was added, as a share of `scale`."""
    raised: bool
    """Whether the factorization needed more than was asked for."""
    scarce: bool
    """Whether all damping was asked for that may be: there are fewer tokens than columns."""
    dead: NDArray[np.int64]
    """Channels whose inputs were all zero: their columns are rounded to nearest and pass no error on."""
    tokens: int
    dropped_tokens: int
    fallback: Fallback | None

    def solve(self, rows: NDArray[Any]) -> NDArray[Any]:
        """rows × (H + λ)⁻¹: `[rows, columns]`, columns in the matrix' own order, in the dtype of the factor."""
        x = rows[:, self.order].astype(self.unit.dtype)
        starts = range(0, len(self.order), _BLOCK)
        for start in reversed(starts):  # y Mᵀ = x
            block = slice(start, start + _BLOCK)
            x[:, block] = np.linalg.solve(self.unit[block, block], x[:, block].T).T
            x[:, :start] -= x[:, block] @ self.unit[:start, block].T
        x /= (self.pivots * self.scale).astype(x.dtype)
        for start in starts:  # z M = y
            block, rest = slice(start, start + _BLOCK), slice(start + _BLOCK, None)
            x[:, block] = np.linalg.solve(self.unit[block, block].T, x[:, block].T).T
            x[:, rest] -= x[:, block] @ self.unit[block, rest]
        solved = np.empty_like(x)
        solved[:, self.order] = x
        return solved


def factorize(
    mean: NDArray[Any],
    tokens: int,
    options: GptqOptions | None = None,
    *,
    rows: int | None = None,
    dropped_tokens: int = 0,
) -> Factor:
    """Damps and factors H = XᵀX / tokens, `[columns, columns]` (`Gram.mean`).

    `rows`: how many of the tokens are not repetitions (`Gram.rows`); None: all.

    Takes at most 12 bytes an element of H beside it. Never raises for what H holds: without a token, with inputs that
    are all zero or not finite, or where no damping helps, the factor says so and rounds to nearest.
    """
    options = options or GptqOptions()
    columns = len(mean)
    diagonal = mean.diagonal().astype(np.float64)
    live = diagonal > 0
    fallback: Fallback | None = None
    if tokens <= 0:
        fallback = "no tokens"
    elif not all(np.isfinite(mean[start : start + _PANEL]).all() for start in range(0, columns, _PANEL)):
        fallback = "H is not finite"
    elif not live.any():
        fallback = "inputs all zero"
    scale = 1.0 if fallback else float(diagonal[live].mean())
    diagonal = np.where(live, diagonal / scale, 1.0) if not fallback else np.ones(columns)
    order = np.argsort(-diagonal * live, kind="stable") if options.activation_order else np.arange(columns)
    uncertain = options.sampling * columns / max(tokens if rows is None else rows, 1)
    asked = damping = max(options.damping, min(uncertain, options.most_damping))
    unit, pivots = np.empty((0, 0), options.dtype), np.empty(0)
    while not fallback:
        try:
            unit, pivots = _factored(mean, diagonal, order, scale, damping, options.dtype)
            break
        except np.linalg.LinAlgError:
            if damping >= options.most_damping:
                fallback = "factorization failed"
            else:
                damping = min(max(damping * 10, _LEAST), options.most_damping)
    return Factor(
        unit=unit,
        pivots=pivots,
        order=order,
        importance=(np.where(live, diagonal, 0) + max(options.damping, _LEAST)).astype(np.float32),
        scale=scale,
        damping=damping,
        raised=damping > asked,
        scarce=uncertain >= options.most_damping,
        dead=np.flatnonzero(~live) if not fallback else np.empty(0, np.int64),
        tokens=tokens,
        dropped_tokens=dropped_tokens,
        fallback=fallback,
    )


def _factored(
    mean: NDArray[Any],
    diagonal: NDArray[np.float64],
    order: NDArray[np.int64],
    scale: float,
    damping: float,
    dtype: str,
) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """M and D of H / scale + damping, columns in `order`. Raises LinAlgError where H is not positive definite.

    H = R Rᵀ with an upper R is the usual L Lᵀ with rows and columns turned about.
    """
    turned = order[::-1]
    a = np.empty(mean.shape, np.float64)
    for start in range(0, len(a), _PANEL):
        part = turned[start : start + _PANEL]
        # Rows, then columns: one look-up of both took ten times as long.
        np.divide(np.take(mean[part], turned, axis=1), scale, out=a[start : start + _PANEL])
    np.fill_diagonal(a, diagonal[turned] + damping)
    with one_blas_thread():
        _cholesky(a)
    roots = a.diagonal().copy()
    if not (np.isfinite(roots).all() and (roots > 0).all()):
        raise np.linalg.LinAlgError("a pivot is not positive")
    unit = np.zeros(a.shape, dtype)
    for start in range(0, len(a), _PANEL):
        stop = min(start + _PANEL, len(a))
        place = slice(len(a) - stop, len(a) - start)
        unit[place, place.start :] = (a[start:stop, :stop] / roots[:stop])[::-1, ::-1]
        unit[place, place] = np.triu(unit[place, place])
    return unit, np.square(roots[::-1])


def _cholesky(a: NDArray[np.float64]) -> None:
    """The lower Cholesky factor of `a` in its place; what is above the diagonal blocks is not touched.

    By blocks, so that nearly all of the work are matrix products of a fixed size, each on a core, and no copy of `a`
    is made. BLAS's own threads took 2.6 s of two busy cores where one core alone took 1.0.
    """
    for start in range(0, len(a), _BLOCK):
        stop = min(start + _BLOCK, len(a))
        corner = np.linalg.cholesky(a[start:stop, start:stop])
        a[start:stop, start:stop] = corner
        across = np.linalg.inv(corner).T
        for _ in in_order(partial(_divide, a[:, start:stop], across), range(stop, len(a), _PANEL)):
            pass
        for _ in in_order(partial(_subtract, a, a[:, start:stop]), range(stop, len(a), _PANEL)):
            pass


def _divide(columns: NDArray[np.float64], across: NDArray[np.float64], top: int) -> None:
    columns[top : top + _PANEL] = columns[top : top + _PANEL] @ across


def _subtract(a: NDArray[np.float64], done: NDArray[np.float64], left: int) -> None:
    a[left:, left : left + _PANEL] -= done[left:] @ done[left : left + _PANEL].T
