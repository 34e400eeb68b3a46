"""Stored floats to float32 and back. bfloat16 is done with integer operations: numpy has no such type."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from lora2edge.errors import CheckpointError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lora2edge.contracts import FloatArray

FLOAT_DTYPES = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8}
"""The dtypes that can be read and written, as safetensors names them, and the bytes of one element."""

_BLOCK = 1 << 17
"""Elements rounded at a time: the passes stay near a core's own cache, and other threads are seldom called away."""


def decode(raw: NDArray[np.uint8], dtype: str) -> FloatArray:
    """The bytes `raw` (one axis) of a stored tensor as float32, one axis, a new array.

    Exact for BF16, F16 and F32; F64 is rounded. Raises KeyError for a dtype not in FLOAT_DTYPES.
    """
    if dtype == "BF16":
        wide = raw.view("<u2").astype(np.uint32)
        np.left_shift(wide, 16, out=wide)
        return wide.view(np.float32)
    with np.errstate(over="ignore"):
        return raw.view(_NUMPY[dtype]).astype(np.float32)


def encode_rows(rows: FloatArray, dtype: str) -> NDArray[Any]:
    """float32 `rows` rounded once to the stored dtype: nearest, ties to even; NaN stays NaN.

    Returns an array of the same shape: uint16 holding the bits for BF16, else numpy's own type, little-endian.
    Raises KeyError for a dtype not in FLOAT_DTYPES.
    """
    return encode_finite(rows, dtype)[0]


def encode_finite(rows: FloatArray, dtype: str) -> tuple[NDArray[Any], bool]:
    """The same, and whether all of it is finite when it is rounded; of BF16 this costs nothing."""
    if dtype == "BF16":
        return _round_bfloat16(np.ascontiguousarray(rows, dtype=np.float32))
    with np.errstate(over="ignore", invalid="ignore"):
        rounded = np.ascontiguousarray(rows.astype(_NUMPY[dtype]))
    return rounded, all_finite(rounded.reshape(-1).view(np.uint8), dtype)


def all_finite(raw: NDArray[np.uint8], dtype: str) -> bool:
    """Whether the bytes `raw` (one axis) of stored floats hold no NaN and no infinity: all bits of the exponent set.

    As an unsigned number such a word of negative sign is the largest, as a signed one such a word of positive sign.
    """
    infinity = _INFINITIES[dtype]
    width = FLOAT_DTYPES[dtype]
    negative = infinity | 1 << 8 * width - 1
    words = raw.view(f"<i{width}")
    return bool(words.max(initial=0) < infinity and words.view(f"<u{width}").max(initial=0) < negative)


def not_finite(name: str) -> CheckpointError:
    """The error for a computed tensor that holds NaN or infinity: no backend writes it."""
    return CheckpointError(
        "weight-not-finite",
        f"{name} holds NaN or infinity when it is merged",
        why="the base holds it, or the merge leaves the range of its dtype, or divides by zero (DoRA: a row of zeros)",
        hint="download the base again; where it is sound, train without this module, or with a smaller scale",
    )


def _round_bfloat16(rows: FloatArray) -> tuple[NDArray[np.uint16], bool]:
    """Adds 0x7FFF and the lowest kept bit, then cuts: round to nearest even. Also tells whether all is finite then.

    A NaN gets its quiet bit instead, because the carry could turn it into an infinity.
    """
    finite = True
    bits = rows.reshape(-1).view(np.uint32)
    out = np.empty(bits.shape, np.uint16)
    carry = np.empty(min(_BLOCK, len(bits)), np.uint32)
    for start in range(0, len(bits), _BLOCK):
        block = bits[start : start + _BLOCK]
        part = carry[: len(block)]
        np.right_shift(block, 16, out=part)
        np.bitwise_and(part, 1, out=part)
        np.add(part, 0x7FFF, out=part)
        np.add(part, block, out=part)
        np.right_shift(part, 16, out=part)
        out[start : start + _BLOCK] = part
        # Of positive sign a NaN is above infinity as a signed integer, of negative sign as an unsigned one.
        positive, negative = block.view(np.int32).max(initial=0), block.max(initial=0)
        finite &= bool(positive < _BFLOAT16_OVERFLOW and negative < (_BFLOAT16_OVERFLOW | 1 << 31))
        if positive > 0x7F800000 or negative > 0xFF800000:
            nan = (block & 0x7FFFFFFF) > 0x7F800000
            out[start : start + _BLOCK][nan] = (block[nan] >> 16) | 0x40
    return out.reshape(rows.shape), finite


_INFINITIES = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F80_0000, "F64": 0x7FF0 << 48}
"""As integers."""
_BFLOAT16_OVERFLOW = 0x7F7F_8000
"""The smallest float32 that rounds to infinity, as an integer."""
_NUMPY = {"F16": "<f2", "F32": "<f4", "F64": "<f8"}
