"""Weights as MatMulNBits and the integer matrix products take them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from lora2edge.checkpoint import decode, encode_rows, not_finite
from lora2edge.graph.builder import BlockFormat, ChannelFormat, FloatFormat, Format
from lora2edge.quantize import Factor, RoundingLog, fit_mse, fit_range, gptq_codes

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lora2edge.backends.layerwise import RoundedTensors
    from lora2edge.contracts import Checkpoint, FloatArray

    Bytes = NDArray[np.uint8]

ScaleDtype = Literal["float32", "float16", "bfloat16"]


class StreamRounder:
    """Implements `graph.write.Rounder`: rounds to nearest, or hands out what GPTQ has chosen before."""

    def __init__(self, checkpoint: Checkpoint, rounded: RoundedTensors | None, scale_dtype: ScaleDtype) -> None:
        self._checkpoint, self._rounded, self._scale_dtype = checkpoint, rounded, scale_dtype

    def codes(
        self, tensor: str, start: int, stop: int, form: BlockFormat | ChannelFormat
    ) -> tuple[NDArray[Any], FloatArray]:
        if self._rounded is not None and tensor in self._rounded:
            assert isinstance(form, BlockFormat)
            return split_row(self._rounded.rows(tensor, start, stop), form)
        weights = self._checkpoint.rows(tensor, start, stop)
        found: tuple[NDArray[Any], FloatArray]
        if isinstance(form, ChannelFormat):
            found = nearest_channels(weights)
        else:
            found = nearest_blocks(weights, form, self._scale_dtype)
        codes, scales = found
        if not np.isfinite(scales).all():
            raise not_finite(tensor)
        return codes, scales


class BlockEncoder:
    """Implements `layerwise.Encoder`: a row's codes, then its scales in float32."""

    def __init__(
        self, forms: Mapping[str, BlockFormat], embedding: Format, columns: Mapping[str, int], scale_dtype: ScaleDtype
    ) -> None:
        """`forms` and `columns`: of each tensor that is rounded; `embedding`: of one that is not rounded here."""
        self._forms, self._embedding, self._columns = forms, embedding, columns
        self._scale_dtype = scale_dtype

    def encode(self, name: str, weights: FloatArray, factor: Factor, log: RoundingLog) -> Bytes:
        form = self._forms[name]
        if form.bits == 8:  # shares of the range below 1 have never been better at 8 bits
            grid = fit_range(weights, 8, form.block, scale_dtype=self._scale_dtype)
        else:
            importance = None if factor.fallback else factor.importance
            grid = fit_mse(weights, 4, form.block, scale_dtype=self._scale_dtype, importance=importance)
        log.add(name, grid.affine, factor)
        codes = pack(gptq_codes(weights, grid.affine, factor), form)
        return np.concatenate([codes.reshape(len(codes), -1), grid.scales.view(np.uint8)], axis=1)

    def decode(self, name: str, data: Bytes) -> FloatArray:
        codes, scales = split_row(data, self._forms[name])
        return block_values(codes, scales, self._forms[name], self._columns[name])

    def embedding(self, rows: FloatArray) -> FloatArray:
        return after_storage(rows, self._embedding, self._scale_dtype)


def nearest_blocks(weights: FloatArray, form: BlockFormat, scale_dtype: ScaleDtype) -> tuple[Bytes, FloatArray]:
    """Round-to-nearest as onnxruntime does it: codes `[rows, blocks, code bytes]`, scales `[rows, blocks]`.

    The weight of largest magnitude of a block becomes the lowest code exactly, whatever its sign: that side of the
    grid has one step more. A block of zeros has scale 0.
    """
    rows, columns = weights.shape
    half = 1 << form.bits - 1
    blocks = weights.reshape(rows, -1, form.block)
    high, low = blocks.max(-1), blocks.min(-1)
    scales = _stored(np.where(high > -low, high, low) / np.float32(-half), scale_dtype)
    inverse = np.divide(np.float32(1), scales, out=np.zeros_like(scales), where=scales != 0)
    with np.errstate(invalid="ignore"):  # what is not finite is refused by its scale
        scaled = blocks * inverse[..., None]
        scaled += np.float32(half + 0.5)
        codes = np.clip(scaled, 0, 2 * half - 1, out=scaled).astype(np.uint8)
    return pack(codes.reshape(rows, columns), form), scales


def nearest_channels(weights: FloatArray) -> tuple[NDArray[np.int8], FloatArray]:
    """int8 with one scale a row, ±127: codes of the weights' shape, scales `[rows]`."""
    scales = np.maximum(weights.max(1), -weights.min(1)) / np.float32(127)
    inverse = np.divide(np.float32(1), scales, out=np.zeros_like(scales), where=scales != 0)
    with np.errstate(invalid="ignore"):
        codes = np.clip(np.rint(weights * inverse[:, None]), -127, 127).astype(np.int8)
    return codes, scales


def pack(codes: Bytes, form: BlockFormat) -> Bytes:
    """`[rows, columns]` → `[rows, blocks, code bytes]`; of two 4-bit codes the first is the low half of its byte."""
    blocks = codes.reshape(len(codes), -1, form.block)
    return blocks if form.bits == 8 else blocks[..., 0::2] | blocks[..., 1::2] << np.uint8(4)


def split_row(data: Bytes, form: BlockFormat) -> tuple[Bytes, FloatArray]:
    """Rows as BlockEncoder writes them → codes `[rows, blocks, code bytes]`, scales `[rows, blocks]`."""
    blocks = data.shape[1] // (form.code_bytes + 4)
    codes = data[:, : blocks * form.code_bytes].reshape(len(data), blocks, form.code_bytes)
    return codes, np.ascontiguousarray(data[:, blocks * form.code_bytes :]).view(np.float32)


def block_values(codes: Bytes, scales: FloatArray, form: BlockFormat, columns: int) -> FloatArray:
    """What such codes and scales stand for: `[rows, columns]` float32."""
    if form.bits == 4:
        codes = np.stack([codes & 15, codes >> 4], axis=-1)
    half = 1 << form.bits - 1
    values = codes.reshape(*scales.shape, form.block).astype(np.float32)
    values -= half
    values *= scales[..., None]
    return values.reshape(len(values), -1)[:, :columns]


def after_storage(rows: FloatArray, form: Format, scale_dtype: ScaleDtype) -> FloatArray:
    """`rows` as they are after having been stored so: float32."""
    if isinstance(form, FloatFormat):
        return _stored(rows, form.dtype)
    assert isinstance(form, BlockFormat)
    return block_values(*nearest_blocks(rows, form, scale_dtype), form, rows.shape[1])


def _stored(values: FloatArray, dtype: ScaleDtype) -> FloatArray:
    """Rounded to a dtype, as float32."""
    kind = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[dtype]
    return decode(encode_rows(values, kind).reshape(-1).view(np.uint8), kind).reshape(values.shape)
