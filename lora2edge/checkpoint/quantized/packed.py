"""GPTQ and AWQ weights: integers packed into int32, a scale and a zero point per group of input channels.

GPTQ (https://arxiv.org/abs/2210.17323, the layout of AutoGPTQ and GPTQModel): `qweight` `[in × bits / 32, out]`,
packed along the input channels, lowest bits first; `qzeros` `[groups, out × bits / 32]`; `scales` `[groups, out]`;
`g_idx` `[in]`, the group of each input channel, which is what act-order changes. Format "gptq" (v1) stores zero
points less one, "gptq_v2" as they are.
AWQ (https://arxiv.org/abs/2306.00978, version "gemm" of AutoAWQ): 4 bits, `qweight` `[in, out / 8]`, packed along
the output channels in the order 0, 2, 4, 6, 1, 3, 5, 7; `qzeros` `[groups, out / 8]`; `scales` `[groups, out]`.

A weight is (integer − zero point) × scale, one product rounded to the scales' dtype: what AutoGPTQ's, GPTQModel's
and AutoAWQ's own dequantization gives. Rows are bit-equal to it.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from lora2edge.checkpoint.quantized.weight import (
    Weight,
    damaged,
    elements,
    expect_shape,
    part,
    refuse_conv1d,
    rounded,
    unsupported,
)
from lora2edge.contracts import TensorInfo

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lora2edge.checkpoint.reader import TensorReader
    from lora2edge.contracts import FloatArray

AUXILIARY = ("qweight", "qzeros", "scales", "g_idx")
"""Last components of the names of what is no weight itself."""

_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Nibble of a word that holds its n-th output channel."""
_BLOCK_BYTES = 1 << 22
_BLOCKS_KEPT = 8


def find_gptq(settings: Mapping[str, Any], config: Mapping[str, Any], reader: TensorReader) -> list[Weight]:
    """The weights of a GPTQ checkpoint. Raises CheckpointError for an unknown format, or parts that do not fit."""
    bits = settings.get("bits")
    layout = settings.get("checkpoint_format") or settings.get("format") or "gptq"
    if bits not in (2, 4, 8):
        raise unsupported("GPTQ", f"bits is {bits!r}, known are 2, 4 and 8")
    if layout not in ("gptq", "gptq_v2") or settings.get("is_marlin_format"):
        raise unsupported("GPTQ", f"its format is {layout!r}, known are 'gptq' and 'gptq_v2'")
    dynamic = settings.get("dynamic")
    if dynamic and (not isinstance(dynamic, dict) or any(not str(rule).startswith("-:") for rule in dynamic)):
        raise unsupported("GPTQ", "it has other settings for some layers ('dynamic')")
    group = _group_size(settings, "GPTQ")
    columns = _Columns(reader)
    found = [
        _read_gptq(columns, name.removesuffix(".qweight"), bits, group, layout == "gptq")
        for name in reader.tensors
        if name.endswith(".qweight")
    ]
    if found:
        refuse_conv1d(config, "GPTQ")
    return found


def find_awq(settings: Mapping[str, Any], config: Mapping[str, Any], reader: TensorReader) -> list[Weight]:
    """The weights of an AWQ checkpoint. Raises CheckpointError for an unknown version, or parts that do not fit."""
    bits = settings.get("bits", settings.get("w_bit", 4))
    version = settings.get("version") or settings.get("format") or "gemm"
    if bits != 4:
        raise unsupported("AWQ", f"bits is {bits!r}, known is 4")
    if str(version).lower() != "gemm":
        raise unsupported("AWQ", f"its version is {version!r}, known is 'gemm'")
    if settings.get("zero_point", True) is not True:
        raise unsupported("AWQ", "it has no zero points, which no reader agrees on")
    group = _group_size(settings, "AWQ")
    columns = _Columns(reader)
    found = [
        _read_awq(columns, name.removesuffix(".qweight"), group) for name in reader.tensors if name.endswith(".qweight")
    ]
    if found:
        refuse_conv1d(config, "AWQ")
    return found


