"""GPTQ as the paper derives it, in float64, without Cholesky, blocks or lazy updates."""

from __future__ import annotations

import numpy as np

from lora2edge.quantize import Grid


def spread(of_groups: np.ndarray, width: int, columns: int) -> np.ndarray:
    return of_groups[:, np.arange(columns) // width].astype(np.float64)


def plain_gptq(weights: np.ndarray, grid: Grid, h: np.ndarray, damping: float, activation_order: bool) -> np.ndarray:
    """Optimal Brain Quantization in a fixed order: https://arxiv.org/abs/2210.17323, equations 2 and 3.

    Column after column; the inverse of H loses the row and column that are done by Gaussian elimination.
    """
    rows, columns = weights.shape
    step, offset = (spread(part, grid.width, columns) for part in (grid.step, grid.offset))
    h = h.astype(np.float64)
    dead = np.diag(h) == 0
    mean = np.diag(h)[~dead].mean()
    h[dead, dead] = mean
    h = h + damping * mean * np.eye(columns)
    order = np.argsort(-np.where(dead, 0, np.diag(h)), kind="stable") if activation_order else np.arange(columns)
    inverse = np.linalg.inv(h)
    w, codes = weights.astype(np.float64), np.zeros((rows, columns), np.uint8)
    for column in order:
        with np.errstate(divide="ignore", invalid="ignore"):
            exact = np.where(step[:, column] == 0, 0, (w[:, column] - offset[:, column]) / step[:, column])
        code = np.clip(np.rint(exact), grid.low, grid.high)
        codes[:, column] = code
        error = w[:, column] - (step[:, column] * code + offset[:, column])
        w -= np.outer(error, inverse[column] / inverse[column, column])
        inverse = inverse - np.outer(inverse[:, column], inverse[column]) / inverse[column, column]
        # What is done must not move again.
        inverse[column], inverse[:, column] = 0, 0
    return codes


def output_errors(weights: np.ndarray, values: np.ndarray, h: np.ndarray) -> np.ndarray:
    """‖X wᵀ − X qᵀ‖² / n of each row."""
    apart = weights.astype(np.float64) - values
    return np.einsum("ri,ij,rj->r", apart, h, apart)
