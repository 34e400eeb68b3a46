"""A matrix rounded for a GGUF file with GPTQ's codes under llama.cpp's headers.

The block's header comes from `ggml_quantize_chunk`, which weighs squared errors with the mean square of the inputs; the
codes come from the error feedback over the whole row. Type, size and speed are those of the file that llama.cpp would
have made, and any llama.cpp runs it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lora2edge.backends.gguf.blocks import GRID_TYPES, decode_rows, header_grid, replace_codes
from lora2edge.backends.gguf.damage import dequantize
from lora2edge.backends.gguf.mix import row_bytes
from lora2edge.backends.gguf.write import SLAB_ELEMENTS, Quantizer, encode
from lora2edge.checkpoint import in_order
from lora2edge.quantize import Factor, RoundingLog, gptq_codes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lora2edge.backends.gguf.blocks import Bytes
    from lora2edge.backends.gguf.imatrix import Importance
    from lora2edge.backends.gguf.model import Planned
    from lora2edge.contracts import FloatArray

_EMBEDDING = "token_embd.weight"


def gptq_names(tensors: Sequence[Planned], types: Mapping[str, str]) -> list[str]:
    """Tensors of the checkpoint whose codes GPTQ chooses; the embedding only where it is the output layer."""
    looked_up = _EMBEDDING if any(tensor.name == "output.weight" for tensor in tensors) else None
    return [
        tensor.source
        for tensor in tensors
        if tensor.source and types[tensor.name] in GRID_TYPES and tensor.name != looked_up
    ]


class BlockEncoder:
    """Tensors of a checkpoint as GGUF blocks; implements `layerwise.Encoder`. Rows are in the checkpoint's order."""

    def __init__(
        self,
        tensors: Sequence[Planned],
        types: Mapping[str, str],
        quantizer: Quantizer,
        importance: Importance | None,
    ) -> None:
        """`importance`: what an embedding whose codes are llama.cpp's is rounded with, where it is in it."""
        self._tensors = {tensor.source: tensor for tensor in tensors if tensor.source}
        self._embedding = next(tensor for tensor in tensors if tensor.name == _EMBEDDING)
        self._types, self._quantizer = types, quantizer
        self._weights = importance.weights(_EMBEDDING) if importance else None

    def encode(self, name: str, weights: FloatArray, factor: Factor, log: RoundingLog) -> Bytes:
        tensor = self._tensors[name]
        data = encode_gptq(tensor, weights, self._types[tensor.name], self._quantizer, factor, log)
        return data.reshape(len(weights), -1)

    def decode(self, name: str, data: Bytes) -> FloatArray:
        tensor = self._tensors[name]
        return decode_rows(data, self._types[tensor.name], tensor.shape[-1])

    def embedding(self, rows: FloatArray) -> FloatArray:
        type_name = self._types[_EMBEDDING]
        data = encode(self._embedding, rows, type_name, self._quantizer, self._weights)
        return dequantize(data.reshape(len(rows), -1), type_name)


def encode_gptq(
    tensor: Planned, rows: FloatArray, type_name: str, quantizer: Quantizer, factor: Factor, log: RoundingLog
) -> Bytes:
    """The bytes of `rows` (`[rows, columns]` float32, all of a tensor's or some): `[bytes]` uint8.

    `factor`: of the inputs that the tensor is multiplied with. Uses all cores: to be called for one tensor after the
    other, and with many rows at once. A type without a grid, and a tensor whose factor is a fall-back, are rounded by
    llama.cpp alone; `log` tells the latter. Raises CheckpointError for weights that the type cannot hold.
    """
    count, columns = rows.shape
    weights = None if factor.fallback else factor.importance
    step = max(SLAB_ELEMENTS // columns, 1)

    def header(start: int) -> Bytes:
        return encode(tensor, rows[start : start + step], type_name, quantizer, weights)

    data = np.concatenate([part for _, part in in_order(header, range(0, count, step))])
    if type_name not in GRID_TYPES:
        return data
    grid = header_grid(data, type_name, columns)
    log.add(tensor.name, grid, factor)
    if factor.fallback:
        return data
    codes = gptq_codes(rows, grid, factor)
    size = row_bytes(type_name, columns)

    def packed(start: int) -> None:
        part = slice(start * size, (start + step) * size)
        data[part] = replace_codes(data[part], type_name, codes[start : start + step])

    for _ in in_order(packed, range(0, count, step)):
        pass
    return data
