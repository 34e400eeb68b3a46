"""Starts of LoRA that take a part of the weight into the adapter: PiSSA (arXiv 2404.02948), OLoRA (2406.01775).

Training goes on from W = (W − B₀A₀) + B₀A₀, and the file holds what became of the second term. PEFT computes the first
anew when it loads such an adapter on the untouched base, so that the live model is W − B₀A₀ + BA; with the scale in
each product.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lora2edge.errors import AdapterError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lora2edge.contracts import FloatArray

PISSA, OLORA = "pissa", "olora"
UNCERTAIN = 32 * float(np.finfo(np.float32).eps)
"""Relative distance at which a start counts as not determined: PEFT computes in float32, where the start turns by an
angle of 0.1 to 1.4 · eps / distance (measured against float64, 256 to 1024 wide), so above it by 0.04 at most."""
_ROWS_AT_ONCE = 256


def find_start(start: str, weight: FloatArray, rank: int, scale: float, module: str) -> tuple[FloatArray, FloatArray]:
    """scale · B₀ `[out, r]` and A₀ `[r, in]` that PEFT subtracts from `weight` `[out, in]`; float32, from float64.

    Holds a matrix of the weight's smaller side in float64 besides. Raises AdapterError, code
    `adapter-start-ambiguous`, where the product is not determined: in PiSSA where the last singular value that is
    taken and the first that is left are equal but for rounding (their vectors are then any basis of a plane, and
    every library finds another), in OLoRA where the first r columns depend on each other.
    """
    left, right, distance = _principal(weight, rank) if start == PISSA else _leading(weight, rank)
    if not distance > UNCERTAIN:
        raise AdapterError(
            "adapter-start-ambiguous",
            f"the start {start!r} of {module} cannot be computed again",
            why=f"singular values {rank} and {rank + 1} of the base's weight differ by {distance:.1e} of the largest"
            if start == PISSA
            else f"the first {rank} columns of the base's weight depend on each other up to {distance:.1e}",
            hint="save the adapter with path_initial_model_for_weight_conversion=..., which makes a plain LoRA of it",
        )
    if start == OLORA:
        left *= scale
    return left.astype(np.float32), right.astype(np.float32)


def _principal(weight: FloatArray, rank: int) -> tuple[NDArray[np.float64], NDArray[np.float64], float]:
    """The best approximation of that rank. Its scale cancels: PEFT divides the singular values by it.

    From the eigenvectors of WᵀW or WWᵀ, whichever is smaller: in float64 they are more exact than PEFT's float32
    decomposition, and take a third of the memory.
    """
    tall = weight.shape[0] >= weight.shape[1]
    rows = weight if tall else weight.T
    gram = np.zeros((rows.shape[1], rows.shape[1]))
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        block = rows[start : start + _ROWS_AT_ONCE].astype(np.float64)
        gram += block.T @ block
    squares, vectors = np.linalg.eigh(gram)
    values = np.sqrt(np.maximum(squares[::-1], 0))
    basis = vectors[:, ::-1][:, :rank]
    image = np.concatenate(
        [rows[start : start + _ROWS_AT_ONCE] @ basis for start in range(0, len(rows), _ROWS_AT_ONCE)]
    )
    left_out = values[rank] if rank < len(values) else -values[0]
    distance = float((values[rank - 1] - left_out) / values[0]) if values[0] else 0.0
    return (image, basis.T, distance) if tall else (basis, image.T, distance)


def _leading(weight: FloatArray, rank: int) -> tuple[NDArray[np.float64], NDArray[np.float64], float]:
    """The first columns of Q and rows of R: what the span of the first columns has of all of them."""
    basis, triangle = np.linalg.qr(weight[:, :rank].astype(np.float64))
    image = np.zeros((rank, weight.shape[1]))
    for start in range(0, len(weight), _ROWS_AT_ONCE):
        image += basis[start : start + _ROWS_AT_ONCE].T @ weight[start : start + _ROWS_AT_ONCE]
    values = np.linalg.svd(triangle, compute_uv=False)
    return basis, image, float(values[-1] / values[0]) if values[0] else 0.0
