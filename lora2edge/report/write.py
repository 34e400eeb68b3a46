"""Writes the report's files."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora2edge.report.render import render_html, render_markdown
from lora2edge.storage import write_atomic, write_json

REPORTS = ("report.json", "report.html", "report.md")


def write_report(report: Mapping[str, Any], out: Path) -> None:
    """Writes `report.json` (schema.py), `report.html` and `report.md` into `out`, each whole or not at all.

    Figures that are infinite or no number, which JSON cannot hold, become null and are listed in `not_finite`.
    The JSON comes first: it is there even if the page cannot be drawn. Raises OutputError.
    """
    clean, not_finite = finite(report)
    if not_finite:
        clean["not_finite"] = not_finite
    write_json(out / "report.json", clean)
    html, markdown = render_html(clean), render_markdown(clean)
    write_atomic(out / "report.html", html)
    write_atomic(out / "report.md", markdown)


def finite(report: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A copy of `report` with None for each figure that is not finite, and the paths of those."""
    lost: list[str] = []

    def copy(value: Any, path: str) -> Any:
        if isinstance(value, Mapping):
            return {str(key): copy(item, f"{path}.{key}" if path else str(key)) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [copy(item, f"{path}[{number}]") for number, item in enumerate(value)]
        if isinstance(value, float) and not math.isfinite(value):
            lost.append(f"{path} ({value})")
            return None
        return value

    return copy(report, ""), lost
