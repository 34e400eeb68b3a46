"""Weights that bitsandbytes packed and transformers saved: NF4, FP4 (also double-quantized) and LLM.int8().

4-bit: `NAME` holds two codes per byte in any storage dtype, `NAME.absmax` the block scales (8-bit codes where they
are quantized themselves, then with `NAME.nested_absmax` and `NAME.nested_quant_map`), and
`NAME.quant_state.bitsandbytes__nf4` or `…__fp4` the rest as the bytes of a JSON text.
int8: `MODULE.weight` int8, `MODULE.SCB` the largest magnitude of each row, `MODULE.weight_format` 0.

Rows are bit-equal to `bitsandbytes.functional.dequantize_4bit` and `int8_vectorwise_dequant` (0.50, CPU). The first
multiplies in float32 and rounds to the dtype that the weight was quantized from, which is what a live layer, PEFT's
merge and transformers' `dequantize()` use; the second stays in float32.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from lora2edge.checkpoint.floats import FLOAT_DTYPES
from lora2edge.checkpoint.quantized.blocks import (
    BLOCK_SIZES,
    CODES,
    dequantize_blocks,
    restore_absmax,
)
from lora2edge.checkpoint.quantized.weight import (
    Weight,
    config_dtype,
    damaged,
    elements,
    expect_shape,
    part,
    refuse_conv1d,
    rounded,
    torch_dtype,
)
from lora2edge.contracts import TensorInfo

if TYPE_CHECKING:
    from lora2edge.checkpoint.reader import TensorReader
    from lora2edge.contracts import FloatArray

AUXILIARY = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", "bitsandbytes__nf4", "bitsandbytes__fp4",
             "SCB", "weight_format")  # fmt: skip
"""Last components of the names of what is no weight itself."""

_STATE = ".quant_state.bitsandbytes__"
_MAX_STATE_BYTES = 1 << 16
_INT8_STEP = np.float32(7.874015718698502e-3)
"""1/127, as bitsandbytes multiplies with it."""


def find_bitsandbytes(settings: Mapping[str, Any], config: Mapping[str, Any], reader: TensorReader) -> list[Weight]:
    """The weights of a checkpoint that bitsandbytes quantized. Raises CheckpointError where parts do not fit."""
    found: list[Weight] = []
    for name in reader.tensors:
        if _STATE in name:
            owner, _, quant_type = name.partition(_STATE)
            found.append(_read_4bit(reader, owner, name, quant_type))
        elif name.endswith(".SCB"):
            found.append(_read_int8(reader, name.removesuffix(".SCB"), config_dtype(config, "F16")))
    if found:
        refuse_conv1d(config, "bitsandbytes")
    return found


class _Weight4bit:
    def __init__(
        self, reader: TensorReader, info: TensorInfo, parts: tuple[str, ...], quant_type: str, blocksize: int,
        nested: _Nested | None,
    ) -> None:  # fmt: skip
        self.info = info
        self.parts = parts
        self._reader = reader
        self._quant_type = quant_type
        self._blocksize = blocksize
        self._nested = nested

    def rows(self, start: int, stop: int) -> FloatArray:
        """Reads the blocks that the rows touch: at most one more at each end."""
        width = math.prod(self.info.shape[1:])
        first, last = start * width, stop * width
        size = self._blocksize
        block, end = first // size, -(-last // size)
        packed = self._reader.raw(self.info.name, block * size // 2, -(-min(end * size, self.info.size) // 2)).copy()
        values = dequantize_blocks(packed, self._absmax(block, end), self._quant_type, size)
        wanted = values[first - block * size : last - block * size]
        return rounded(wanted, self.info.dtype).reshape(stop - start, *self.info.shape[1:])

    def _absmax(self, start: int, stop: int) -> FloatArray:
        name = f"{self.info.name}.absmax"
        if self._nested is None:
            return elements(self._reader, name, start, stop)
        size = self._nested.blocksize
        first = start // size
        codes = elements(self._reader, name, first * size, stop)
        scales = elements(self._reader, f"{self.info.name}.nested_absmax", first, -(-stop // size))
        return restore_absmax(codes, self._nested.code, scales, size, self._nested.offset)[start - first * size :]


class _Nested:
    """Double quantization's own settings."""

    def __init__(self, blocksize: int, offset: np.float32, code: FloatArray) -> None:
        self.blocksize = blocksize
        self.offset = offset
        self.code = code


class _WeightInt8:
    def __init__(self, reader: TensorReader, info: TensorInfo, parts: tuple[str, ...], scales: str) -> None:
        self.info = info
        self.parts = parts
        self._reader = reader
        self._scales = scales

    def rows(self, start: int, stop: int) -> FloatArray:
        width = self.info.shape[1]
        codes = elements(self._reader, self.info.name, start * width, stop * width)
        values = codes.astype(np.float32).reshape(stop - start, width)
        values *= elements(self._reader, self._scales, start, stop)[:, None]
        values *= _INT8_STEP
        return values


