"""What an ONNX file says of its external data and of its integer arithmetic, read without the onnx package.

Only a few fields are needed, and importing onnx would take more memory than a session on packed weights. Field numbers
are those of onnx.proto (IR version 10).
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lora2edge.errors import InputError

_GRAPH = 7
_NODE, _INITIALIZER, _INPUT = 1, 5, 11
_INTEGERS = {2, 3, 4, 5, 6, 7, 9, 12, 13}
"""TensorProto.DataType of integers and booleans."""
_CHEAP = frozenset({
    "Add", "And", "Cast", "Clip", "Concat", "Constant", "ConstantOfShape", "CumSum", "Div", "Equal", "Expand",
    "Flatten", "Gather", "GatherElements", "GatherND", "Greater", "GreaterOrEqual", "Identity", "Less",
    "LessOrEqual", "Max", "Min", "Mod", "Mul", "Neg", "Not", "Or", "Range", "ReduceMax", "ReduceMin",
    "ReduceSum", "Reshape", "Shape", "Size", "Slice", "Split", "Squeeze", "Sub", "Tile", "Transpose",
    "Unsqueeze", "Where",
})  # fmt: skip
_FROM_ANYTHING = frozenset({"Shape", "Size"})
"""Their outputs are integers, whatever goes in."""

Field = tuple[int, int | memoryview]


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
    """Reads `path`; weights that lie in it are passed over. Raises InputError, code `broken-model`."""
    try:
        with path.open("rb") as file:
            # Not closed: an error's traceback holds on to parts of it.
            data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        return _read(data)
    except (OSError, ValueError) as error:
        raise InputError(
            "broken-model", f"{path} is no ONNX model", why=str(error), hint="build the artifact again"
        ) from error


def _read(data: memoryview) -> ModelFile:
    sizes: dict[str, int] = {}
    integers: set[str] = set()
    nodes: list[bytes] = []
    found = False
    for number, graph in _fields(data):
        if number != _GRAPH:
            continue
        found = True
        for kind, value in _fields(_bytes(graph)):
            if kind == _INITIALIZER:
                _read_initializer(_bytes(value), sizes, integers)
            elif kind == _INPUT:
                _read_input(_bytes(value), integers)
            elif kind == _NODE:
                nodes.append(bytes(_bytes(value)))
    if not found:
        raise ValueError("it holds no graph")
    names = frozenset(_integer_nodes(nodes, integers))
    return ModelFile(tuple(ExternalFile(location, size) for location, size in sizes.items()), names)


def _read_initializer(tensor: memoryview, sizes: dict[str, int], integers: set[str]) -> None:
    name, dtype = "", 0
    entries: dict[str, str] = {}
    for number, value in _fields(tensor):
        if number == 2:
            dtype = _int(value)
        elif number == 8:
            name = _text(value)
        elif number == 13:
            pair = {key: _text(text) for key, text in _fields(_bytes(value))}
            entries[pair.get(1, "")] = pair.get(2, "")
    if dtype in _INTEGERS:
        integers.add(name)
    if location := entries.get("location"):
        end = int(entries.get("offset", 0)) + int(entries.get("length", 0))
        sizes[location] = max(end, sizes.get(location, 0))


def _read_input(info: memoryview, integers: set[str]) -> None:
    name, dtype = "", 0
    for number, value in _fields(info):
        if number == 1:
            name = _text(value)
        elif number == 2:
            for kind, tensor in _fields(_bytes(value)):
                if kind == 1:
                    dtype = next((_int(item) for key, item in _fields(_bytes(tensor)) if key == 1), 0)
    if dtype in _INTEGERS:
        integers.add(name)


def _integer_nodes(nodes: list[bytes], integers: set[str]) -> Iterator[str]:
    """Names of the nodes whose inputs are all integers, and that are no product; nodes come in the order of use."""
    for node in nodes:
        inputs, outputs, name, kind, to = [], [], "", "", 0
        for number, value in _fields(memoryview(node)):
            if number == 1:
                inputs.append(_text(value))
            elif number == 2:
                outputs.append(_text(value))
            elif number == 3:
                name = _text(value)
            elif number == 4:
                kind = _text(value)
            elif number == 5:
                attribute = dict(_fields(_bytes(value)))
                if 1 in attribute and _text(attribute[1]) == "to":
                    to = _int(attribute.get(3, 0))
        if kind in _FROM_ANYTHING or (kind in _CHEAP and all(item in integers for item in inputs if item)):
            if name:
                yield name
            if kind != "Cast" or to in _INTEGERS:
                integers.update(outputs)


def _fields(data: memoryview) -> Iterator[Field]:
    """Field numbers and values of a protobuf message: numbers, or bytes."""
    place, end = 0, len(data)
    while place < end:
        tag, place = _varint(data, place)
        kind = tag & 7
        if kind == 0:
            value, place = _varint(data, place)
            yield tag >> 3, value
            continue
        length = {1: 8, 5: 4}.get(kind)
        if kind == 2:
            length, place = _varint(data, place)
        if length is None or place + length > end:
            raise ValueError("it is cut off, or no protobuf message")
        yield tag >> 3, data[place : place + length]
        place += length


def _varint(data: memoryview, place: int) -> tuple[int, int]:
    value = shift = 0
    while shift < 64 and place < len(data):
        byte = data[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
        shift += 7
    raise ValueError("it is cut off, or no protobuf message")


def _bytes(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise ValueError("a field has another type than ONNX gives it")
    return value


def _text(value: int | memoryview) -> str:
    return bytes(_bytes(value)).decode("utf-8")


def _int(value: int | memoryview) -> int:
    if not isinstance(value, int):
        raise ValueError("a field has another type than ONNX gives it")
    return value
