"""Which ggml type each tensor gets: the same decisions as llama.cpp's `llama-quantize`, for dense decoders.

A file type such as Q4_K_M is a mixture. The decisions depend on the tensor's role, on how many tensors of that role
came before it in llama.cpp's order (layer number, then name), on the attention's group size and on whether an
importance matrix is there (llama.cpp, src/llama-quant.cpp, versions 0.5 and 0.6).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class GgmlType:
    """A storage type of ggml: `block` elements of a row take `size_bytes` bytes."""

    name: str
    id: int
    block: int
    size_bytes: int

    @property
    def is_quantized(self) -> bool:
        return self.block > 1


TYPES: Mapping[str, GgmlType] = {
    item.name: item
    for item in (
        GgmlType("F32", 0, 1, 4),
        GgmlType("F16", 1, 1, 2),
        GgmlType("Q4_0", 2, 32, 18),
        GgmlType("Q4_1", 3, 32, 20),
        GgmlType("Q5_0", 6, 32, 22),
        GgmlType("Q5_1", 7, 32, 24),
        GgmlType("Q8_0", 8, 32, 34),
        GgmlType("Q2_K", 10, 256, 84),
        GgmlType("Q3_K", 11, 256, 110),
        GgmlType("Q4_K", 12, 256, 144),
        GgmlType("Q5_K", 13, 256, 176),
        GgmlType("Q6_K", 14, 256, 210),
        GgmlType("IQ4_NL", 20, 32, 18),
        GgmlType("IQ4_XS", 23, 256, 136),
        GgmlType("BF16", 30, 1, 2),
    )
}
TYPES_BY_ID: Mapping[int, GgmlType] = {item.id: item for item in TYPES.values()}


@dataclass(frozen=True, slots=True)
class FileType:
    """A mixture, as llama.cpp names it."""

    name: str
    id: int
    """`general.file_type`."""
    default: str
    """The type of a matrix that no rule raises or lowers."""
    imatrix: bool
    """Whether rounding gains from an importance matrix."""


FILE_TYPES: Mapping[str, FileType] = {
    item.name: item
    for item in (
        FileType("F32", 0, "F32", False),
        FileType("F16", 1, "F16", False),
        FileType("BF16", 32, "BF16", False),
        FileType("Q8_0", 7, "Q8_0", False),
        FileType("Q6_K", 18, "Q6_K", True),
        FileType("Q5_K_M", 17, "Q5_K", True),
        FileType("Q4_K_M", 15, "Q4_K", True),
        FileType("Q4_0", 2, "Q4_0", True),
        FileType("IQ4_XS", 30, "IQ4_XS", True),
        FileType("Q3_K_M", 12, "Q3_K", True),
        FileType("Q2_K", 10, "Q2_K", True),
    )
}

# What takes the place of a type whose blocks of 256 do not divide the row.
_NARROWER = {
    "Q2_K": "Q4_0",
    "Q3_K": "Q4_0",
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
    "IQ4_XS": "IQ4_NL",
}


@dataclass(frozen=True, slots=True)
class Shape:
    """What of a model the mixture depends on."""

    layers: int
    heads: int
    kv_heads: int
    is_llama: bool

    @property
    def group(self) -> int:
        """Query heads that share a key-value head."""
        return self.heads // self.kv_heads

    @property
    def is_70b(self) -> bool:
        """llama.cpp tells the 70B Llama by its depth, and gives its small value projections more bits."""
        return self.is_llama and self.layers == 80 and self.heads != self.kv_heads


def row_bytes(type_name: str, columns: int) -> int:
    """Bytes of one row of `columns` elements."""
    kind = TYPES[type_name]
    return columns // kind.block * kind.size_bytes


def order_key(name: str) -> tuple[int, str]:
    """llama.cpp walks tensors by layer number, those without one first, then by name."""
    found = re.match(r"blk\.(\d+)\.", name)
    return (int(found[1]) if found else -1, name)


def choose_types(
    shapes: Mapping[str, tuple[int, ...]],
    file_type: FileType,
    model: Shape,
    *,
    imatrix: bool,
    output: str | None = None,
    embedding: str | None = None,
) -> dict[str, str]:
    """GGUF tensor name → type name, for `shapes` (rows first, row length last) in llama.cpp's order.

    `output` and `embedding` take the place of what the mixture has for the output layer (which may be the embedding)
    and for an embedding that is not the output layer, as llama-quantize's options of these names do.
    Vectors and norms stay F32. A row that no block divides falls back to a type with smaller blocks, or to F16.
    """
    tied = "output.weight" not in shapes
    values = sum(_is_value(name) for name in shapes)
    seen_values = seen_downs = 0
    result: dict[str, str] = {}
    for name in sorted(shapes, key=order_key):
        shape = shapes[name]
        if len(shape) < 2 or not name.endswith("weight") or "_norm.weight" in name:
            result[name] = "F32"
            continue
        chosen = file_type.default
        if TYPES[chosen].is_quantized:
            if name == "output.weight" or (tied and name == "token_embd.weight"):
                chosen = output or _output(chosen, shape[-1])
            elif name == "token_embd.weight" and embedding:
                chosen = embedding
            elif _is_value(name):
                chosen = _value(file_type.name, chosen, seen_values, values, model)
                seen_values += 1
            elif "ffn_down" in name:
                chosen = _down(file_type.name, chosen, seen_downs, model.layers, imatrix)
                seen_downs += 1
            elif "attn_output.weight" in name:
                chosen = {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K"}.get(file_type.name, chosen)
            chosen = _fitting(chosen, shape[-1])
        result[name] = chosen
    return result


def _is_value(name: str) -> bool:
    """Value projections, alone or fused with queries and keys: the most sensitive matrices."""
    return "attn_v.weight" in name or "attn_qkv.weight" in name


def _more_bits(index: int, count: int) -> bool:
    """The first and last eighth, and every third between."""
    return index < count // 8 or index >= 7 * count // 8 or (index - count // 8) % 3 == 2


def _output(chosen: str, columns: int) -> str:
    if columns % TYPES[chosen].block or chosen == "Q8_0":
        return "Q8_0"
    return "Q6_K"


def _value(file_type: str, chosen: str, index: int, count: int, model: Shape) -> str:
    if file_type == "Q2_K":
        chosen = "Q4_K" if model.group >= 4 else "Q3_K"
    elif file_type == "Q3_K_M":
        chosen = "Q5_K" if index < 2 else "Q4_K"
    elif file_type == "IQ4_XS" and model.group >= 4:
        chosen = "Q5_K"
    elif file_type in {"Q4_K_M", "Q5_K_M"} and _more_bits(index, count):
        chosen = "Q6_K"
    return "Q5_K" if model.is_70b and chosen in {"Q3_K", "Q4_K"} else chosen


def _down(file_type: str, chosen: str, index: int, layers: int, imatrix: bool) -> str:
    early = index < layers // 8
    if file_type == "Q2_K":
        return "Q3_K"
    if file_type == "Q3_K_M":
        return "Q5_K" if index < layers // 16 else "Q4_K"
    if file_type in {"Q4_K_M", "Q5_K_M"} and _more_bits(index, layers):
        return "Q6_K"
    if file_type == "IQ4_XS" and early and not imatrix:
        return "Q5_K"
    if file_type == "Q4_0" and early and imatrix:
        return "Q4_1"
    return chosen


def _fitting(chosen: str, columns: int) -> str:
    if columns % TYPES[chosen].block == 0:
        return chosen
    narrower = _NARROWER.get(chosen, chosen)
    return narrower if columns % TYPES[narrower].block == 0 else "F16"
