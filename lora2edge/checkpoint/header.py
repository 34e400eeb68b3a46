"""The header of a safetensors file, parsed and checked by hand: it comes from a stranger.

Format: https://huggingface.co/docs/safetensors (8 bytes little-endian length, JSON, data without gaps).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora2edge.checkpoint.fields import is_readable
from lora2edge.checkpoint.untrusted import check_number_of_values
from lora2edge.contracts import TensorInfo
from lora2edge.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000
"""safetensors' own limit."""
MAX_ELEMENTS = 1 << 63
_MAX_AXES = 64
"""numpy's limit."""
_MAX_VALUES = 2_500_000
"""Names, dtypes, shapes and offsets of 250 thousand tensors in one file."""

ITEM_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "I16": 16, "U16": 16, "I32": 32, "U32": 32, "I64": 64, "U64": 64, "F16": 16,
    "BF16": 16, "F32": 32, "F64": 64, "C64": 64, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor and where its bytes lie in its file."""

    info: TensorInfo
    offset: int
    """From the start of the file."""
    length: int


@dataclass(frozen=True, slots=True)
class Header:
    """What the header of one file says."""

    tensors: tuple[StoredTensor, ...]
    """In the order of their bytes."""
    metadata: dict[str, str]
    sha256: str
    """Of the header's bytes, length field included."""


def read_header(path: Path) -> Header:
    """The checked header of the safetensors file `path`. Raises CheckpointError, code `bad-safetensors`."""
    try:
        # Without waiting for the other end, where somebody put a pipe.
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(handle, "rb", buffering=0) as file:  # noqa: PTH123
            facts = os.fstat(handle)
            if not stat.S_ISREG(facts.st_mode):
                raise _bad(path, "it is no regular file")
            size = facts.st_size
            first = file.read(8)
            length = int.from_bytes(first, "little")
            if len(first) < 8 or length > MAX_HEADER_BYTES or 8 + length > size:
                raise _bad(path, f"the header is said to be {length} bytes long, the file has {size}")
            text = file.read(length)
    except OSError as error:
        raise _bad(path, f"it cannot be read: {error.strerror}") from error
    try:
        check_number_of_values(text, _MAX_VALUES)
        # As a str: of bytes, json would guess UTF-16 and UTF-32, which no other reader takes.
        data = json.loads(text.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise _bad(path, f"its header cannot be parsed: {error}") from error
    if not isinstance(data, dict):
        raise _bad(path, "its header is no JSON object")
    metadata = data.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _bad(path, "the __metadata__ of its header are no object of texts")
    start = 8 + length
    found = [_tensor(path, name, entry, start) for name, entry in data.items()]
    found.sort(key=lambda tensor: (tensor.offset, tensor.length))
    _check_layout(path, found, start, size)
    return Header(tuple(found), metadata, _sha256(first + text))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON. Which of two equal keys counts, every reader decides for itself: none is taken."""
    found = dict(pairs)
    if len(found) != len(pairs):
        (key, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {key[:80]!r} is there twice")
    return found


def _refuse_constant(word: str) -> Any:
    raise ValueError(f"{word} is no JSON")


def _tensor(path: Path, name: str, entry: Any, start: int) -> StoredTensor:
    if not is_readable(name):
        raise _bad(path, f"the tensor name {name[:80]!r} holds characters that cannot be shown, or is endless")
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        sound = (
            isinstance(dtype, str)
            and isinstance(shape, list)
            and len(shape) <= _MAX_AXES
            and all(type(number) is int and 0 <= number < MAX_ELEMENTS for number in (*shape, begin, end))
            and begin <= end
        )
    except (TypeError, KeyError, ValueError):
        sound = False
    if not sound:
        raise _bad(path, f"the header's entry for {name!r} is malformed")
    if dtype not in ITEM_BITS:
        raise _bad(path, f"tensor {name!r} has the unknown dtype {dtype[:80]!r}")
    info = TensorInfo(name, tuple(shape), dtype, path.name)
    if math.prod(max(length, 1) for length in shape) >= MAX_ELEMENTS:
        raise _bad(path, f"tensor {name!r} has the impossible shape {shape}")
    needed, spare = divmod(info.size * ITEM_BITS[dtype], 8)
    if spare:
        raise _bad(path, f"tensor {name!r}, {dtype} {shape}, does not fill its last byte")
    if end - begin != needed:
        raise _bad(path, f"tensor {name!r}, {dtype} {shape}, needs {needed} bytes and has {end - begin}")
    return StoredTensor(info, start + begin, end - begin)


def _check_layout(path: Path, tensors: list[StoredTensor], start: int, size: int) -> None:
    """Bytes follow each other without gap or overlap, and end where the file ends."""
    at = start
    for tensor in tensors:
        if tensor.offset != at:
            raise _bad(path, f"tensor {tensor.info.name!r} starts at byte {tensor.offset}, expected {at}")
        at += tensor.length
    if at != size:
        why = (
            "it is truncated: the download or copy did not finish"
            if size < at
            else "there is data behind the last tensor"
        )
        raise _bad(path, f"its tensors end at byte {at}, the file has {size} bytes; {why}")


def _bad(path: Path, why: str) -> CheckpointError:
    return CheckpointError(
        "bad-safetensors",
        f"{path.name} is not a whole safetensors file",
        why=why,
        hint="download or save it again, and compare its size with the original's",
    )


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
