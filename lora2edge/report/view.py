"""What a report shows by task: a language model's figures, or a classifier's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lora2edge.report import cells, classifier, plots, tables, words

LANGUAGE_TERMS = (
    ("Baseline", "The base with the adapter live on it, unmerged, in PyTorch through PEFT. All else is against it."),
    ("Gain", "NLL(base) − NLL(baseline), nats per token: what the adapter bought on held-out text."),
    ("Gain kept", "(NLL(base) − NLL(artifact)) / gain. 100 %: nothing of the fine-tune was lost. 0 %: all of it."),
    ("KL", "KL(baseline ‖ artifact), nats per token, over the positions that predict a response token."),
    ("Flips", "Share of those positions whose most likely next token is another one than the baseline's."),
    ("× baseline", "Above 1 is better than the baseline, whatever the figure: 2 × time to first token is half of it."),
    ("[low, high]", "95 % interval: over items of text for quality, over paired rounds for speed."),
    ("Peak memory", "Largest resident memory of the measured process, Python, libraries and mapped files included."),
)


@dataclass(frozen=True, slots=True)
class View:
    """The parts that differ. Each takes the report, but where said."""

    headline: Callable[[Mapping[str, Any]], cells.Table]
    quality: Callable[[Mapping[str, Any]], list[cells.Table]]
    speed: Callable[[str, Mapping[str, Any]], cells.Table]
    """Of a target's name and one scenario's figures."""
    speed_plots: Callable[[Mapping[str, Any]], list[plots.Plot]]
    """Of the report's targets."""
    terms: tuple[tuple[str, str], ...]
    summary: tuple[str, ...]
    """Columns of the headline that a terminal shows."""
    narrow: tuple[str, ...]
    """Those of a narrow one."""


def view_of(report: Mapping[str, Any]) -> View:
    """The parts for a report, or for a result that has its `task`."""
    unit = words.unit(report)
    if unit == "token":
        return _LANGUAGE
    return View(
        headline=classifier.headline_table,
        quality=classifier.quality_tables,
        speed=classifier.speed_table,
        speed_plots=plots.draw_classify_plots,
        terms=classifier.terms(unit),
        summary=classifier.SUMMARY_COLUMNS,
        narrow=classifier.NARROW_COLUMNS,
    )


_LANGUAGE = View(
    headline=tables.headline_table,
    quality=lambda report: [tables.quality_table(report), *tables.accuracy_tables(report)],
    speed=tables.speed_table,
    speed_plots=plots.draw_speed_plots,
    terms=LANGUAGE_TERMS,
    summary=("Target", "Verdict", "Size", "Gain kept", "KL", "Accuracy", "Decode", "Requests/s"),
    narrow=("Target", "Verdict", "Size", "Gain kept", "Decode"),
)
