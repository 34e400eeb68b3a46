"""The GGUF file: its header written in one go before the data, and read back without a memory map.

Version 3, little-endian (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). gguf-py packs a header item by
item and maps a file to read it; with a vocabulary of 150 thousand tokens that costs a second and 200 MB.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np

from lora2edge.backends.gguf.mix import TYPES, TYPES_BY_ID, row_bytes
from lora2edge.errors import CheckpointError

ALIGNMENT = 32
_MAGIC, _VERSION = b"GGUF", 3

Kind = Literal["u32", "i32", "f32", "bool", "str", "strings", "i32s", "f32s", "packed"]
Field = tuple[Kind, Any]
Metadata = dict[str, Field]

_SCALARS: dict[Kind, tuple[int, str]] = {"u32": (4, "<I"), "i32": (5, "<i"), "f32": (6, "<f"), "bool": (7, "<?")}
_STRING, _ARRAY = 8, 9
_ARRAYS: dict[Kind, tuple[int, str]] = {"i32s": (5, "<i4"), "f32s": (6, "<f4")}
_WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Value type → bytes, for those of a fixed size."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in a finished file."""

    name: str
    type: str
    """ggml's name, e.g. "Q4_K"."""
    shape: tuple[int, ...]
    """As numpy and safetensors order it: the row length is last."""
    offset: int
    """Of the first byte, from the start of the file."""

    @property
    def size_bytes(self) -> int:
        return tensor_bytes(self.type, self.shape)


def tensor_bytes(type_name: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor of that type."""
    return math.prod(shape[:-1]) * row_bytes(type_name, shape[-1])


def padding(size: int) -> int:
    """Zero bytes that follow `size` bytes."""
    return -size % ALIGNMENT


def write_header(file: IO[bytes], metadata: Metadata, tensors: Iterable[tuple[str, str, Sequence[int]]]) -> None:
    """Writes magic, metadata and tensor infos (name, type, shape), and pads: the data follow in the same order."""
    infos = list(tensors)
    file.write(_MAGIC + struct.pack("<IQQ", _VERSION, len(infos), len(metadata)))
    for key, (kind, value) in metadata.items():
        file.write(_packed(key))
        file.write(_packed_field(kind, value))
    offset = 0
    for name, type_name, shape in infos:
        file.write(_packed(name) + struct.pack("<I", len(shape)))
        file.write(struct.pack(f"<{len(shape)}Q", *reversed(shape)))
        file.write(struct.pack("<IQ", TYPES[type_name].id, offset))
        size = tensor_bytes(type_name, shape)
        offset += size + padding(size)
    file.write(b"\0" * padding(file.tell()))


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors of a GGUF file, by name, in the file's order. Raises CheckpointError where it is none of ours."""
    with path.open("rb") as file:
        try:
            return _read_header(file, path)
        except (struct.error, KeyError, ValueError, OverflowError) as error:
            raise CheckpointError("gguf-broken", f"{path} cannot be read as GGUF", why=repr(error)) from error


def _read_header(file: IO[bytes], path: Path) -> dict[str, Stored]:
    if file.read(4) != _MAGIC:
        raise CheckpointError("gguf-broken", f"{path} is not a GGUF file", why="it does not start with GGUF")
    version, count, fields = _unpack(file, "<IQQ")
    if version != _VERSION:
        raise CheckpointError("gguf-broken", f"{path} is GGUF version {version}", why=f"{_VERSION} was expected")
    for _ in range(fields):
        _skip_string(file)
        _skip_value(file, *_unpack(file, "<I"))
    found: list[tuple[str, str, tuple[int, ...], int]] = []
    for _ in range(count):
        name = file.read(*_unpack(file, "<Q")).decode()
        (dimensions,) = _unpack(file, "<I")
        shape = tuple(reversed(_unpack(file, f"<{dimensions}Q")))
        type_id, offset = _unpack(file, "<IQ")
        found.append((name, TYPES_BY_ID[type_id].name, shape, offset))
    start = file.tell() + padding(file.tell())
    return {name: Stored(name, kind, shape, start + offset) for name, kind, shape, offset in found}


def pack_arrays(metadata: Metadata) -> Metadata:
    """`metadata` with its arrays as the bytes that will be written: a tenth of the memory of Python strings."""
    arrays = {"strings", *_ARRAYS}
    return {
        key: ("packed", _packed_field(kind, value)) if kind in arrays else (kind, value)
        for key, (kind, value) in metadata.items()
    }


def _packed(text: str) -> bytes:
    data = text.encode()
    return len(data).to_bytes(8, "little") + data


def _packed_field(kind: Kind, value: Any) -> bytes:
    if kind == "packed":
        return bytes(value)
    if kind in _SCALARS:
        type_id, code = _SCALARS[kind]
        return struct.pack("<I", type_id) + struct.pack(code, value)
    if kind == "str":
        return struct.pack("<I", _STRING) + _packed(value)
    if kind == "strings":
        return struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + b"".join(map(_packed, value))
    item_id, code = _ARRAYS[kind]
    return struct.pack("<IIQ", _ARRAY, item_id, len(value)) + np.asarray(value, code).tobytes()


def _unpack(file: IO[bytes], code: str) -> tuple[Any, ...]:
    return struct.unpack(code, file.read(struct.calcsize(code)))


def _skip_string(file: IO[bytes]) -> None:
    (length,) = _unpack(file, "<Q")
    file.seek(length, 1)


def _skip_value(file: IO[bytes], type_id: int) -> None:
    if type_id == _STRING:
        _skip_string(file)
    elif type_id == _ARRAY:
        item_id, length = _unpack(file, "<IQ")
        if item_id == _STRING:
            for _ in range(length):
                _skip_string(file)
        else:
            file.seek(_WIDTHS[item_id] * length, 1)
    else:
        file.seek(_WIDTHS[type_id], 1)
