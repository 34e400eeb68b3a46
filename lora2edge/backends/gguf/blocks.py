"""The blocks of GGUF's quantized types as affine grids: what their headers say, their codes, and other codes put in.

The layouts are llama.cpp's (ggml/src/ggml-common.h and ggml-quants.c). A block holds a header (one or two halves,
and of the K types 6- or 4-bit scales of 16 or 32 weights) and codes; the codes are cut into fields of equal bits,
which lie in the bytes in one of few orders. A header says where each code's value lies, and any codes are valid
under it, so that codes can be chosen by another method than llama.cpp's: type, size and speed stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lora2edge.backends.gguf.mix import TYPES
from lora2edge.checkpoint import decode
from lora2edge.quantize import Grid

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lora2edge.contracts import FloatArray

    Bytes = NDArray[np.uint8]
    Headers = Callable[[Bytes], tuple[FloatArray, FloatArray]]


@dataclass(frozen=True, slots=True)
class _Field:
    """Bits `shift : shift + bits` of a block's codes, in `chunks` × `width` bytes that begin at `start`.

    A byte holds 8 / bits codes, the first in its lowest bits; `width` consecutive codes lie in consecutive bytes of a
    chunk at the same bits, the next `width` codes in the next bits, and then the next chunk follows.
    """

    start: int
    chunks: int
    width: int
    bits: int
    shift: int = 0

    @property
    def stop(self) -> int:
        return self.start + self.chunks * self.width


@dataclass(frozen=True, slots=True)
class _Layout:
    """A type: columns that share a step, range of the codes, where codes lie, and what the header says."""

    width: int
    low: int
    high: int
    fields: tuple[_Field, ...]
    header: Headers
    """Blocks `[blocks, bytes]` → steps and offsets `[blocks, block / width]` float32."""
    flip: int = 0
    """Exclusive-or between a stored code and ours, which has no sign."""


def header_grid(data: Bytes, type_name: str, columns: int) -> Grid:
    """The grid that the headers in `data` (uint8, rows of `columns` weights) make: step and offset of every weight.

    step × code + offset in float32 is bit-equal to llama.cpp's dequantizing. Raises KeyError for a type that is not
    in `GRID_TYPES`.
    """
    layout = _LAYOUTS[type_name]
    blocks = _blocks(data, type_name)
    step, offset = layout.header(blocks)
    rows = len(blocks) * TYPES[type_name].block // columns
    return Grid(step.reshape(rows, -1), offset.reshape(rows, -1), layout.width, layout.low, layout.high)


def read_codes(data: Bytes, type_name: str, columns: int) -> Bytes:
    """The codes in `data`: uint8 `[rows, columns]`, as `header_grid` counts them."""
    layout, blocks = _LAYOUTS[type_name], _blocks(data, type_name)
    codes = np.zeros((len(blocks), TYPES[type_name].block), np.uint8)
    for field in layout.fields:
        stored = blocks[:, field.start : field.stop].reshape(-1, field.chunks, 1, field.width)
        placed = codes.reshape(-1, field.chunks, 8 // field.bits, field.width)
        shifts = np.arange(0, 8, field.bits, dtype=np.uint8)[:, None]
        placed |= (stored >> shifts & np.uint8((1 << field.bits) - 1)) << np.uint8(field.shift)
    codes ^= np.uint8(layout.flip)
    return codes.reshape(-1, columns)


def replace_codes(data: Bytes, type_name: str, codes: Bytes) -> Bytes:
    """A copy of `data` with its headers and other `codes` (uint8 `[rows, columns]`): the inverse of `read_codes`."""
    layout = _LAYOUTS[type_name]
    replaced = data.copy()
    blocks = _blocks(replaced, type_name)
    flipped = codes.reshape(len(blocks), -1) ^ np.uint8(layout.flip)
    for field in layout.fields:
        placed = flipped.reshape(-1, field.chunks, 8 // field.bits, field.width)
        part = placed >> np.uint8(field.shift) & np.uint8((1 << field.bits) - 1)
        shifts = np.arange(0, 8, field.bits, dtype=np.uint8)[:, None]
        stored = np.bitwise_or.reduce(part << shifts, axis=2)
        blocks[:, field.start : field.stop] = stored.reshape(len(blocks), -1)
    return replaced


def decode_rows(data: Bytes, type_name: str, columns: int) -> FloatArray:
    """What llama.cpp reads from `data`: float32 `[rows, columns]`. Raises KeyError for a type with a codebook."""
    if type_name in GRID_TYPES:
        return header_grid(data, type_name, columns).values(read_codes(data, type_name, columns))
    return decode(data.reshape(-1), type_name).reshape(-1, columns)


def _blocks(data: Bytes, type_name: str) -> Bytes:
    return data.reshape(-1, TYPES[type_name].size_bytes)


def _half(blocks: Bytes, start: int) -> FloatArray:
    """The halves at byte `start`: float32 `[blocks, 1]`."""
    return blocks[:, start : start + 2].copy().view("<f2").astype(np.float32)


def _scale(zero: int) -> Headers:
    """A half, the step; the code `zero` stands for 0."""

    def header(blocks: Bytes) -> tuple[FloatArray, FloatArray]:
        step = _half(blocks, 0)
        return step, np.float32(-zero) * step

    return header


def _scale_and_least(blocks: Bytes) -> tuple[FloatArray, FloatArray]:
    """Two halves: the step, and the value of the code 0."""
    return _half(blocks, 0), _half(blocks, 2)


def _q2_k(blocks: Bytes) -> tuple[FloatArray, FloatArray]:
    scales = blocks[:, :16]
    return _half(blocks, 80) * (scales & 15), -_half(blocks, 82) * (scales >> 4)


def _q3_k(blocks: Bytes) -> tuple[FloatArray, FloatArray]:
    """Sixteen scales of 6 bits, less 32: the low four in 8 bytes, the high two in 4."""
    packed = blocks[:, 96:108]
    low = np.concatenate([packed[:, :8] & 15, packed[:, :8] >> 4], axis=1)
    high = np.concatenate([packed[:, 8:] >> shift & 3 for shift in (0, 2, 4, 6)], axis=1)
    scales = (low | high << 4).astype(np.float32) - 32
    step = _half(blocks, 108) * scales
    return step, -4 * step


def _q4_k(blocks: Bytes) -> tuple[FloatArray, FloatArray]:
    """Eight scales and eight least values of 6 bits: four whole, the low four bits of the others, their high two."""
    first, second, low = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = np.concatenate([first & 63, (low & 15) | (first >> 6) << 4], axis=1)
    least = np.concatenate([second & 63, low >> 4 | (second >> 6) << 4], axis=1)
    return _half(blocks, 0) * scales, -_half(blocks, 2) * least


def _q6_k(blocks: Bytes) -> tuple[FloatArray, FloatArray]:
    step = _half(blocks, 208) * blocks[:, 192:208].view(np.int8)
    return step, -32 * step


_LAYOUTS: Mapping[str, _Layout] = {
    "Q4_0": _Layout(32, 0, 15, (_Field(2, 1, 16, 4),), _scale(8)),
    "Q4_1": _Layout(32, 0, 15, (_Field(4, 1, 16, 4),), _scale_and_least),
    "Q5_0": _Layout(32, 0, 31, (_Field(6, 1, 16, 4), _Field(2, 4, 1, 1, 4)), _scale(16)),
    "Q5_1": _Layout(32, 0, 31, (_Field(8, 1, 16, 4), _Field(4, 4, 1, 1, 4)), _scale_and_least),
    # llama.cpp never writes the code −128, and some kernels take magnitudes.
    "Q8_0": _Layout(32, 1, 255, (_Field(2, 1, 32, 8),), _scale(128), flip=128),
    "Q2_K": _Layout(16, 0, 3, (_Field(16, 2, 32, 2),), _q2_k),
    "Q3_K": _Layout(16, 0, 7, (_Field(32, 2, 32, 2), _Field(0, 1, 32, 1, 2)), _q3_k),
    "Q4_K": _Layout(32, 0, 15, (_Field(16, 4, 32, 4),), _q4_k),
    "Q5_K": _Layout(32, 0, 31, (_Field(48, 4, 32, 4), _Field(16, 1, 32, 1, 4)), _q4_k),
    "Q6_K": _Layout(16, 0, 63, (_Field(0, 2, 64, 4), _Field(128, 2, 32, 2, 4)), _q6_k),
}
GRID_TYPES = frozenset(_LAYOUTS)
"""The types whose blocks are affine grids; those of IQ have codebooks."""