def _read_4bit(reader: TensorReader, name: str, state_name: str, quant_type: str) -> Weight:
    state = _state(reader, name, state_name)
    if quant_type not in CODES or state.get("quant_type") != quant_type:
        raise damaged(name, f"its quant_type is {state.get('quant_type')!r} in {state_name}, expected nf4 or fp4")
    blocksize, shape, dtype = state.get("blocksize"), state.get("shape"), torch_dtype(state.get("dtype"))
    if type(blocksize) is not int or blocksize not in BLOCK_SIZES:
        raise damaged(name, f"its blocksize is {blocksize!r}, expected one of {', '.join(map(str, BLOCK_SIZES))}")
    if not isinstance(shape, list) or not shape or not all(type(n) is int and n > 0 for n in shape):
        raise damaged(name, f"its shape is {shape!r}, expected a list of lengths")
    if dtype is None:
        raise damaged(name, f"its dtype is {state.get('dtype')!r}, expected bfloat16, float16 or float32")
    stored = reader.stored.get(name)
    if stored is None:
        raise damaged(name, f"{state_name} is there without it")
    info = TensorInfo(name, tuple(shape), dtype, stored.info.shard)
    if stored.length != -(-info.size // 2):
        raise damaged(name, f"it has {stored.length} bytes, {shape} in 4 bits needs {-(-info.size // 2)}")
    blocks = -(-info.size // blocksize)
    absmax = part(reader, name, f"{name}.absmax", ("U8", *FLOAT_DTYPES))
    expect_shape(name, absmax, (blocks,))
    table = part(reader, name, f"{name}.quant_map", ("F32",))
    expect_shape(name, table, (16,))
    if not np.allclose(elements(reader, table.name, 0, 16), CODES[quant_type], rtol=0, atol=1e-6):
        raise damaged(name, f"{table.name} is not the table of {quant_type}")
    parts = [name, state_name, absmax.name, table.name]
    nested = None
    if absmax.dtype == "U8":
        nested = _nested(reader, name, state, blocks)
        parts += [f"{name}.nested_absmax", f"{name}.nested_quant_map"]
    return _Weight4bit(reader, info, tuple(parts), quant_type, blocksize, nested)


def _state(reader: TensorReader, owner: str, name: str) -> dict[str, Any]:
    info = part(reader, owner, name, ("U8",))
    if info.size > _MAX_STATE_BYTES:
        raise damaged(owner, f"{name} has {info.size} bytes, expected a JSON text of about 100")
    try:
        state = json.loads(reader.raw(name, 0, info.size).tobytes())
    except (ValueError, RecursionError) as error:
        raise damaged(owner, f"{name} is no JSON: {error}") from error
    if not isinstance(state, dict):
        raise damaged(owner, f"{name} holds a JSON {type(state).__name__}, expected an object")
    return state


def _nested(reader: TensorReader, name: str, state: Mapping[str, Any], blocks: int) -> _Nested:
    blocksize, offset = state.get("nested_blocksize"), state.get("nested_offset")
    if type(blocksize) is not int or not 0 < blocksize <= max(BLOCK_SIZES):
        raise damaged(name, f"its nested_blocksize is {blocksize!r}, expected 256")
    if not isinstance(offset, int | float) or isinstance(offset, bool) or not math.isfinite(offset):
        raise damaged(name, f"its nested_offset is {offset!r}, expected a number")
    if state.get("nested_dtype") != "float32":
        raise damaged(name, f"its nested_dtype is {state.get('nested_dtype')!r}, expected float32")
    scales = part(reader, name, f"{name}.nested_absmax", ("F32",))
    expect_shape(name, scales, (-(-blocks // blocksize),))
    table = part(reader, name, f"{name}.nested_quant_map", ("F32",))
    expect_shape(name, table, (256,))
    return _Nested(blocksize, np.float32(offset), elements(reader, table.name, 0, 256))


def _read_int8(reader: TensorReader, module: str, dtype: str) -> Weight:
    name = f"{module}.weight"
    stored = part(reader, name, name, ("I8",))
    if len(stored.shape) != 2:
        raise damaged(name, f"it is {list(stored.shape)}, expected two axes")
    scales = part(reader, name, f"{module}.SCB", tuple(FLOAT_DTYPES))
    expect_shape(name, scales, (stored.shape[0],))
    parts = [name, scales.name]
    layout = f"{module}.weight_format"
    if layout in reader.tensors:
        expect_shape(name, part(reader, name, layout, ("U8",)), (), (1,))
        if elements(reader, layout, 0, 1)[0] != 0:
            raise damaged(name, f"{layout} says that it lies in a GPU's tile order, not in rows")
        parts.append(layout)
    return _WeightInt8(reader, TensorInfo(name, stored.shape, dtype, stored.shard), tuple(parts), scales.name)
