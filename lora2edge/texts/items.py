"""Lines of the user's JSONL files, and which side of the split each falls on."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from lora2edge.contracts import Item, Message
from lora2edge.errors import DataError
from lora2edge.storage import digest

T = TypeVar("T")
CALIBRATION_PERCENT = 80
_ROLES = ("system", "user", "assistant")
_PAIRS = (("prompt", "response"), ("input", "output"))
_LABEL_LENGTH = 64
_SHOWN = 5
_HINT = 'a line looks like {"prompt": "…", "response": "…"}'


def read_items(path: Path) -> list[Item]:
    """The lines of a JSONL file: `prompt`/`response`, `input`/`output` or `messages`.

    Other string fields of at most 64 characters become labels. Empty lines are skipped. Raises DataError that
    names file, line and reason of the first five bad lines, and where the file is missing, empty or not UTF-8.
    """
    return read_lines(path, _item, _HINT)


def read_lines(path: Path, parse: Callable[[Any], T], hint: str) -> list[T]:
    """What `parse` makes of each line's JSON; it raises ValueError with the reason where a line cannot be used.

    Empty lines are skipped. Raises DataError, with `hint`, as `read_items` does.
    """
    items: list[T] = []
    bad: list[str] = []
    for number, line in enumerate(_text(path, hint).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            items.append(parse(json.loads(line)))
        except json.JSONDecodeError as error:
            bad.append(f"{path}:{number}: not JSON: {error.msg} at column {error.colno}")
        except (ValueError, RecursionError) as error:
            bad.append(f"{path}:{number}: {error}")
    if bad:
        more = f"\n        and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
        why = "\n        ".join(bad[:_SHOWN]) + more
        raise DataError("bad-line", f"{len(bad)} of the lines in {path} cannot be used", why=why, hint=hint)
    if not items:
        raise DataError("empty-data", f"{path} holds no line", hint=hint)
    return items


def split_items(items: Sequence[Item]) -> tuple[list[Item], list[Item]]:
    """Calibration (about 80 %) and test items, by a hash of the prompt: a prompt is on one side only.

    The side of an item depends on nothing but its own prompt: it stays when lines are added or moved.
    """
    calibration: list[Item] = []
    test: list[Item] = []
    for item in items:
        (calibration if is_for_calibration(prompt_key(item)) else test).append(item)
    return calibration, test


def is_for_calibration(key: str) -> bool:
    """The side of a text with this sha256."""
    return int(key[:12], 16) % 100 < CALIBRATION_PERCENT


def prompt_key(item: Item) -> str:
    """sha256 of the prompt's roles and contents, hex; prompts that differ in spacing or case only are the same."""
    return digest([[message["role"], " ".join(message["content"].casefold().split())] for message in item.prompt])


def _text(path: Path, hint: str) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError("no-data", f"cannot read {path}", why=str(error.strerror), hint=hint) from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DataError(
            "not-utf-8",
            f"{path}:{line} is not UTF-8",
            why=f"byte 0x{data[error.start]:02x} at offset {error.start}",
            hint=f"iconv -f GB18030 -t UTF-8 {path} > utf8.jsonl   (name the file's real encoding)",
        ) from error


def _item(line: Any) -> Item:
    """Raises ValueError with the reason."""
    if not isinstance(line, dict):
        raise ValueError(f"a line must be an object, this is a {type(line).__name__}")
    if "messages" in line:
        messages, used = _messages(line["messages"]), {"messages"}
    else:
        for asked, answered in _PAIRS:
            if asked in line and answered in line:
                prompt, response = check_string(line[asked], asked), check_string(line[answered], answered)
                messages = ({"role": "user", "content": prompt}, {"role": "assistant", "content": response})
                used = {asked, answered}
                break
        else:
            keys = ", ".join(sorted(map(str, line))) or "none"
            raise ValueError(f"needs prompt and response, input and output, or messages; its keys: {keys}")
    if not messages[-1]["content"].strip():
        raise ValueError("the response is empty")
    if not any(message["content"].strip() for message in messages[:-1]):
        raise ValueError("the prompt is empty")
    return Item(messages, short_fields(line, used))


def _messages(value: Any) -> tuple[Message, ...]:
    if not isinstance(value, list) or len(value) < 2:
        raise ValueError("messages must be a list of at least a user's and an assistant's message")
    messages = []
    for index, message in enumerate(value):
        if not isinstance(message, dict) or message.get("role") not in _ROLES:
            raise ValueError(f"messages[{index}] needs a role out of {', '.join(_ROLES)}")
        content = check_string(message.get("content"), f"messages[{index}].content")
        messages.append({"role": str(message["role"]), "content": content})
    if messages[-1]["role"] != "assistant":
        raise ValueError(f"the last message must be the assistant's, it is the {messages[-1]['role']}'s")
    return tuple(messages)


def check_string(value: Any, name: str) -> str:
    """`value`, where it is a string that UTF-8 can hold; else raises ValueError that calls it `name`."""
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a string, it is {type(value).__name__}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} holds half of a surrogate pair at character {error.start}") from error
    return value


def short_fields(line: Mapping[str, Any], used: set[str]) -> dict[str, str]:
    """The string fields of at most 64 characters, but for those `used`."""
    rest = {key: value for key, value in line.items() if key not in used}
    return {key: value for key, value in rest.items() if isinstance(value, str) and len(value) <= _LABEL_LENGTH}
