"""XᵀX of a layer's inputs, from slabs of tokens: all that GPTQ needs to know of the calibration text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from lora2edge.checkpoint import in_order

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lora2edge.contracts import FloatArray

_PANEL = 256
"""Columns of one product. Fixed, so that a sum does not depend on the number of cores."""
_SLAB_TOKENS = 1024
"""Tokens of one product: float32 sums of that length are added up."""


class Gram:
    """Adds up XᵀX, and with `paired` (R − X)ᵀX, over slabs of tokens. Memory: one or two `[columns, columns]`.

    R are the 16-bit model's inputs where X are those of the layers quantized so far. With `weights`, `[rows, columns]`,
    W (R − X)ᵀX is added up instead, which is less work where a matrix has few rows. Deterministic: the sums depend on
    the slabs and their order, not on the number of cores.
    """

    def __init__(
        self,
        columns: int,
        *,
        paired: bool = False,
        weights: FloatArray | None = None,
        dtype: Literal["float32", "float64"] = "float32",
    ) -> None:
        self.tokens = 0
        """Tokens that were added, each as often as it counts."""
        self.rows = 0
        """The same, each once."""
        self.dropped_tokens = 0
        """Tokens left out because one of their inputs was NaN or infinite."""
        self._sum: NDArray[Any] = np.zeros((columns, columns), dtype)
        self._weights = weights
        self._difference: NDArray[Any] | None = None
        if paired or weights is not None:
            self._difference = np.zeros((columns if weights is None else len(weights), columns), dtype)

    def add(self, inputs: FloatArray, reference: FloatArray | None = None, times: int = 1) -> None:
        """Adds `[tokens, columns]` inputs, with `reference` (the same shape) if the sums are paired, `times` over.

        A token with an input that is not finite is left out and counted. Raises ValueError for another shape.
        """
        columns = len(self._sum)
        shapes = {inputs.shape, inputs.shape if reference is None else reference.shape}
        if inputs.ndim != 2 or inputs.shape[1] != columns or len(shapes) > 1:
            raise ValueError(f"inputs of shapes {shapes}, {columns} columns are added up")
        if (reference is None) is not (self._difference is None):
            raise ValueError("a reference is needed where the sums are paired, and only there")
        for start in range(0, len(inputs), _SLAB_TOKENS):
            stop = start + _SLAB_TOKENS
            self._add(inputs[start:stop], None if reference is None else reference[start:stop], times)

    def mean(self) -> NDArray[Any]:
        """H = XᵀX / tokens: `[columns, columns]`, symmetric, the Gram's own memory; zeros without a token.

        Ends the adding up.
        """
        total, columns = self._sum, len(self._sum)
        for start in range(0, columns, _PANEL):
            stop = start + _PANEL
            corner = np.triu(total[start:stop, start:stop])
            total[start:stop, start:stop] = corner + np.triu(corner, 1).T
            total[stop:, start:stop] = total[start:stop, stop:].T
        total /= max(self.tokens, 1)
        self._sum = np.zeros((0, 0), total.dtype)
        return total

    def mean_difference(self) -> NDArray[Any] | None:
        """(R − X)ᵀX / tokens, `[columns, columns]`, or the weights' product with it, `[rows, columns]`: the Gram's own
        memory; None where nothing was paired."""
        total, self._difference = self._difference, None
        if total is not None:
            total /= max(self.tokens, 1)
        return total

    def _add(self, inputs: FloatArray, reference: FloatArray | None, times: int) -> None:
        tokens = np.ascontiguousarray(inputs, self._sum.dtype)
        finite = np.isfinite(tokens).all(axis=1)
        apart: NDArray[Any] | None = None
        if reference is not None:
            with np.errstate(invalid="ignore"):
                apart = reference.astype(self._sum.dtype) - tokens
            finite &= np.isfinite(apart).all(axis=1)
        if not finite.all():
            self.dropped_tokens += times * int(len(finite) - finite.sum())
            tokens, apart = tokens[finite], None if apart is None else apart[finite]
        self.tokens += times * len(tokens)
        self.rows += len(tokens)
        if not len(tokens):
            return
        if times > 1:
            scale = self._sum.dtype.type(np.sqrt(times))
            tokens, apart = tokens * scale, None if apart is None else apart * scale

        def add_panel(start: int) -> None:
            stop = start + _PANEL
            with np.errstate(over="ignore", invalid="ignore"):  # found when it is factored
                self._sum[start:stop, start:] += tokens[:, start:stop].T @ tokens[:, start:]

        def add_difference(start: int) -> None:
            assert apart is not None and self._difference is not None
            part = slice(start, start + _PANEL)
            with np.errstate(over="ignore", invalid="ignore"):
                left = apart[:, part].T if self._weights is None else self._weights[part] @ apart.T
                self._difference[part] += left @ tokens

        for _ in in_order(add_panel, range(0, len(self._sum), _PANEL)):
            pass
        if self._difference is not None:
            for _ in in_order(add_difference, range(0, len(self._difference), _PANEL)):
                pass
