"""Files and JSON from strangers: bounded in size and in the number of their values before they are parsed."""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path
from typing import Any

MOST_VALUES = 1_000_000
"""Python takes up to 100 bytes for a value that is written in three."""
_MOST_LEVELS = 64


def read_bounded(path: Path, most_bytes: int) -> bytes:
    """The bytes of the regular file `path`.

    Raises OSError, or ValueError with the reason where it is no regular file (a pipe or a device would be waited for
    for ever) or holds more than `most_bytes`.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(handle, "rb", buffering=0) as file:  # noqa: PTH123  (a path cannot be opened without waiting)
        facts = os.fstat(handle)
        if not stat.S_ISREG(facts.st_mode):
            raise ValueError("it is no regular file")
        if facts.st_size > most_bytes:
            raise ValueError(f"it has {facts.st_size:,} bytes, at most {most_bytes:,} make sense")
        return file.readall()


def parse_json(data: bytes, most_values: int = MOST_VALUES, *, only_json: bool = False) -> Any:
    """The JSON document `data`, in UTF-8 without a mark at its start, as every other reader wants it.

    `only_json`: NaN and Infinity, which Python reads and writes, are refused.

    Raises ValueError with the reason: also where it may hold more than `most_values` values, is nested more than 64
    levels deep, or holds a number of thousands of digits.
    """
    check_number_of_values(data, most_values)
    try:
        parsed = json.loads(data.decode("utf-8"), parse_constant=_refuse_constant if only_json else None)
    except RecursionError:
        parsed = None
        too_deep = True
    else:
        too_deep = _is_too_deep(parsed)
    if too_deep:
        raise ValueError(f"it is nested more than {_MOST_LEVELS} levels deep")
    return parsed


def check_number_of_values(data: bytes, most_values: int) -> None:
    """Raises ValueError where the JSON text `data` may hold more than `most_values` values: counts its marks."""
    values = 1 + sum(data.count(mark) for mark in (b",", b"[", b"{"))
    if values > most_values:
        raise ValueError(f"it has room for {values:,} values, at most {most_values:,} make sense")


def _refuse_constant(word: str) -> Any:
    raise ValueError(f"{word} is no JSON")


def _is_too_deep(parsed: Any) -> bool:
    level = [parsed]
    for _ in range(_MOST_LEVELS):
        inner: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                inner.extend(value.values())
            elif isinstance(value, list):
                inner.extend(value)
        level = [value for value in inner if isinstance(value, dict | list)]
        if not level:
            return False
    return True


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """`pattern`, compiled, if it can be matched against a module's path in no time.

    Python's matcher tries every way to share a text out among repetitions and alternatives; where a repetition holds
    another, there are exponentially many. Raises ValueError with the reason; where the syntax is wrong, re.error.
    """
    if len(pattern) > _LONGEST_PATTERN:
        raise ValueError(f"a pattern has {len(pattern):,} characters, at most {_LONGEST_PATTERN:,} make sense")
    try:
        compiled = re.compile(pattern)
    except (RecursionError, OverflowError) as error:
        raise ValueError("a pattern is nested too deeply, or repeats too often") from error
    ways = 1
    bars = [0]  # per open group
    varies = [False]  # per open group: whether what is inside can match in several ways
    group_varies = False  # whether the atom before is such a group
    for atom in _ATOM.findall(pattern):
        repeats = atom[0] in "*+{"
        if repeats and group_varies:
            raise ValueError("a pattern repeats what can match in several ways: to try them all may take for ever")
        group_varies = False
        if atom[0] == "(":
            bars.append(0)
            varies.append(False)
        elif atom == ")" and len(bars) > 1:
            ways *= bars.pop() + 1
            group_varies = varies.pop()
            varies[-1] |= group_varies
        else:
            ways *= _WAYS_OF_REPETITION if repeats else 2 if atom[0] == "?" else 1
            bars[-1] += atom == "|"
            varies[-1] |= repeats or atom[0] in "?|"
    if ways * (bars[0] + 1) > _MOST_WAYS:
        raise ValueError("a pattern has too many repetitions and alternatives: to try them all may take for ever")
    return compiled


_LONGEST_PATTERN = 4096
_WAYS_OF_REPETITION = 30
"""About the length of a module's path."""
_MOST_WAYS = 1_000_000
_ATOM = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|[*+?][?+]?|\{\d*,?\d*\}[?+]?|\(\?[a-zA-Z<>=!:]*|.", re.DOTALL)
