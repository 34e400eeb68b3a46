"""The report's tables, once, for HTML and Markdown alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lora2edge.report import words
from lora2edge.report.cells import (
    VERDICT_MARKS,
    Cell,
    Table,
    cells_of,
    missing,
    ratio_cell,
    verdict_cell,
)
from lora2edge.report.words import NONE, interval, percent, times

_WORST = 8
HEADLINE_COLUMNS = (
    "Target", "Verdict", "Size", "Gain kept", "KL", "Flips", "Accuracy",
    "Decode", "First token", "Requests/s", "Peak memory",
)  # fmt: skip
GATE_MARKS = {**VERDICT_MARKS, "not applicable": "not applicable"}


def headline_table(report: Mapping[str, Any]) -> Table:
    """One row a target, under the rows that give them their scale."""
    rows = scale_rows(report, len(HEADLINE_COLUMNS), ["accuracy"])
    formula = (report.get("merge") or {}).get("reference")
    live = "the adapters' merge in float32, unrounded" if formula else "base + live adapter"
    for name, target in report["targets"].items():
        rows.append(_headline_row(name, target))
    return Table(
        "",
        HEADLINE_COLUMNS,
        tuple(rows),
        note=f"Baseline: {live}. Decode, first token, requests per second (at so many requests at a "
        "time) and memory are × baseline: above 1 is better. Small figures are 95 % intervals. KL in nats per "
        "token against the baseline.",
        key="headline",
    )


def proof_table(merge: Mapping[str, Any], unit: str = "token") -> Table:
    """What the merge cost, step by step, with the bounds that it had to meet."""
    steps = (
        ("math_kl", "merged, float32, unrounded", "the arithmetic of the merge"),
        ("rounding_kl", "merged, computed in float32, rounded as written", "arithmetic and storing"),
        ("kl_mean", "merged, computed in the checkpoint's dtype", "what a user of either sees"),
        ("floor_kl", "base + live adapter in the checkpoint's dtype", "the floor: what that dtype costs anyway"),
        ("adapter_kl", "base without the adapter", "what there was to lose"),
    )
    rows = tuple(
        cells_of(what, words.figure(merge[key]), _below(merge.get("bounds", {}).get(key)), why)
        for key, what, why in steps
        if merge.get(key) is not None
    )
    note = (
        f"KL(base + live adapter ‖ …), nats per {unit}, mean over {words.count(merge['positions'])} "
        f"{words.scored(unit)}. {words.same_top(unit).capitalize()} at {percent(merge['top1_agreement'], 2)} of them."
    )
    if merge.get("logit_error") is not None:
        bound = words.figure(merge["bounds"]["logit_error"])
        note += (
            f" Largest error of a merged logit, float32, unrounded: {words.figure(merge['logit_error'])} of the "
            f"largest logit (bound {bound})."
        )
    if merge.get("reference"):
        note += (
            f" Proved: each adapter alone on the base ({len(merge['steps'])}); these are the figures of the worst. "
            f"Not proved: what was made of them together. For that there is {merge['reference']}, which is the "
            "baseline too; where it is a low-rank product, each slab of rows was checked by another route."
        )
    elif merge.get("steps"):
        note += (
            f" {len(merge['steps'])} proofs, of each adapter live on the merge of those before it; these are the "
            "figures of the worst."
        )
    return Table("", ("Base + live adapter against …", "KL", "Bound", "What it shows"), rows, note=note)


def merge_base_table(found: Mapping[str, Any], unit: str = "token") -> Table:
    """The two bases that the adapter could be merged into, on the same probe prompts."""
    measured = found["measured"]
    live = measured["nll"]
    rows = [
        (Cell("live adapter"), Cell("0"), Cell(words.figure(live["value"], 4), words.interval(live))),
        *(
            (
                Cell(f"merged into the {name} base" + (": chosen" if name == found["chosen"] else "")),
                Cell(words.figure(each["kl_mean"]["value"]), words.interval(each["kl_mean"])),
                Cell(words.figure(each["nll"]["value"], 4), words.interval(each["nll"])),
            )
            for name, each in measured["candidates"].items()
        ),
    ]
    note = (
        f"Trained on {words.quantized_base(found['trained_on'])}, where the live adapter is. Nats per {unit} over "
        f"{words.count(measured['positions'])} {words.scored(unit)} of the calibration set; weights rounded as they "
        "are written."
    )
    return Table("Base of the merge", ("", "KL", "NLL"), tuple(rows), note=note)


def gates_table(targets: Mapping[str, Any]) -> Table:
    rows: list[tuple[Cell, ...]] = [
        (
            Cell(name),
            Cell(words.METRIC_NAMES.get(gate["metric"], gate["metric"])),
            Cell(words.metric(gate["metric"], gate["value"]), words.metric_interval(gate["metric"], gate)),
            Cell(words.bound(gate["metric"], gate["bound"])),
            Cell(GATE_MARKS[gate["verdict"]], tone="muted" if gate["verdict"] == "not applicable" else gate["verdict"]),
            Cell("fails the build" if gate["action"] == "fail" else "warns"),
            Cell(gate.get("reason", "")),
        )
        for name, target in targets.items()
        for gate in target.get("gates", [])
    ]
    return Table(
        "Gates",
        ("Target", "Figure", "Measured", "Bound", "Verdict", "If missed", "Reason"),
        tuple(rows),
        note="A gate passes when its whole interval meets the bound, fails when none of it does, and is inconclusive "
        "in between.",
    )


def quality_table(report: Mapping[str, Any]) -> Table:
    baseline = report.get("baseline")
    rows = []
    if baseline:
        base = baseline["base"]
        rows.append(cells_of("base alone", words.figure(base["ppl"], 4), words.figure(base["nll"], 4), *[NONE] * 4,
                         percent(base.get("accuracy")), NONE))  # fmt: skip
        rows.append(cells_of("baseline", words.figure(baseline["ppl"], 4), words.figure(baseline["nll"], 4),
                         *[NONE] * 4, percent(baseline.get("accuracy")), NONE))  # fmt: skip
    for name, target in report["targets"].items():
        quality = target.get("quality")
        if quality is None:
            continue
        ends = quality.get("intervals") or {}
        rows.append(
            (
                Cell(name),
                Cell(words.figure(quality["ppl"], 4)),
                Cell(words.figure(quality["nll"], 4)),
                Cell(words.figure(quality["kl_mean"]), interval(ends.get("kl_mean"))),
                Cell(words.figure(quality["kl_p99"]), interval(ends.get("kl_p99"))),
                Cell(percent(quality["top1_agreement"])),
                Cell(percent(quality["flips"]), interval(ends.get("flips"), fraction=True)),
                Cell(percent(quality.get("accuracy")), interval(ends.get("accuracy"), fraction=True)),
                Cell(f"{words.count(quality['positions'])} in {words.count(quality['items'])} items"),
            )
        )
    columns = ("", "Perplexity", "NLL, nats", "KL mean, nats", "KL 99th perc., nats", "Same top token", "Flips",
               "Accuracy", "Positions")  # fmt: skip
    reason = (baseline or {}).get("accuracy_reason", "")
    note = f"Accuracy was not measured: {reason}." if reason else ""
    return Table("Quality", columns, tuple(rows), note=note)


def accuracy_tables(report: Mapping[str, Any]) -> list[Table]:
    """Accuracy by each label of the data, baseline beside targets."""
    sides = {"baseline": (report.get("baseline") or {}).get("accuracy_by") or {}}
    for name, target in report["targets"].items():
        if target.get("quality"):
            sides[name] = target["quality"].get("accuracy_by") or {}
    tables = []
    for label in dict.fromkeys(label for side in sides.values() for label in side):
        values = dict.fromkeys(value for side in sides.values() for value in side.get(label, {}))
        rows = tuple(
            cells_of(words.visible(value), *(percent(side.get(label, {}).get(value)) for side in sides.values()))
            for value in values
        )
        tables.append(Table(f"Accuracy by {words.visible(label)}", (words.visible(label), *sides), rows))
    return tables


def speed_tables(targets: Mapping[str, Any], draw: Callable[[str, Mapping[str, Any]], Table]) -> list[Table]:
    """One table a measured target and scenario: both sides and their ratio, by `draw`."""
    return [
        draw(name, speed)
        for name, target in targets.items()
        if target.get("speed")
        for speed in (target.get("scenarios") or {"": target["speed"]}).values()
    ]


def speed_table(name: str, speed: Mapping[str, Any]) -> Table:
    """Both sides of one measurement, and their ratios."""
    old = speed["baseline"]
    rows: list[tuple[Cell, ...]] = []

    def add(label: str, before: str, after: str, ratio: Mapping[str, Any] | None = None) -> None:
        rows.append((Cell(label), Cell(before), Cell(after), ratio_cell(ratio) if ratio else Cell("")))

    for label, key, ratio in (
        ("Time to first token", "ttft_ms", "ttft_ratio"),
        ("Between tokens", "itl_ms", "itl_ratio"),
    ):
        for percentile in ("p50", "p95", "p99"):
            add(
                f"{label}, {percentile}, ms",
                words.figure(old[key][percentile]),
                words.figure(speed[key][percentile]),
                speed[ratio] if percentile == "p50" else None,
            )
    add("Decoding, tokens/s", words.figure(old["decode_tps"]), words.figure(speed["decode_tps"]), speed["decode_ratio"])
    add("Prompt, tokens/s", words.figure(old["prefill_tps"]), words.figure(speed["prefill_tps"]))
    for level, ratio in speed["qps_ratio"].items():
        add(
            f"Requests/s at {level} at a time",
            words.figure(old["qps"].get(level)),
            words.figure(speed["qps"].get(level)),
            ratio,
        )
    for level in speed["qps_ratio"]:
        add(
            f"Tokens/s in all at {level} at a time",
            words.figure(old["output_tps"].get(level)),
            words.figure(speed["output_tps"].get(level)),
        )
    add("Opening", words.duration(old["load_s"]), words.duration(speed["load_s"]), speed["load_ratio"])
    add("Peak memory", words.size(old["peak_rss_bytes"]), words.size(speed["peak_rss_bytes"]), speed["memory_ratio"])
    add("Memory before opening", words.size(old["start_rss_bytes"]), words.size(speed["start_rss_bytes"]))
    add("Failed requests", str(old["failures"]), str(speed["artifact_failures"]))
    low, middle, high = speed["prompt_tokens"]
    counts = ", ".join(f"{count} at {level}" for level, count in speed["requests"].items())
    note = (
        f"Scenario {speed['scenario']}: prompts of {low} to {high} tokens (median {middle}), {speed['new_tokens']} "
        f"new tokens each, greedy, no stop token. {speed['rounds']} rounds, the two sides in turns; requests a side: "
        f"{counts}. Warm-up of {speed['warmup']} requests a side left out. Percentiles: n = {speed['ttft_ms']['n']} "
        f"first tokens, {speed['itl_ms']['n']} gaps, one request at a time. Threads: {old['threads']} and "
        f"{speed['threads']}. Load average before: {words.figure(speed['load_average']['before'], 2)}."
    )
    return Table(f"Speed of {name}", ("", "Baseline", name, "× baseline"), tuple(rows), note=note)


def damage_table(name: str, damage: Sequence[Mapping[str, Any]]) -> Table:
    """The weights that lowering hurt most."""

    def lost(item: Mapping[str, Any]) -> float:
        return 0.0 if item["delta_kept"] is None else abs(1 - item["delta_kept"])

    rows: tuple[tuple[Cell, ...], ...]
    worst = sorted(damage, key=lambda item: (-lost(item), -item["relative_error"]))[:_WORST]
    rows = tuple(
        cells_of(item["name"], item["type"], percent(item["relative_error"], 2), percent(item["delta_kept"]),
             words.figure(item["delta_noise"]))
        for item in worst
    )  # fmt: skip
    return Table(
        f"Most damaged weights of {name}",
        ("Weight", "Stored as", "Relative error", "Adapter's change kept", "Rounding / change"),
        rows,
    )


def tokenizer_table(targets: Mapping[str, Any]) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for name, target in targets.items():
        tokenizer = target.get("tokenizer")
        if tokenizer is None:
            continue
        own = f"{words.count(tokenizer['own_texts'])} of your own"
        rows.append(cells_of(name, own, "", Cell("✓ same token ids", tone="pass")))
        if not tokenizer["differences"]:
            rows.append(
                cells_of(name, f"{tokenizer['probes']} awkward ones", "", Cell("✓ same token ids", tone="pass"))
            )
        for item in tokenizer["differences"]:
            mended = "Not in lora2edge's own sessions. " if item["mended"] else ""
            rows.append(cells_of(name, item["kind"], ", ".join(item["texts"]), f"{mended}{item['consequence']}"))
    return Table("", ("Target", "Texts", "Which", "Found"), tuple(rows))


def inputs_table(report: Mapping[str, Any]) -> Table:
    base, adapters, data = (report["inputs"].get(key) for key in ("base", "adapters", "data"))
    what = f"{base['architecture']}, {words.parameters(base['parameters'])} parameters, {base['dtype']}"
    rows = [("Base", str(base["name"]), f"{what}, {words.size(base['size_bytes'])}")]
    for adapter in adapters or []:
        rest = {key: value for key, value in adapter.items() if key != "name" and (key, value) != ("weight", 1)}
        rows.append(("Adapter", str(adapter.get("name", "")), _flat(rest)))
    if combine := report["inputs"].get("combine"):
        rest = {key: value for key, value in combine.items() if key != "method"}
        rows.append(("Combined by", str(combine["method"]), _flat(rest)))
    for name, about in (data or {}).items():
        rows.append((f"Data: {name}", "", _flat(about)))
    return Table("Inputs", ("", "", ""), tuple(cells_of(*row) for row in rows))


def facts_table(report: Mapping[str, Any]) -> Table:
    """What each side ran on."""
    sides = {"baseline": (report.get("baseline") or {}).get("facts") or {}}
    sides.update({name: target.get("facts") or {} for name, target in report["targets"].items()})
    sides = {name: facts for name, facts in sides.items() if facts}
    keys = dict.fromkeys(key for facts in sides.values() for key in facts if key != "reference" or facts[key])
    rows = tuple(cells_of(key.replace("_", " "), *(_flat(facts.get(key)) for facts in sides.values())) for key in keys)
    return Table("What they ran on", ("", *sides), rows)


def machine_table(machine: Mapping[str, Any]) -> Table:
    rows = []
    for key, value in machine.items():
        label, shown = key.replace("_", " "), _flat(value)
        if key.endswith("_bytes"):
            label, shown = label.removesuffix(" bytes"), words.size(value)
        rows.append(cells_of(label, shown))
    return Table("Machine", ("", ""), tuple(rows))


def stages_table(stages: Sequence[Mapping[str, Any]]) -> Table:
    rows = tuple(
        cells_of(
            stage["name"],
            _with_phases(stage),
            "used again" if stage.get("reused") else "",
            stage.get("measured_at", ""),
        )
        for stage in stages
    )
    return Table("Stages", ("Stage", "Time", "From the cache", "Measured at"), rows)


def _with_phases(stage: Mapping[str, Any]) -> str:
    """How long a stage took, and what of it its parts: of a lowering, rounding with its feedback stream and packing."""
    whole = words.duration(stage["seconds"])
    phases = [f"{phase['what']} {words.duration(phase['seconds'])}" for phase in stage.get("phases") or ()]
    return f"{whole} ({', '.join(phases)})" if phases else whole


def scale_rows(report: Mapping[str, Any], columns: int, figures: Sequence[str]) -> list[tuple[Cell, ...]]:
    """Rows for base alone (or chance), baseline and the merged checkpoint, which are no targets.

    `figures`: shares that stand behind the flips; further columns are ratios, up to `columns` in all.
    """
    rows = []
    baseline, merge = report.get("baseline"), report.get("merge")
    size = words.size(report["inputs"]["base"]["size_bytes"])
    ratios = columns - 6 - len(figures)
    if baseline:
        # Without a gain there is nothing that these two could be the ends of.
        gained = (baseline["gain"] or {}).get("low") or 0
        none, all_ = ("0\u00a0%", "100\u00a0%") if gained > 0 else (NONE, NONE)
        base = baseline["base"]
        before, after = ([percent(side.get(figure)) for figure in figures] for side in (base, baseline))
        first = "chance" if base.get("kind") == "chance" else "base alone"
        rows.append((first, NONE, size, none, NONE, NONE, *before, *[NONE] * ratios))
        rows.append(("baseline", NONE, size, all_, "0", "0\u00a0%", *after, *["1\u00a0×"] * ratios))
    if merge:
        rows.append(("merged checkpoint", VERDICT_MARKS[merge.get("verdict", "pass")], size, NONE,
                     words.figure(words.merged_kl(report)), *[NONE] * (columns - 5)))  # fmt: skip
    return [tuple(Cell(text, tone="muted") for text in row) for row in rows]


def target_cells(name: str, target: Mapping[str, Any]) -> list[Cell]:
    """Name, verdict and size of a target that was built."""
    ratio = target.get("size_ratio")
    smaller = f"{words.figure(ratio)} × smaller" if ratio else ""
    return [Cell(name), verdict_cell(target["verdict"]), Cell(words.size(target.get("size_bytes")), smaller)]


def unbuilt_row(name: str, error: Mapping[str, Any], columns: int) -> tuple[Cell, ...]:
    """A target that could not be built."""
    return (Cell(name), Cell("✕ not built", error["code"], "fail"), *[Cell(NONE, tone="muted")] * (columns - 2))


def _headline_row(name: str, target: Mapping[str, Any]) -> tuple[Cell, ...]:
    error, quality, speed = (target.get(key) for key in ("error", "quality", "speed"))
    if error:
        return unbuilt_row(name, error, len(HEADLINE_COLUMNS))
    cells = target_cells(name, target)
    if quality:
        ends, kept = quality.get("intervals") or {}, quality.get("gain_kept")
        cells += [
            Cell(percent(kept["value"]), interval(kept, fraction=True)) if kept else missing(),
            Cell(words.figure(quality["kl_mean"]), interval(ends.get("kl_mean"))),
            Cell(percent(quality["flips"]), interval(ends.get("flips"), fraction=True)),
            Cell(percent(quality["accuracy"]), interval(ends.get("accuracy"), fraction=True))
            if quality.get("accuracy") is not None
            else missing(),
        ]
    else:
        cells += [missing()] * 4
    if speed:
        levels = speed["qps_ratio"]
        memory = speed["memory_ratio"]
        cells += [
            ratio_cell(speed["decode_ratio"]),
            ratio_cell(speed["ttft_ratio"]),
            Cell(
                "\u00a0/\u00a0".join(words.figure(ratio["value"], 2) if ratio else NONE for ratio in levels.values())
                + "\u00a0×",
                "at " + " / ".join(levels),
            ),
            Cell(times(memory["value"]), words.size(speed["peak_rss_bytes"]))
            if memory
            else Cell(NONE, words.size(speed["peak_rss_bytes"])),
        ]
    else:
        cells += [missing()] * 4
    return tuple(cells)


def _below(bound: float | None) -> str:
    return NONE if bound is None else f"≤ {words.figure(bound)}"


def _flat(value: Any) -> str:
    """A fact as one line of text."""
    if value is None or value in ([], {}):
        return NONE
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_flat(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_flat(item) for item in value)
    return words.figure(value) if isinstance(value, float) else words.visible(str(value), 200)
