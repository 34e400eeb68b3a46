"""What an ONNX file says of its external data and of its integer arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora2edge.errors import InputError

_CHEAP = frozenset({
    "Add", "And", "Cast", "Clip", "Concat", "Constant", "ConstantOfShape", "CumSum", "Div", "Equal", "Expand",
    "Flatten", "Gather", "GatherElements", "GatherND", "Greater", "GreaterOrEqual", "Identity", "Less",
    "LessOrEqual", "Max", "Min", "Mod", "Mul", "Neg", "Not", "Or", "Range", "ReduceMax", "ReduceMin",
    "ReduceSum", "Reshape", "Shape", "Size", "Slice", "Split", "Squeeze", "Sub", "Tile", "Transpose",
    "Unsqueeze", "Where",
})  # fmt: skip
_FROM_ANYTHING = frozenset({"Shape", "Size"})
"""Their outputs are integers, whatever goes in."""


@dataclass(frozen=True, slots=True)
class ExternalFile:
    """A file that weights are read from, and how long it has to be."""

    location: str
    """Relative to the model's file."""
    size_bytes: int


@dataclass(frozen=True, slots=True)
class ModelFile:
    """What is known of a model without its weights."""

    externals: tuple[ExternalFile, ...]
    integer_nodes: frozenset[str]
    """Names of the nodes that compute with integers alone: shapes, lengths, positions."""


def read_model_file(path: Path) -> ModelFile:
    """Reads `path`, and none of the weights beside it. Raises InputError, code `broken-model`."""
    import onnx
    from google.protobuf.message import DecodeError

    try:
        graph = onnx.load(path, load_external_data=False).graph
        if not graph.node:
            raise ValueError("it holds no graph")
        sizes: dict[str, int] = {}
        for tensor in graph.initializer:
            told = {entry.key: entry.value for entry in tensor.external_data}
            if location := told.get("location"):
                end = int(told.get("offset", 0)) + int(told.get("length", 0))
                sizes[location] = max(end, sizes.get(location, 0))
    except (OSError, ValueError, DecodeError) as error:
        raise InputError(
            "broken-model", f"{path} is no ONNX model", why=str(error), hint="build the artifact again"
        ) from error
    externals = tuple(ExternalFile(location, size) for location, size in sizes.items())
    return ModelFile(externals, frozenset(_integer_nodes(graph)))


def _integer_nodes(graph: Any) -> Iterator[str]:
    """Names of the nodes whose inputs are all integers, and that are no product; nodes come in the order of use."""
    from onnx import TensorProto

    types = {"FLOAT", "FLOAT16", "BFLOAT16", "DOUBLE", "STRING", "UNDEFINED"}
    others = {TensorProto.DataType.Value(name) for name in types}
    integers = {tensor.name for tensor in graph.initializer if tensor.data_type not in others}
    integers |= {value.name for value in graph.input if value.type.tensor_type.elem_type not in others}
    for node in graph.node:
        to = next((attribute.i for attribute in node.attribute if attribute.name == "to"), 0)
        inputs = [name for name in node.input if name]
        if node.op_type in _FROM_ANYTHING or (node.op_type in _CHEAP and all(name in integers for name in inputs)):
            if node.name:
                yield node.name
            if node.op_type != "Cast" or to not in others:
                integers.update(node.output)