class _Columns:
    """Blocks of columns of stored int32 matrices. The last few are kept: a slab of rows is a few bytes of each line."""

    def __init__(self, reader: TensorReader) -> None:
        self.reader = reader
        self._kept: OrderedDict[tuple[str, int], NDArray[np.int32]] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, name: str, start: int, stop: int) -> NDArray[np.int32]:
        """Columns `start:stop` of the int32 matrix `name`."""
        lines, width = self.reader.tensors[name].shape
        step = max(16, _BLOCK_BYTES // (4 * max(lines, 1)) // 16 * 16)
        blocks = range(start // step, -(-stop // step))
        found = [self._block(name, at, lines, at * step, min((at + 1) * step, width)) for at in blocks]
        joined = found[0] if len(found) == 1 else np.concatenate(found, axis=1)
        return joined[:, start - blocks.start * step : stop - blocks.start * step]

    def _block(self, name: str, at: int, lines: int, start: int, stop: int) -> NDArray[np.int32]:
        with self._lock:
            kept = self._kept.get((name, at))
            if kept is not None:
                self._kept.move_to_end((name, at))
                return kept
            width = self.reader.tensors[name].shape[1]
            block = np.empty((lines, stop - start), np.int32)
            for line in range(lines):
                raw = self.reader.raw(name, 4 * (line * width + start), 4 * (line * width + stop))
                block[line] = raw.view("<i4")
            self._kept[name, at] = block
            if len(self._kept) > _BLOCKS_KEPT:
                self._kept.popitem(last=False)
            return block


class _WeightPacked:
    """`[out, in]`, from stored matrices that have the output channels as columns."""

    def __init__(
        self, columns: _Columns, info: TensorInfo, module: str, groups: NDArray[np.int32], bits: int,
        *, awq: bool, stored_less_one: bool,
    ) -> None:  # fmt: skip
        present = [f"{module}.{name}" for name in AUXILIARY]
        self.info = info
        self.parts = tuple(name for name in present if name in columns.reader.tensors)
        self._columns = columns
        self._module = module
        self._groups = groups
        self._bits = bits
        self._awq = awq
        self._stored_less_one = stored_less_one

    def rows(self, start: int, stop: int) -> FloatArray:
        """Computed as `[in, stop - start]`, where a group is whole lines, and turned round at the end."""
        zeros = self._along_out("qzeros", start, stop)
        if self._stored_less_one:
            zeros = (zeros + 1) % (1 << self._bits)
        if self._awq:
            values = self._along_out("qweight", start, stop)
        else:
            values = _unpack_lines(self._columns.read(f"{self._module}.qweight", start, stop), self._bits)
        values -= zeros[self._groups]
        values *= self._scales(start, stop)[self._groups]
        return rounded(np.ascontiguousarray(values.T), self.info.dtype)

    def _along_out(self, name: str, start: int, stop: int) -> FloatArray:
        """Output channels `start:stop` of a matrix that is packed along them: integers in float32."""
        each = 32 // self._bits
        first = start // each
        words = self._columns.read(f"{self._module}.{name}", first, -(-stop // each)).view(np.uint32)
        codes = np.empty((*words.shape, each), np.float32)
        for at, nibble in enumerate(_AWQ_ORDER if self._awq else range(each)):
            codes[:, :, at] = words >> np.uint32(self._bits * nibble) & np.uint32((1 << self._bits) - 1)
        return codes.reshape(len(words), -1)[:, start - first * each : stop - first * each]

    def _scales(self, start: int, stop: int) -> FloatArray:
        name = f"{self._module}.scales"
        reader = self._columns.reader
        count, width = reader.tensors[name].shape
        out = np.empty((count, stop - start), np.float32)
        for group in range(count):
            out[group] = elements(reader, name, group * width + start, group * width + stop)
        return out


def _unpack_lines(words: NDArray[np.int32], bits: int) -> FloatArray:
    """`[lines, n]` int32 → `[lines × 32 / bits, n]`, lowest bits first: integers in float32."""
    each = 32 // bits
    unsigned = words.view(np.uint32)
    codes = np.empty((len(words), each, words.shape[1]), np.float32)
    for at in range(each):
        codes[:, at] = unsigned >> np.uint32(bits * at) & np.uint32((1 << bits) - 1)
    return codes.reshape(-1, words.shape[1])


def _read_gptq(columns: _Columns, module: str, bits: int, group: int, stored_less_one: bool) -> Weight:
    reader, name = columns.reader, f"{module}.weight"
    qweight = part(reader, name, f"{module}.qweight", ("I32",))
    if len(qweight.shape) != 2:
        raise damaged(name, f"{qweight.name} is {list(qweight.shape)}, expected two axes")
    inputs, outputs = qweight.shape[0] * 32 // bits, qweight.shape[1]
    count = _check_groups(columns, name, module, inputs, outputs, bits, group)
    groups = (np.arange(inputs) // (group if group > 0 else max(inputs, 1))).astype(np.int32)
    if f"{module}.g_idx" in reader.tensors:
        expect_shape(name, part(reader, name, f"{module}.g_idx", ("I32",)), (inputs,))
        groups = elements(reader, f"{module}.g_idx", 0, inputs)
        if inputs and not (groups.min() >= 0 and groups.max() < count):
            raise damaged(name, f"{module}.g_idx names group {int(groups.max())} of {count}")
    info = TensorInfo(name, (outputs, inputs), reader.tensors[f"{module}.scales"].dtype, qweight.shard)
    return _WeightPacked(columns, info, module, groups, bits, awq=False, stored_less_one=stored_less_one)


def _read_awq(columns: _Columns, module: str, group: int) -> Weight:
    reader, name = columns.reader, f"{module}.weight"
    qweight = part(reader, name, f"{module}.qweight", ("I32",))
    if len(qweight.shape) != 2:
        raise damaged(name, f"{qweight.name} is {list(qweight.shape)}, expected two axes")
    inputs, outputs = qweight.shape[0], qweight.shape[1] * 8
    _check_groups(columns, name, module, inputs, outputs, 4, group)
    groups = (np.arange(inputs) // (group if group > 0 else max(inputs, 1))).astype(np.int32)
    info = TensorInfo(name, (outputs, inputs), reader.tensors[f"{module}.scales"].dtype, qweight.shard)
    return _WeightPacked(columns, info, module, groups, 4, awq=True, stored_less_one=False)


def _check_groups(columns: _Columns, name: str, module: str, inputs: int, outputs: int, bits: int, group: int) -> int:
    """Shapes of `scales` and `qzeros`; returns the number of groups."""
    reader = columns.reader
    count = -(-inputs // group) if group > 0 else 1
    expect_shape(name, part(reader, name, f"{module}.scales", ("F16", "BF16", "F32")), (count, outputs))
    expect_shape(name, part(reader, name, f"{module}.qzeros", ("I32",)), (count, -(-outputs * bits // 32)))
    return count


def _group_size(settings: Mapping[str, Any], method: str) -> int:
    group = settings.get("group_size", settings.get("q_group_size", 128))
    if type(group) is not int or not (group == -1 or group > 0):
        raise unsupported(method, f"group_size is {group!r}, expected -1 or a positive number")
    return group
