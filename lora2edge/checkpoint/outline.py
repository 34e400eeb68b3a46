"""tokenizer.json without its two large parts, the vocabulary and the merges, which are scanned as text."""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Mapping
from typing import Any

from lora2edge.checkpoint.untrusted import check_number_of_values, parse_json

MOST_VALUES = 4_000_000
"""In vocabulary and merges together; Gemma 3's have 2 million."""
_MOST_ID = (1 << 31) - 1

# Possessive (`*+`): what does not match fails at once, whatever a stranger wrote. Of single characters only: Python
# before 3.11.5 loses matches of groups that repeat so (gh-106052).
_STRING = rb'"[^"\\\x00-\x1f]*+(?:\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})[^"\\\x00-\x1f]*+)*"'
_NUMBER = rb"-?(?:0|[1-9]\d*+)(?:\.\d++)?(?:[eE][+-]?\d++)?"
_SPACE = re.compile(rb"\s*+")
_KEY = re.compile(rb"\s*+(%b)\s*+:\s*+" % _STRING)
_SIMPLE = re.compile(rb'%b|[^\s"\[\]{},:]++' % _STRING)
_MARK = re.compile(rb'[^"\[\]{}]*+(?:(%b)|([\[{])|([\]}]))' % _STRING)
_EMPTY = re.compile(rb"[\[{]\s*+[\]}]")
_TOKEN = re.compile(rb"\s*+%b\s*+:\s*+(0|[1-9]\d{0,9}+)\s*+([,}])" % _STRING)
_PIECE = re.compile(rb"\s*+\[\s*+%b\s*+,\s*+%b\s*+\]\s*+([,\]])" % (_STRING, _NUMBER))
_MERGE = re.compile(rb"\s*+(?:%b|\[\s*+%b\s*+,\s*+%b\s*+\])\s*+([,\]])" % (_STRING, _STRING, _STRING))


def read_outline(data: bytes) -> tuple[dict[str, Any], int]:
    """The JSON object `data` with an empty vocabulary and no merges, and the largest id, added tokens included.

    Raises ValueError with the reason where `data` is not one whole JSON object in UTF-8, where vocabulary or merges
    have another shape than theirs, or where a step is none.
    """
    check_number_of_values(data, MOST_VALUES)
    _check_encoding(data)
    large: list[tuple[int, int]] = []
    largest = -1

    def in_model(key: bytes, at: int) -> int:
        nonlocal largest
        if key == b'"vocab"' and data[at : at + 1] in (b"{", b"["):
            stop, found = _vocabulary(data, at)
            largest = max(largest, found)
        elif key == b'"merges"' and data[at : at + 1] == b"[":
            stop = _merges(data, at)
        else:
            return _skip(data, at)
        large.append((at + 1, stop - 1))
        return stop

    def in_file(key: bytes, at: int) -> int:
        is_model = key == b'"model"' and data[at : at + 1] == b"{"
        return _members(data, at, in_model) if is_model else _skip(data, at)

    _members(data, _after_space(data, 0), in_file)
    rest, at = [], 0
    for start, stop in large:
        rest.append(data[at:start])
        at = stop
    outline = parse_json(b"".join([*rest, data[at:]]), only_json=True)
    return outline, max(largest, _check_outline(outline))


def _members(data: bytes, at: int, visit: Callable[[bytes, int], int]) -> int:
    """Walks the object that begins at `at`. `visit(key, at)` returns where the value at `at` ends; so does this."""
    if data[at : at + 1] != b"{":
        raise ValueError(f"an object was expected at byte {at}")
    if empty := _EMPTY.match(data, at):
        return empty.end()
    at += 1
    while True:
        key = _KEY.match(data, at)
        if key is None:
            raise ValueError(f"a key was expected at byte {at}")
        at = _after_space(data, visit(key[1], key.end()))
        mark = data[at : at + 1]
        at += 1
        if mark == b"}":
            return at
        if mark != b",":
            raise ValueError(f"a comma was expected at byte {at - 1}")


