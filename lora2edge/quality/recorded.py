"""Opens what a baseline's measurement left in a folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from lora2edge.errors import DataError

RECORD = "reference.json"
"""The record's file name."""
T = TypeVar("T")


def open_recorded(path: Path, schema: int, make: Callable[[Path, dict[str, Any]], T]) -> T:
    """`make` of the folder `path` and its record. Raises DataError where it is incomplete or of another version."""
    try:
        record = json.loads((path / RECORD).read_text(encoding="utf-8"))
        if record["schema"] != schema:
            raise ValueError(f"schema {record['schema']}, this version reads {schema}")
        return make(path, record)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            "no-reference",
            f"{path} holds no recorded baseline",
            why=str(error),
            hint=f"remove {path}: the next build records it again",
        ) from error
