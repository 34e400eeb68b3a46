"""bitsandbytes' block formats: NF4, FP4, and the 8-bit dynamic type that double quantization stores scales in.

A tensor is cut, row-major, into blocks of 64 values; each block is stored as 4-bit codes times its largest
magnitude (QLoRA, https://arxiv.org/abs/2305.14314; NF4 is its appendix E). Double quantization stores these
magnitudes, less their mean, as 8-bit codes in blocks of 256 (the dynamic type of
https://arxiv.org/abs/1511.04561).
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lora2edge.contracts import FloatArray

QuantType = Literal["nf4", "fp4"]
Kernel = Literal["cuda", "cpu"]

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""What bitsandbytes accepts."""
ABSMAX_BLOCK = 256
"""Scales per block of double quantization."""

CODES: dict[str, FloatArray] = {
    "nf4": np.array(
        [
            -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
            -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
            0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
            0.7229568362236023, 1.0,
        ],
        np.float32,
    ),
    # Sign bit, then 0, 0.0625, 8, 12, 4, 6, 2, 3, all over 12.
    "fp4": np.array(
        [v / 12 for v in (0, 0.0625, 8, 12, 4, 6, 2, 3, 0, -0.0625, -8, -12, -4, -6, -2, -3)], np.float32
    ),
}  # fmt: skip
"""The value of each 4-bit code, float32 `[16]`."""

_TINY = np.float32(1e-38)


def dequantize_blocks(packed: NDArray[np.uint8], absmax: FloatArray, quant_type: str, blocksize: int) -> FloatArray:
    """Whole blocks as float32, unrounded: code × absmax, one float32 product each, flat.

    `packed`: the first of two values is in the high nibble. The last block may be short. `absmax`: one per block.
    """
    values = np.take(_pairs(quant_type), packed, axis=0).reshape(-1)
    return scale_blocks(values, absmax, blocksize)


def scale_blocks(values: FloatArray, absmax: FloatArray, blocksize: int) -> FloatArray:
    """`values`, flat, each times the scale of its block, in place. The last block may be short."""
    whole = len(values) // blocksize * blocksize
    blocks = values[:whole].reshape(-1, blocksize)
    np.multiply(blocks, absmax[: len(blocks), None], out=blocks)
    if whole < len(values):
        values[whole:] *= absmax[len(blocks)]
    return values


def block_maxima(values: FloatArray, blocksize: int) -> FloatArray:
    """The largest magnitude in each block of the flat `values`; the last block may be short."""
    magnitudes = np.abs(values)
    whole = len(values) // blocksize * blocksize
    maxima = magnitudes[:whole].reshape(-1, blocksize).max(axis=1)
    return np.append(maxima, magnitudes[whole:].max()) if whole < len(values) else maxima


def nearest_codes(values: FloatArray, absmax: FloatArray, quant_type: str, blocksize: int) -> FloatArray:
    """What each of the flat `values` is stored as, in units of its block's scale: float32, a new array.

    As bitsandbytes: times the reciprocal of the scale, then the nearest code, the lower one where two are as near.
    """
    with np.errstate(over="ignore"):
        scaled = scale_blocks(values.copy(), _reciprocal(absmax), blocksize)
    short = len(values) % blocksize
    if short:
        # bitsandbytes' CPU code divides in a short last block.
        scaled[-short:] = values[-short:] / np.maximum(absmax[-1], _TINY)
    codes = np.sort(CODES[quant_type])
    index = np.zeros(len(values), np.uint8)
    # Fifteen comparisons take 8 ms for a million values, a binary search 66 ms.
    for bound in (codes[:-1] + codes[1:]) / np.float32(2):
        index += scaled > bound
    return np.take(codes, index)


def double_quantized(absmax: FloatArray, kernel: Kernel) -> FloatArray:
    """The block scales of one whole tensor as double quantization gives them back, float32.

    The mean that is taken off first is rounded to float32 once; torch's own depends, in its last digit, on the
    number of threads and the device. `kernel`: "cuda" takes the nearest of the 256 codes; "cpu" looks the code up
    on a grid of 65536 steps, as the CPU library of bitsandbytes 0.50 does, which moves one scale in 400 by a code.
    """
    offset = np.float32(absmax.mean(dtype=np.float64))
    if not np.isfinite(offset):
        return np.full(len(absmax), np.nan, np.float32)
    centred = absmax - offset
    largest = block_maxima(centred, ABSMAX_BLOCK)
    scaled = scale_blocks(centred, _reciprocal(largest), ABSMAX_BLOCK)
    code = dynamic_code()
    if kernel == "cpu":
        steps = ((np.clip(scaled, -1, 1) + np.float32(1)) * np.float32(32767.5) + np.float32(0.5)).astype(np.int32)
        index: NDArray[Any] = _dynamic_table()[steps]
    else:
        index = np.searchsorted(_dynamic_bounds(), scaled)
    return restore_absmax(index, code, largest, ABSMAX_BLOCK, offset)


def restore_absmax(
    codes: NDArray[Any], table: FloatArray, absmax: FloatArray, blocksize: int, offset: np.float32
) -> FloatArray:
    """Block scales from their 8-bit `codes`, float32: table value × scale of 256 scales, then plus the offset.

    Both results are rounded to float32. `codes` starts at a block's start.
    """
    scales = scale_blocks(np.take(table, codes), absmax, blocksize)
    scales += offset
    return scales


def _reciprocal(absmax: FloatArray) -> FloatArray:
    return np.asarray(np.float32(1) / np.maximum(absmax, _TINY), np.float32)


@functools.cache
def dynamic_code() -> FloatArray:
    """The signed 8-bit dynamic type, float32 `[256]`, ascending: seven decades, each finer than the one below."""
    values = [0.0, 1.0]
    for decade in range(7):
        edges = _linspace(2**decade + 1)
        means = (edges[:-1] + edges[1:]) / np.float32(2)
        scaled = means * np.float32(10 ** (decade - 6))
        values += [*scaled.tolist(), *(-scaled).tolist()]
    return np.array(sorted(values), np.float32)


def _linspace(n: int) -> FloatArray:
    """torch.linspace(0.1, 1, n) in float32: from both ends towards the middle, product and sum rounded together."""
    first = np.float64(np.float32(0.1))
    step = np.float64((np.float32(1) - np.float32(0.1)) / np.float32(n - 1))
    index = np.arange(n)
    return np.where(index < n // 2, first + step * index, 1 - step * (n - 1 - index)).astype(np.float32)


@functools.cache
def _pairs(quant_type: str) -> FloatArray:
    """Byte → its two values, float32 `[256, 2]`."""
    code = CODES[quant_type]
    byte = np.arange(256)
    return np.stack([code[byte >> 4], code[byte & 15]], axis=1)


@functools.cache
def _dynamic_bounds() -> FloatArray:
    code = dynamic_code()
    return np.asarray((code[:-1] + code[1:]) / np.float32(2), np.float32)


@functools.cache
def _dynamic_table() -> NDArray[np.uint8]:
    """Nearest code of each of 65536 equal steps from -1 to 1."""
    centres = (np.arange(1 << 16) / 32767.5 - 1).astype(np.float32)
    return np.searchsorted(_dynamic_bounds(), centres).astype(np.uint8)
