"""The report's headline on a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lora2edge.report import cells, tables, words
from lora2edge.report.findings import find, headline
from lora2edge.report.view import view_of

if TYPE_CHECKING:
    from rich.console import Console

_COLOURS = {"pass": "green", "fail": "red", "inconclusive": "yellow", "muted": "bright_black", "": ""}
_FINDING_COLOURS = {"fail": "red", "warn": "yellow", "note": "bright_black"}
_WIDE = 100


def print_summary(report: Mapping[str, Any], console: Console | None = None) -> None:
    """One row a target, the findings that matter, and the verdict."""
    from rich.text import Text

    console = console or _console()
    view = view_of(report)
    table = view.headline(report)
    columns = view.summary if console.width >= _WIDE else view.narrow
    shown = [table.columns.index(column) for column in columns]
    _print_table(console, table, shown, note=False)
    unit = words.unit(report)
    for line in words.merge_base_lines(report["merge_base"], unit) if report.get("merge_base") else ():
        _print_plain(console, line)
    for finding in find(report):
        if finding.tone != "note":
            console.print(Text(f"{finding.subject}: {finding.text}", style=_FINDING_COLOURS[finding.tone]))
    verdict = report["verdict"]
    mark = Text(cells.VERDICT_MARKS[verdict], style=f"bold {_COLOURS[verdict]}")
    console.print(mark.append(f"  {headline(report)}", style="default"))


def print_speed(result: Mapping[str, Any], console: Console | None = None) -> None:
    """What `lora2edge bench` found: `{"target", "scenarios": {name: speed}}`."""
    console = console or _console()
    for speed in result["scenarios"].values():
        _print_table(console, view_of(result).speed(result["target"], speed))
        for note in speed.get("notes", []):
            _print_plain(console, f"note: {note}")
    _print_reused(console, result)


def print_quality(result: Mapping[str, Any], console: Console | None = None) -> None:
    """What `lora2edge measure` found: `{"target", "verdict", "gates", "quality", "baseline"}`."""
    from rich.text import Text

    console = console or _console()
    targets = {result["target"]: result}
    shown = {"task": result.get("task"), "baseline": result["baseline"], "targets": targets}
    quality, *others = view_of(shown).quality(shown)
    _print_table(console, quality)
    for table in others if words.unit(shown) != "token" else ():
        _print_table(console, table)
    kept = result["quality"].get("gain_kept")
    if kept:
        _print_plain(console, f"Gain kept: {words.percent(kept['value'])} {words.interval(kept, fraction=True)}")
    else:
        _print_plain(console, f"Gain kept was not measured: {result['quality'].get('gain_kept_reason', '')}")
    _print_table(console, tables.gates_table(targets))
    _print_reused(console, result)
    verdict = result["verdict"]
    console.print(Text(cells.VERDICT_MARKS[verdict], style=f"bold {_COLOURS[verdict]}"))


def print_plan(plan: Mapping[str, Any], console: Console | None = None) -> None:
    """What a build would do and need, as `describe_plan` gives it; no weight was read, nothing was written."""
    console = console or _console()
    if plan["inputs"]:
        _print_table(console, tables.inputs_table(plan))
    for adapter in plan["adapters"]:
        for line in words.adapter_lines(adapter):
            _print_plain(console, line)
    if bases := plan["merge_base"]:
        how = "both are measured" if bases["method"] == "measure" else f"merged into the {bases['method']} one"
        _print_plain(console, f"Trained on {words.quantized_base(bases['trained_on'])}: {how}")
    rows = tuple(
        (
            cells.Cell(stage["stage"]),
            cells.Cell(stage["target"] or ""),
            cells.Cell(words.size(stage["ram_bytes"]), tone="" if stage["fits"] else "fail"),
            cells.Cell(words.size(stage["disk_bytes"]) if stage["disk_bytes"] else words.NONE),
            cells.Cell(words.duration(stage["seconds"])),
            cells.Cell("; ".join(filter(None, (stage["note"], "" if stage["fits"] else "more than is free here")))),
        )
        for stage in plan["stages"]
    )
    columns = ("Stage", "Target", "Memory", "Disk", "Time", "Notes")
    _print_table(console, cells.Table("Stages: memory and disk at most, time about", columns, rows))
    machine = plan["machine"]
    _print_plain(
        console,
        f"This machine: {machine['cores']} cores, {words.size(machine['ram_bytes'])} of memory and "
        f"{words.size(machine['disk_bytes'])} of disk free, GPU: {machine.get('cuda') or 'none'}. "
        f"Device {plan['device']}, {plan['threads']} threads.",
    )
    for name, errors in {"the build": plan["refused"]["build"], **plan["refused"]["targets"]}.items():
        for error in errors:
            _print_plain(console, f"Refused: {name}: {error['what']} ({error['code']})")


def _print_table(console: Console, table: cells.Table, shown: list[int] | None = None, *, note: bool = True) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    if not table.rows:
        return
    chosen = shown if shown is not None else list(range(len(table.columns)))
    drawn = Table(
        title=table.title or None, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0)
    )
    drawn.show_header = any(table.columns)
    for index in chosen:
        drawn.add_column(table.columns[index], overflow="fold")
    for row in table.rows:
        cells = []
        for index in chosen:
            cell = Text(row[index].text, style=_COLOURS[row[index].tone])
            if row[index].sub and table.columns[index] != "Size":
                cell.append(f"\n{row[index].sub}", style="bright_black")
            cells.append(cell)
        drawn.add_row(*cells)
    console.print(drawn)
    if note and table.note:
        _print_plain(console, table.note)


def _print_reused(console: Console, result: Mapping[str, Any]) -> None:
    if result.get("reused"):
        _print_plain(console, f"Measured earlier ({result['measured_at']}) and used again.")


def _print_plain(console: Console, text: str) -> None:
    """`text` as it is: brackets in it are no markup."""
    console.print(text, markup=False, highlight=False, soft_wrap=False)


def _console() -> Console:
    from rich.console import Console

    return Console(highlight=False)
