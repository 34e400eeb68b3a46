"""FP8 and int8 weights with a scale per tensor, per output channel, per block or per group of input channels.

FP8 with block scales (DeepSeek-V3, https://arxiv.org/abs/2412.19437, section 3.3; Qwen3-FP8): `weight` float8,
`weight_scale_inv` one factor for each block of `weight_block_size`, by default 128 × 128, the last ones cut off.
FP8 with `weight_scale` for the tensor or for each row (AutoFP8, FBGEMM), and the formats "float-quantized",
"int-quantized" and "naive-quantized" of compressed-tensors.

A weight is code × scale, one float32 product, not rounded further. Rounded to the dtype of config.json it is
bit-equal to transformers' `Fp8Dequantize` and to compressed-tensors' `dequantize`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from lora2edge.checkpoint.floats import FLOAT_DTYPES
from lora2edge.checkpoint.quantized.weight import (
    Weight,
    config_dtype,
    damaged,
    elements,
    part,
    refuse_conv1d,
    unsupported,
)
from lora2edge.contracts import TensorInfo

if TYPE_CHECKING:
    from lora2edge.checkpoint.reader import TensorReader
    from lora2edge.contracts import FloatArray

FLOAT8 = ("F8_E4M3", "F8_E5M2")
AUXILIARY = ("weight_scale", "weight_scale_inv", "weight_zero_point", "input_scale", "input_zero_point",
             "activation_scale", "k_scale", "v_scale", "q_scale", "output_scale", "input_scale_ub")  # fmt: skip
"""Last components of the names of what is no weight itself. All but the first three belong to activations."""

_FORMATS = ("float-quantized", "int-quantized", "naive-quantized")
_Block = tuple[int, int]


def find_fp8(settings: Mapping[str, Any], config: Mapping[str, Any], reader: TensorReader) -> list[Weight]:
    """The weights of an FP8 checkpoint. Raises CheckpointError where parts do not fit."""
    block = _block(settings.get("weight_block_size"), "FP8")
    return _find(reader, config, "FP8", FLOAT8, [block] if block else [])


def find_compressed(settings: Mapping[str, Any], config: Mapping[str, Any], reader: TensorReader) -> list[Weight]:
    """The weights of a compressed-tensors checkpoint of 8-bit floats or integers; other formats are refused."""
    method = "compressed-tensors"
    groups = settings.get("config_groups")
    if not isinstance(groups, dict) or not all(isinstance(group, dict) for group in groups.values()):
        raise unsupported(method, "config.json has no config_groups, which say how the weights were quantized")
    formats = {str(group.get("format") or settings.get("format")) for group in groups.values()}
    if not formats <= set(_FORMATS):
        raise unsupported(method, f"its format is {', '.join(sorted(formats))}, known are {', '.join(_FORMATS)}")
    sparsity = settings.get("sparsity_config")
    if isinstance(sparsity, dict) and sparsity.get("format") not in (None, "dense"):
        raise unsupported(method, f"its weights are stored sparse ({sparsity['format']})")
    if settings.get("transform_config"):
        raise unsupported(method, "its weights are rotated (transform_config)")
    blocks: list[_Block] = []
    for group in groups.values():
        weights = group.get("weights")
        if not isinstance(weights, dict):
            raise unsupported(method, "it quantizes no weights")
        if weights.get("num_bits") != 8:
            raise unsupported(method, f"weights have {weights.get('num_bits')!r} bits, known is 8")
        if weights.get("strategy") == "block":
            found = _block(weights.get("block_structure"), method)
            blocks += [found] if found else []
        elif weights.get("strategy") == "group":
            found = _block([1, weights.get("group_size")], method)
            blocks += [found] if found else []
        if weights.get("actorder") in ("group", True):
            raise unsupported(method, "its input channels are reordered (actorder)")
    return _find(reader, config, method, (*FLOAT8, "I8"), blocks)


def _find(
    reader: TensorReader, config: Mapping[str, Any], method: str, dtypes: tuple[str, ...], blocks: Iterable[_Block]
) -> list[Weight]:
    dtype = config_dtype(config, "BF16")
    found: list[Weight] = [
        _read(reader, info, dtype, dtypes, blocks)
        for name, info in reader.tensors.items()
        if name.endswith(".weight") and info.dtype in dtypes
    ]
    if found:
        refuse_conv1d(config, method)
    return found


class _WeightScaled:
    def __init__(
        self, reader: TensorReader, info: TensorInfo, parts: tuple[str, ...], scales: str, block: _Block
    ) -> None:
        self.info = info
        self.parts = parts
        self._reader = reader
        self._scales = scales
        self._block = block

    def rows(self, start: int, stop: int) -> FloatArray:
        width = self.info.shape[1]
        codes = elements(self._reader, self.info.name, start * width, stop * width)
        stored = self._reader.tensors[self.info.name].dtype
        values = codes.astype(np.float32) if stored == "I8" else np.take(_float8(stored), codes)
        values = values.reshape(stop - start, width)
        high, wide = self._block
        first, last = start // high, -(-stop // high)
        across = -(-width // wide)
        scales = _scales(self._reader, self._scales, first * across, last * across).reshape(-1, across)
        for at in range(first, last):
            lines = values[max(at * high - start, 0) : min((at + 1) * high, stop) - start]
            lines *= np.repeat(scales[at - first], wide)[:width]
        return values


def _read(
    reader: TensorReader, info: TensorInfo, dtype: str, dtypes: tuple[str, ...], blocks: Iterable[_Block]
) -> Weight:
    name, shape = info.name, info.shape
    if len(shape) != 2 or not info.size:
        raise damaged(name, f"it is {list(shape)}, expected two axes")
    inverse, plain = f"{name}_scale_inv", f"{name}_scale"
    if inverse in reader.tensors and plain in reader.tensors:
        raise damaged(name, f"both {inverse} and {plain} are there")
    scale = part(reader, name, inverse if inverse in reader.tensors else plain, (*FLOAT_DTYPES, "F8_E8M0", "U8"))
    parts = [name, scale.name]
    block = _scale_block(scale.shape, shape, blocks)
    if block is None:
        known = ", ".join(f"{high} × {wide}" for high, wide in blocks)
        raise damaged(
            name,
            f"it is {list(shape)} and {scale.name} {list(scale.shape)}: neither one scale, nor one per row"
            + (f", nor one per block of {known}" if known else ""),
        )
    zero = f"{name}_zero_point"
    if zero in reader.tensors:
        _refuse_zero_points(reader, name, zero)
        parts.append(zero)
    return _WeightScaled(reader, TensorInfo(name, shape, dtype, info.shard), tuple(parts), scale.name, block)


def _scale_block(scale: tuple[int, ...], shape: tuple[int, ...], blocks: Iterable[_Block]) -> _Block | None:
    """Rows and columns that share a scale."""
    high, wide = shape
    if scale in ((), (1,), (1, 1)):
        return high, wide
    for block in blocks:
        if scale == (-(-high // block[0]), -(-wide // block[1])):
            return block
    return (1, wide) if scale in ((high,), (high, 1)) else None


def _refuse_zero_points(reader: TensorReader, name: str, zero: str) -> None:
    """Symmetric checkpoints of older writers carry zero points that are all zero."""
    info = part(reader, name, zero, ("I8", "U8", *FLOAT8, *FLOAT_DTYPES))
    if elements(reader, zero, 0, info.size).any():
        raise unsupported("compressed-tensors", f"{name} is quantized asymmetrically")


def _scales(reader: TensorReader, name: str, start: int, stop: int) -> FloatArray:
    """Scales `start:stop`; one byte holds a power of two (E8M0 of the OCP microscaling formats)."""
    stored = elements(reader, name, start, stop)
    if reader.tensors[name].dtype not in ("F8_E8M0", "U8"):
        return np.asarray(stored, np.float32)
    scales = np.exp2(stored.astype(np.float32) - 127)
    scales[stored == 255] = np.nan
    return scales


@functools.cache
def _float8(dtype: str) -> FloatArray:
    """The 256 values of an 8-bit float (https://arxiv.org/abs/2209.05433), float32."""
    bits = np.arange(256)
    mantissa_bits, bias = (3, 7) if dtype == "F8_E4M3" else (2, 15)
    mantissa = (bits & ((1 << mantissa_bits) - 1)) / (1 << mantissa_bits)
    exponent = (bits >> mantissa_bits) & ((1 << (7 - mantissa_bits)) - 1)
    values = np.where(exponent == 0, mantissa * 2.0 ** (1 - bias), (1 + mantissa) * 2.0 ** (exponent - bias))
    if dtype == "F8_E4M3":  # no infinities, one NaN
        values[(bits & 0x7F) == 0x7F] = np.nan
    else:
        values[exponent == 31] = np.where(mantissa[exponent == 31] == 0, np.inf, np.nan)
    return np.where(bits & 0x80, -values, values).astype(np.float32)


def _block(value: Any, method: str) -> _Block | None:
    if value is None:
        return None
    sound = isinstance(value, list) and len(value) == 2 and all(type(n) is int and n > 0 for n in value)
    if not sound:
        raise unsupported(method, f"its blocks are {value!r}, expected two positive lengths")
    return value[0], value[1]