def _vocabulary(data: bytes, at: int) -> tuple[int, int]:
    """Where the vocabulary ends, and its largest id: of an object text → id, or a list of [text, score]."""
    if _EMPTY.match(data, at):
        raise ValueError("its vocabulary is empty")
    is_list = data[at : at + 1] == b"["
    largest, at = -1, at + 1
    if is_list:
        while piece := _PIECE.match(data, at):
            largest, at = largest + 1, piece.end()
            if piece[1] == b"]":
                return at, largest
    else:
        while token := _TOKEN.match(data, at):
            largest, at = max(largest, int(token[1])), token.end()
            if token[2] == b"}":
                return at, largest
    raise ValueError(f"its vocabulary breaks off at byte {at}")


def _merges(data: bytes, at: int) -> int:
    if found := _EMPTY.match(data, at):
        return found.end()
    at += 1
    while merge := _MERGE.match(data, at):
        at = merge.end()
        if merge[1] == b"]":
            return at
    raise ValueError("its merges break off, or are not all pairs")


def _skip(data: bytes, at: int) -> int:
    """Where the value at `at` ends; what is inside it is checked later."""
    if data[at : at + 1] not in (b"{", b"["):
        found = _SIMPLE.match(data, at)
        if found is None:
            raise ValueError(f"a value was expected at byte {at}")
        return found.end()
    depth = 0
    while found := _MARK.match(data, at):
        at = found.end()
        if found.lastindex == 2:
            depth += 1
        elif found.lastindex == 3:
            depth -= 1
            if depth == 0:
                return at
    raise ValueError(f"it breaks off at byte {at}")


def _after_space(data: bytes, at: int) -> int:
    found = _SPACE.match(data, at)
    return found.end() if found else at


def _check_encoding(data: bytes) -> None:
    """Piece by piece: one sign beyond the basic plane would make a str of four times the size."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    for at in range(0, len(data), 1 << 20):
        decoder.decode(data[at : at + (1 << 20)])
    decoder.decode(b"", final=True)


def _check_outline(outline: Mapping[str, Any]) -> int:
    """Raises ValueError where a part that is read has another type than tokenizers writes; the largest added id."""
    model = outline.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict | list):
        raise ValueError("it has no model with a vocabulary")
    _check_types(model, "its model", str, "type", "unk_token")
    _check_types(model, "its model", bool, "byte_fallback", "ignore_merges", "fuse_unk")
    _check_types(model, "its model", list, "merges")
    for key, inner in _STEPS.items():
        _check_step(outline.get(key), key, inner)
    added = outline.get("added_tokens", [])
    if not isinstance(added, list):
        raise ValueError("added_tokens is no list")
    largest = -1
    for item in added:
        if not isinstance(item, dict) or not isinstance(item.get("content"), str):
            raise ValueError("an added token has no text as its content")
        if type(item.get("id")) is not int or not 0 <= item["id"] <= _MOST_ID:
            raise ValueError(f"the added token {item['content'][:80]!r} has the id {str(item.get('id'))[:80]}")
        _check_types(item, "an added token", bool, "special", "lstrip", "rstrip", "normalized", "single_word")
        largest = max(largest, item["id"])
    return largest


_STEPS = {
    "normalizer": "normalizers",
    "pre_tokenizer": "pretokenizers",
    "post_processor": "processors",
    "decoder": "decoders",
}


def _check_step(step: Any, what: str, inner: str) -> None:
    """A normalizer and the like, and the steps that it is made of."""
    if step is None:
        return
    if not isinstance(step, dict) or not isinstance(step.get("type"), str):
        raise ValueError(f"its {what} is no object with a type")
    _check_types(step, f"its {what}", list, inner, "single")
    for part in step.get(inner, []):
        if part is None:
            raise ValueError(f"its {what} has an empty step")
        _check_step(part, what, inner)
    pattern = step.get("pattern", {"String": ""})
    if not isinstance(pattern, dict) or [type(text) for text in pattern.values()] != [str]:
        raise ValueError(f"the pattern of its {what} is no text")
    for part in step.get("single", []):
        if not isinstance(part, dict) or not all(isinstance(value, dict) for value in part.values()):
            raise ValueError(f"the template of its {what} has a part that is no object")


def _check_types(holder: Mapping[str, Any], what: str, kind: type, *keys: str) -> None:
    for key in keys:
        value = holder.get(key)
        # tokenizers takes null for a text or flag that is not set, never for a list.
        if not isinstance(value, kind) and (value is not None or (kind is list and key in holder)):
            raise ValueError(f"{what} has the {key} {str(value)[:80]}, which is no {kind.__name__}")
