"""From the report's figures to a page and a Markdown file: one list of sections, two templates."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora2edge.report import cells, plots, tables, words
from lora2edge.report.findings import Finding, find, headline
from lora2edge.report.view import view_of

_FOLDER = Path(__file__).resolve().parent
_ICONS = {"fail": "✕", "warn": "!", "note": "·"}
_HEAT_MAPS = 3
"""Targets whose damage is drawn; the others have the table only."""


@dataclass(frozen=True, slots=True)
class Section:
    key: str
    title: str
    intro: str = ""
    findings: tuple[Finding, ...] = ()
    tables: tuple[cells.Table, ...] = ()
    plots: tuple[plots.Plot, ...] = ()
    terms: tuple[tuple[str, str], ...] = ()


def render_html(report: Mapping[str, Any]) -> str:
    """The page, self-contained: no script, nothing loaded."""
    return _render("page.html.jinja", report, escape=True)


def render_markdown(report: Mapping[str, Any]) -> str:
    """The same tables and findings as Markdown."""
    return _render("report.md.jinja", report, escape=False)


def make_sections(report: Mapping[str, Any]) -> list[Section]:
    """What the report shows, in its order; sections without content are left out."""
    targets = report["targets"]
    merge, chosen = report.get("merge"), report.get("merge_base")
    view, unit = view_of(report), words.unit(report)
    found = [
        Section("findings", "What to know", findings=tuple(find(report))),
        Section(
            "targets",
            "Targets",
            tables=(view.headline(report),),
            plots=tuple(plots.draw_quality_plots(report)),
        ),
        Section(
            "merge",
            "Merge proof",
            intro="Whether the merged checkpoint is still base + live adapter, before anything was quantized.",
            tables=(
                *((tables.merge_base_table(chosen, unit),) if chosen and chosen["measured"] else ()),
                *((tables.proof_table(merge, unit),) if merge else ()),
            ),
        ),
        Section(
            "quality",
            "Quality",
            tables=(tables.gates_table(targets), *view.quality(report)),
        ),
        Section(
            "speed",
            "Speed",
            intro="Baseline and artifact in turns, each in its own process, same token ids, same lengths.",
            tables=tuple(tables.speed_tables(targets, view.speed)),
            plots=tuple(view.speed_plots(targets)),
        ),
        Section(
            "damage",
            "What quantization did, weight by weight",
            intro="Computed from the finished files.",
            tables=tuple(
                tables.damage_table(name, target["damage"]) for name, target in targets.items() if target.get("damage")
            ),
            plots=tuple(
                plot
                for name, target in list(targets.items())[:_HEAT_MAPS]
                for plot in plots.draw_damage_plots(name, target.get("damage") or [])
            ),
        ),
        Section("tokenizer", "Tokenizer", tables=(tables.tokenizer_table(targets),)),
        Section(
            "record",
            "Record",
            tables=(
                tables.inputs_table(report),
                tables.facts_table(report),
                tables.machine_table(report["machine"]),
                tables.stages_table(report["stages"]),
            ),
        ),
        Section("words", "Words", terms=view.terms),
    ]
    return [
        section
        for section in found
        if section.findings or section.plots or section.terms or any(table.rows for table in section.tables)
    ]


def _render(template: str, report: Mapping[str, Any], *, escape: bool) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_FOLDER),
        autoescape=escape,
        undefined=StrictUndefined,
        trim_blocks=escape,
        lstrip_blocks=escape,
        keep_trailing_newline=True,
    )
    environment.filters["md"] = _for_markdown
    names = [report["inputs"]["base"]["name"], *(adapter["name"] for adapter in report["inputs"]["adapters"])]
    title = " + ".join(Path(str(name)).name for name in names)
    return environment.get_template(template).render(
        title=title,
        verdict=report["verdict"],
        mark=cells.VERDICT_MARKS[report["verdict"]],
        headline=headline(report),
        exit_code=report["exit_code"],
        when=report["started_at"].replace("T", " "),
        took=words.duration(report["seconds"]),
        version=report["lora2edge"],
        command=report["command"],
        sections=make_sections(report),
        icons=_ICONS,
        none_mark=words.NONE,
    )


def _for_markdown(text: str) -> str:
    """`text` so that a cell stays one cell and nothing in it is markup."""
    for mark in ("\\", "|", "*", "_", "`", "<", "[", "]"):
        text = text.replace(mark, f"\\{mark}")
    return re.sub(r"[ \t\r\n\f\v]+", " ", text).strip()
