"""What a classifier's report shows in the place of a language model's: tables, terms, findings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lora2edge.report import words
from lora2edge.report.cells import NOT_MEASURED, Cell, Table, cells_of, missing, ratio_cell
from lora2edge.report.tables import scale_rows, target_cells, unbuilt_row
from lora2edge.report.words import NONE, interval, percent, times

HEADLINE_COLUMNS = (
    "Target", "Verdict", "Size", "Gain kept", "KL", "Flips", "Accuracy", "Macro-F1",
    "Latency", "Texts/s", "Peak memory",
)  # fmt: skip
SUMMARY_COLUMNS = ("Target", "Verdict", "Size", "Gain kept", "Accuracy", "Macro-F1", "Latency", "Texts/s")
NARROW_COLUMNS = ("Target", "Verdict", "Size", "Macro-F1", "Latency")
_LOST_F1 = 0.05
_CLASSES_SHOWN = 60


def terms(unit: str) -> tuple[tuple[str, str], ...]:
    """The words that the page explains. `unit`: what is scored, "text" or "word"."""
    return (
        (
            "Baseline",
            "The base with the adapter live on it, unmerged, in PyTorch through PEFT. All else is against it.",
        ),
        ("Accuracy", f"Share of {unit}s whose likeliest class is the right one."),
        ("Macro-F1", f"Mean of the F1 of every class that the test {unit}s have, rare ones as much as frequent ones."),
        (
            "Macro-F1 loss",
            "Baseline − artifact, in points: 0.5 points are 0.005. Its interval draws the same items for both sides.",
        ),
        ("Flips", f"Share of {unit}s whose likeliest class is another one than the baseline's, right or wrong."),
        ("KL", f"KL(baseline ‖ artifact) of the class probabilities, nats per {unit}."),
        ("Gain", f"NLL(base) − NLL(baseline) of the right class, nats per {unit}: what the adapter bought on held-out "
         "text. Where the head came with the adapter, the base is chance: every class equally likely."),
        ("Gain kept", "(NLL(base) − NLL(artifact)) / gain. 100 %: nothing of the fine-tune was lost. 0 %: all of it."),
        ("× baseline", "Above 1 is better than the baseline, whatever the figure: 2 × latency is half of the time."),
        ("[low, high]", "95 % interval: over items of text for quality, over paired rounds for speed."),
        ("Peak memory", "Largest resident memory of the measured process, with Python, libraries and mapped files."),
    )  # fmt: skip


def headline_table(report: Mapping[str, Any]) -> Table:
    """One row a target, under the rows that give them their scale."""
    unit = words.unit(report)
    rows = scale_rows(report, len(HEADLINE_COLUMNS), ["accuracy", "macro_f1"])
    rows += [_headline_row(name, target) for name, target in report["targets"].items()]
    return Table(
        "",
        HEADLINE_COLUMNS,
        tuple(rows),
        note=f"Baseline: base + live adapter. Latency (median of the smallest batches), texts per second (by batch "
        "size) and memory are × baseline: above 1 is better. Small figures are 95 % intervals. KL in nats per "
        f"{unit} against the baseline.",
        key="headline",
    )


def quality_tables(report: Mapping[str, Any]) -> list[Table]:
    """The figures of base, baseline and targets, and F1 by class."""
    return [_quality_table(report), *_class_tables(report)]


def speed_table(name: str, speed: Mapping[str, Any]) -> Table:
    """Both sides of one measurement, and their ratios."""
    old = speed["baseline"]
    rows: list[tuple[Cell, ...]] = []

    def add(label: str, before: str, after: str, ratio: Mapping[str, Any] | None = None) -> None:
        rows.append((Cell(label), Cell(before), Cell(after), ratio_cell(ratio) if ratio else Cell("")))

    for size, ratio in speed["latency_ratio"].items():
        before, after = (side["latency_ms"].get(size) or {} for side in (old, speed))
        for percentile in ("p50", "p90", "p99"):
            add(
                f"Batch of {size}, {percentile}, ms",
                words.figure(before.get(percentile)),
                words.figure(after.get(percentile)),
                ratio if percentile == "p50" else None,
            )
    for size, ratio in speed["qps_ratio"].items():
        before, after = (words.figure(side["qps"].get(size)) for side in (old, speed))
        add(f"Texts/s in batches of {size}", before, after, ratio)
    add("Opening", words.duration(old["load_s"]), words.duration(speed["load_s"]), speed["load_ratio"])
    add("Peak memory", words.size(old["peak_rss_bytes"]), words.size(speed["peak_rss_bytes"]), speed["memory_ratio"])
    add("Memory before opening", words.size(old["start_rss_bytes"]), words.size(speed["start_rss_bytes"]))
    add("Failed runs", str(old["failures"]), str(speed["artifact_failures"]))
    low, middle, high = speed["tokens"]
    counts = ", ".join(f"{count} in batches of {size}" for size, count in speed["texts"].items())
    note = (
        f"Scenario {speed['scenario']}: texts of {low} to {high} tokens (median {middle}), padded to the longest of "
        f"their batch; tokenization is not in the times. {speed['rounds']} rounds, the two sides in turns; texts a "
        f"side: {counts}. Warm-up of {speed['warmup']} batches a size and side left out. Threads: {old['threads']} and "
        f"{speed['threads']}. Load average before: {words.figure(speed['load_average']['before'], 2)}."
    )
    return Table(f"Speed of {name}", ("", "Baseline", name, "× baseline"), tuple(rows), note=note)


def of_speed(name: str, speed: Mapping[str, Any]) -> Iterator[str]:
    """Sentences on where the artifact is slower than the baseline."""
    for size, ratio in speed["qps_ratio"].items():
        if ratio and (ratio.get("high") or ratio["value"]) < 1:
            yield (
                f"Slower than the baseline in batches of {size}: {words.times(ratio['value'])} {words.interval(ratio)} "
                "of its texts per second."
            )


def of_classes(quality: Mapping[str, Any], baseline: Mapping[str, Any]) -> Iterator[str]:
    """Sentences on classes that lost much."""
    before = baseline.get("by_class") or {}
    fallen = [
        f"{words.visible(label)} ({percent(before[label]['f1'])} → {percent(found['f1'])}, {found['support']} of it)"
        for label, found in quality["by_class"].items()
        if label in before and (before[label]["f1"] or 0) - (found["f1"] or 0) > _LOST_F1
    ]
    if fallen:
        yield f"F1 fell by more than {_LOST_F1 * 100:.0f} points in {', '.join(fallen)}."


def _quality_table(report: Mapping[str, Any]) -> Table:
    baseline = report.get("baseline")
    rows: list[tuple[Cell, ...]] = []
    note = ""
    if baseline:
        base, ends = baseline["base"], baseline["intervals"]
        chance = base["kind"] == "chance"
        rows.append(cells_of("chance" if chance else "base alone", percent(base["accuracy"]), percent(base["macro_f1"]),
                             NONE, words.figure(base["nll"], 4), *[NONE] * 4))  # fmt: skip
        rows.append(
            (
                Cell("baseline"),
                Cell(percent(baseline["accuracy"]), interval(ends["accuracy"], fraction=True)),
                Cell(percent(baseline["macro_f1"]), interval(ends["macro_f1"], fraction=True)),
                Cell(NONE),
                Cell(words.figure(baseline["nll"], 4)),
                *[Cell(NONE)] * 4,
            )
        )
        if chance:
            note = "The base has no classification head without the adapter: the gain is against chance."
    unit, same = words.unit(report), []
    for name, target in report["targets"].items():
        quality = target.get("quality")
        if quality is None:
            continue
        ends = quality["intervals"]
        rows.append(
            (
                Cell(name),
                Cell(percent(quality["accuracy"]), interval(ends["accuracy"], fraction=True)),
                Cell(percent(quality["macro_f1"]), interval(ends["macro_f1"], fraction=True)),
                Cell(words.points(quality["macro_f1_loss"]), interval(ends["macro_f1_loss"], fraction=True)),
                Cell(words.figure(quality["nll"], 4), interval(ends["nll"])),
                Cell(words.figure(quality["kl_mean"]), interval(ends["kl_mean"])),
                Cell(words.figure(quality["kl_p99"]), interval(ends["kl_p99"])),
                Cell(percent(quality["flips"]), interval(ends["flips"], fraction=True)),
                Cell(f"{words.count(quality['positions'])} {unit}s in {words.count(quality['items'])} items"),
            )
        )
        if (most := quality["flips_bound"]) is not None:
            same.append(f"{name} agrees with the baseline on all {quality['items']} items: by these alone, up to "
                        f"{percent(most)} of others could differ (exact binomial bound, 97.5 %).")  # fmt: skip
    note = " ".join([*([note] if note else []), *same])
    columns = ("", "Accuracy", "Macro-F1", "Macro-F1 loss", "NLL, nats", "KL mean, nats", "KL 99th perc., nats",
               "Flips", "Measured on")  # fmt: skip
    return Table("Quality", columns, tuple(rows), note=note)


def _class_tables(report: Mapping[str, Any]) -> list[Table]:
    """F1 of each class, baseline beside targets; precision and recall of the target under it."""
    baseline = (report.get("baseline") or {}).get("by_class") or {}
    sides = {name: target["quality"]["by_class"] for name, target in report["targets"].items() if target.get("quality")}
    if not baseline:
        return []
    rows = []
    for label, found in list(baseline.items())[:_CLASSES_SHOWN]:
        cells = [Cell(words.visible(label)), Cell(words.count(found["support"])), _class_cell(found)]
        rows.append((*cells, *(_class_cell(side.get(label) or {}) for side in sides.values())))
    left = len(baseline) - len(rows)
    note = "Small figures: precision and recall." + (f" {left} more classes are in report.json." if left > 0 else "")
    return [Table("F1 by class", ("Class", "In the test text", "baseline", *sides), tuple(rows), note=note)]


def _class_cell(found: Mapping[str, Any]) -> Cell:
    if found.get("f1") is None:
        return Cell(NONE)
    return Cell(percent(found["f1"]), f"{percent(found['precision'])} / {percent(found['recall'])}")


def _headline_row(name: str, target: Mapping[str, Any]) -> tuple[Cell, ...]:
    error, quality, speed = (target.get(key) for key in ("error", "quality", "speed"))
    if error:
        return unbuilt_row(name, error, len(HEADLINE_COLUMNS))
    cells = target_cells(name, target)
    if quality:
        ends, kept = quality["intervals"], quality.get("gain_kept")
        cells.append(Cell(percent(kept["value"]), interval(kept, fraction=True)) if kept else missing())
        cells.append(Cell(words.figure(quality["kl_mean"]), interval(ends["kl_mean"])))
        for figure in ("flips", "accuracy", "macro_f1"):
            cells.append(Cell(percent(quality[figure]), interval(ends[figure], fraction=True)))
    else:
        cells += [Cell(NOT_MEASURED, tone="muted")] * 5
    if speed:
        latency = next(iter(speed["latency_ratio"].values()), None)
        sizes, memory = speed["qps_ratio"], speed["memory_ratio"]
        shown = "\u00a0/\u00a0".join(words.figure(ratio["value"], 2) if ratio else NONE for ratio in sizes.values())
        cells += [
            ratio_cell(latency) if latency else Cell(NONE),
            Cell(f"{shown}\u00a0×", "in batches of " + " / ".join(sizes)),
            Cell(times(memory["value"]) if memory else NONE, words.size(speed["peak_rss_bytes"])),
        ]
    else:
        cells += [missing()] * 3
    return tuple(cells)
