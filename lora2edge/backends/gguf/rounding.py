"""A matrix rounded for a GGUF file with GPTQ's codes under llama.cpp's headers.

The block's header comes from `ggml_quantize_chunk`, which weighs squared errors with the mean square of the inputs; the
codes come from the error feedback over the whole row. Type, size and speed are those of the file that llama.cpp would
have made, and any llama.cpp runs it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lora2edge.backends.gguf.blocks import GRID_TYPES, header_grid, replace_codes
from lora2edge.backends.gguf.mix import row_bytes
from lora2edge.backends.gguf.write import SLAB_ELEMENTS, Quantizer, encode
from lora2edge.checkpoint import in_order
from lora2edge.quantize import Factor, RoundingLog, gptq_codes

if TYPE_CHECKING:
    from lora2edge.backends.gguf.blocks import Bytes
    from lora2edge.backends.gguf.model import Planned
    from lora2edge.contracts import FloatArray


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
