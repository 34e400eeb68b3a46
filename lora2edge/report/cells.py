"""What tables are made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lora2edge.report.words import interval, times

VERDICT_MARKS = {"pass": "✓ pass", "fail": "✕ fail", "inconclusive": "? inconclusive"}
NOT_MEASURED = "not measured"


@dataclass(frozen=True, slots=True)
class Cell:
    """A figure, what stands small under it (its interval), and how it is meant."""

    text: str
    sub: str = ""
    tone: str = ""
    """"pass", "fail", "inconclusive", "muted" or nothing."""


@dataclass(frozen=True, slots=True)
class Table:
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""
    key: str = ""
    """"headline" for the table that becomes cards on a phone."""


def cells_of(*texts: str | Cell) -> tuple[Cell, ...]:
    """One cell a text."""
    return tuple(text if isinstance(text, Cell) else Cell(text) for text in texts)


def ratio_cell(ratio: Mapping[str, Any]) -> Cell:
    """A ratio with its interval."""
    return Cell(times(ratio["value"]), interval(ratio))


def verdict_cell(verdict: str) -> Cell:
    """A verdict with its mark and colour."""
    return Cell(VERDICT_MARKS[verdict], tone=verdict)


def missing() -> Cell:
    """What stands where nothing was measured."""
    return Cell(NOT_MEASURED, tone="muted")
