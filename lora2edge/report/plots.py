"""The report's charts."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora2edge.report import words
from lora2edge.report.svg import WIDTH, Canvas, Scale, linear, logarithmic, spread, steps

_FLOOR_KL = 1e-9
"""Where a divergence of zero is drawn on a logarithmic axis."""
_LABEL = 8.0
"""Pixels a character, roughly, of a label at the size that phones get."""


_Rows = list[tuple[str, list[tuple[str, Mapping[str, Any] | None]]]]
"""Label, and the ratio of each target."""


@dataclass(frozen=True, slots=True)
class Plot:
    title: str
    svg: str
    caption: str


def draw_classify_plots(targets: Mapping[str, Any]) -> list[Plot]:
    """A classifier's texts per second by batch size, and the distributions of the batches' times."""
    measured = {name: target["speed"] for name, target in targets.items() if target.get("speed")}
    if not measured:
        return []
    series = {name: number for number, name in enumerate(targets)}
    sizes = list(dict.fromkeys(size for speed in measured.values() for size in speed["qps_ratio"]))
    rows = [
        (label.format(size), [(name, speed[key].get(size)) for name, speed in measured.items()])
        for label, key in (("latency, {}", "latency_ratio"), ("texts/s, {}", "qps_ratio"))
        for size in sizes
    ]
    rows.append(("memory", [(name, speed["memory_ratio"]) for name, speed in measured.items()]))
    plots = [_ratios(rows, measured, series), _qps(measured, series, "texts", "texts in a batch")]
    for size in sizes:
        if any(speed["samples"].get(size) for speed in measured.values()):
            plots.append(_latency(measured, series, size, f"Time of a batch of {size}", "One batch at a time."))
    return plots


def draw_quality_plots(report: Mapping[str, Any]) -> list[Plot]:
    """Divergence against size, gain kept against size, gain kept against its bound."""
    drawn = []
    if any(target.get("quality") for target in report["targets"].values()):
        drawn.append(_kl_against_size(report))
    if any((target.get("quality") or {}).get("gain_kept") for target in report["targets"].values()):
        drawn += [_gain_against_size(report), _gain_kept(report)]
        if any("decode_ratio" in (target.get("speed") or {}) for target in report["targets"].values()):
            drawn.append(_gain_against_speed(report))
    return drawn


def draw_speed_plots(targets: Mapping[str, Any]) -> list[Plot]:
    """Requests per second by concurrency, and the distributions of both latencies."""
    measured = {name: target["speed"] for name, target in targets.items() if target.get("speed")}
    if not measured:
        return []
    series = {name: number for number, name in enumerate(targets)}
    plots = [_ratios(_generation_rows(measured), measured, series), _qps(measured, series)]
    for key, title in (("ttft_ms", "Time to first token"), ("itl_ms", "Time between tokens")):
        if any(speed["samples"][key] for speed in measured.values()):
            plots.append(_latency(measured, series, key, title))
    return plots


def draw_damage_plots(name: str, damage: Sequence[Mapping[str, Any]]) -> list[Plot]:
    """Layer by kind of weight: how far rounding moved it, and how much of the adapter's change it lost."""
    if not damage:
        return []
    plots = [
        _heat(
            name,
            damage,
            "relative_error",
            "Rounding error by layer",
            "‖Q − W‖ / ‖W‖. Stronger colour is worse; each map has its own scale.",
        )
    ]
    if any(item["delta_kept"] is not None for item in damage):
        plots.append(
            _heat(
                name,
                damage,
                "delta_lost",
                "Adapter's change lost by layer",
                "|1 − ⟨Q − W_base, ΔW⟩ / ‖ΔW‖²|: 0 % = the change that training made is all there. "
                "Outlined: not adapted.",
            )
        )
    return plots


@dataclass(frozen=True, slots=True)
class _Dot:
    name: str
    series: int
    x: float
    value: float
    low: float | None
    high: float | None


def _dots(report: Mapping[str, Any], figure: str) -> list[_Dot]:
    dots = []
    for number, (name, target) in enumerate(report["targets"].items()):
        quality = target.get("quality")
        if not quality or not target.get("size_bytes"):
            continue
        if figure == "gain_kept":
            found = quality["gain_kept"]
            if found is None:
                continue
        else:
            ends = (quality.get("intervals") or {}).get(figure) or {"low": None, "high": None}
            found = {"value": quality[figure], **ends}
        dots.append(_Dot(name, number, target["size_bytes"] / 1e6, found["value"], found["low"], found["high"]))
    return dots


def _kl_against_size(report: Mapping[str, Any]) -> Plot:
    dots = _dots(report, "kl_mean")
    kl = words.merged_kl(report)
    if kl is not None:
        size_mb = report["inputs"]["base"]["size_bytes"] / 1e6
        dots.append(_Dot("merged, unquantized", 7, size_mb, kl, None, None))
    dots = [
        _Dot(dot.name, dot.series, dot.x, max(dot.value, _FLOOR_KL),
             None if dot.low is None else max(dot.low, _FLOOR_KL),
             None if dot.high is None else max(dot.high, _FLOOR_KL))
        for dot in dots
    ]  # fmt: skip
    values = [value for dot in dots for value in (dot.value, dot.low, dot.high) if value is not None]
    canvas = _scatter(dots, logarithmic(values, 234, 14), words.tick, "KL against size")
    return Plot(
        "Divergence against size",
        canvas.to_svg(),
        f"KL(baseline ‖ artifact), nats per {words.unit(report)}, logarithmic: lower is closer to base + live adapter. "
        "Bars: 95 % intervals.",
    )


def _gain_against_size(report: Mapping[str, Any]) -> Plot:
    dots = _dots(report, "gain_kept")
    values = [value for dot in dots for value in (dot.value, dot.low, dot.high) if value is not None]
    scale = linear([*values, 1.0], 234, 14)
    canvas = _scatter(dots, scale, lambda value: f"{value * 100:g} %", "Gain kept against size", reference=1.0)
    return Plot(
        "Gain kept against size",
        canvas.to_svg(),
        "Share of what the adapter bought on held-out text that the artifact still has. 100 % = nothing was lost.",
    )


def _gain_against_speed(report: Mapping[str, Any]) -> Plot:
    speeds = {
        name: target["speed"]["decode_ratio"] for name, target in report["targets"].items() if target.get("speed")
    }
    dots = [
        _Dot(dot.name, dot.series, speeds[dot.name]["value"], dot.value, dot.low, dot.high)
        for dot in _dots(report, "gain_kept")
        if dot.name in speeds
    ]
    values = [value for dot in dots for value in (dot.value, dot.low, dot.high) if value is not None]
    scale = linear([*values, 1.0], 234, 14)
    canvas = _scatter(
        dots,
        scale,
        lambda value: f"{value * 100:g} %",
        "Gain kept against speed",
        name="decoding, × baseline",
        reference=1.0,
    )
    return Plot(
        "Gain kept against decoding speed",
        canvas.to_svg(),
        "Up and to the right is better. Tokens per second after the first, one request at a time.",
    )


def _scatter(
    dots: Sequence[_Dot],
    y: Scale,
    label: Callable[[float], str],
    title: str,
    *,
    name: str = "size of the files, MB",
    reference: float | None = None,
) -> Canvas:
    """Dots with whiskers along y and their names beside them."""
    canvas = Canvas(284, title)
    labels = [label(tick) for tick in y.ticks()]
    left, right, bottom = max(66, 12 + 7 * max(map(len, labels), default=0)), WIDTH - 14, 240
    # Room at the right, so that names stand right of their dots.
    x = linear([dot.x for dot in dots], left, right - 90, zero=True)
    giga = name.endswith("MB") and x.high > 2000
    ticks = [words.tick(tick / 1000 if giga else tick) for tick in x.ticks()]
    canvas.axis_x(x, 14, bottom, name.replace("MB", "GB") if giga else name, ticks, right)
    canvas.axis_y(y, left, right, labels)
    if reference is not None:
        canvas.line(left, y(reference), right, y(reference), "reference")
    heights = spread([y(dot.value) + 4 for dot in dots], 14, 18, bottom - 6)
    for dot, height in zip(dots, heights, strict=True):
        across = x(dot.x)
        if dot.low is not None and dot.high is not None:
            canvas.line(across, y(dot.low), across, y(dot.high), f"whisker s{dot.series % 8}")
        tip = f"{dot.name}: {label(dot.value) if reference is None else words.percent(dot.value)}"
        canvas.marker(across, y(dot.value), dot.series, tip)
        fits = across + 12 + len(dot.name) * _LABEL < WIDTH
        canvas.text(across + (11 if fits else -11), height, dot.name, "mark", "start" if fits else "end")
    return canvas


def _gain_kept(report: Mapping[str, Any]) -> Plot:
    rows = [
        (name, number, target)
        for number, (name, target) in enumerate(report["targets"].items())
        if (target.get("quality") or {}).get("gain_kept")
    ]
    bottom = 20 + 46 * len(rows)
    canvas = Canvas(bottom + 44, "Gain kept with its interval and bound")
    kept = [target["quality"]["gain_kept"] for _, _, target in rows]
    bounds = [_lower_bound(target) for _, _, target in rows]
    ends = [value for item in kept for value in (item["value"], item["low"], item["high"]) if value is not None]
    x = linear([*ends, 1.0, *(bound for bound in bounds if bound is not None)], 16, WIDTH - 22)
    canvas.axis_x(x, 12, bottom, "gain kept", [f"{tick * 100:g} %" for tick in x.ticks()])
    canvas.line(x(1.0), 12, x(1.0), bottom, "reference")
    for place, ((name, number, _), item, bound) in enumerate(zip(rows, kept, bounds, strict=True)):
        y = 48 + 46 * place
        text = f"{name}\u2002{words.percent(item['value'])} {words.interval(item, fraction=True)}"
        at_left = x(item["value"]) < WIDTH / 2
        canvas.text(x.start if at_left else x.stop, y - 15, text, "mark", "start" if at_left else "end")
        if item["low"] is not None and item["high"] is not None:
            canvas.line(x(item["low"]), y, x(item["high"]), y, f"whisker s{number % 8}")
        if bound is not None:
            canvas.line(x(bound), y - 11, x(bound), y + 11, "bound")
        canvas.marker(x(item["value"]), y, number, text)
    return Plot(
        "Gain kept and its bound",
        canvas.to_svg(),
        "Dot and bar: value and 95 % interval. Red tick: the gate's bound. Dashed: 100 %, nothing lost.",
    )


def _lower_bound(target: Mapping[str, Any]) -> float | None:
    for gate in target.get("gates", []):
        if gate["metric"] == "gain_kept" and (found := re.search(r"\d[\d.e-]*", str(gate["bound"]))):
            return float(found.group())
    return None


def _generation_rows(measured: Mapping[str, Any]) -> _Rows:
    rows: _Rows = [
        ("decoding", [(name, speed["decode_ratio"]) for name, speed in measured.items()]),
        ("first token", [(name, speed["ttft_ratio"]) for name, speed in measured.items()]),
    ]
    levels = list(dict.fromkeys(level for speed in measured.values() for level in speed["qps_ratio"]))
    for level in levels:
        ratios = [(name, speed["qps_ratio"].get(level)) for name, speed in measured.items()]
        rows.append((f"requests/s at {level}", ratios))
    rows.append(("memory", [(name, speed["memory_ratio"]) for name, speed in measured.items()]))
    return rows


def _ratios(rows: _Rows, measured: Mapping[str, Any], series: Mapping[str, int]) -> Plot:
    """Each ratio with its interval, on one logarithmic axis around 1."""
    ends = [ratio[end] for _, ratios in rows for _, ratio in ratios if ratio for end in ("low", "value", "high")]
    names = list(measured)
    top, pitch = 14 + _legend_height(names), max(30, 12 * len(names) + 10)
    bottom = top + pitch * len(rows)
    canvas = Canvas(bottom + 48, "Ratios against the baseline")
    _legend(canvas, [(name, f"fill s{series[name] % 8}") for name in names])
    x = logarithmic([*(end for end in ends if end is not None), 1.0], 112, WIDTH - 16)
    canvas.axis_x(x, top, bottom, "× baseline, logarithmic", [words.tick(tick) for tick in x.ticks()])
    canvas.line(x(1.0), top, x(1.0), bottom, "reference")
    for place, (label, ratios) in enumerate(rows):
        middle = top + pitch * (place + 0.5)
        canvas.text(104, middle + 4, label, "tick", "end")
        for index, (name, ratio) in enumerate(ratios):
            if ratio is None:
                continue
            y = middle + 12 * (index - (len(ratios) - 1) / 2)
            if ratio["low"] is not None and ratio["high"] is not None:
                canvas.line(x(ratio["low"]), y, x(ratio["high"]), y, f"whisker s{series[name] % 8}")
            tip = f"{name}, {label}: {words.times(ratio['value'])} {words.interval(ratio)}"
            canvas.marker(x(ratio["value"]), y, series[name], tip)
    return Plot(
        "Against the baseline",
        canvas.to_svg(),
        "Right of the dashed line is better than the baseline, left of it worse. Bars: 95 % intervals.",
    )


def _qps(
    measured: Mapping[str, Any], series: Mapping[str, int], what: str = "requests", axis: str = "requests at a time"
) -> Plot:
    levels = list(dict.fromkeys(level for speed in measured.values() for level in speed["qps"]))
    first = next(iter(measured.values()))
    bars = [("baseline", "fill base", first["baseline"]["qps"])]
    bars += [(name, f"fill s{series[name] % 8}", speed["qps"]) for name, speed in measured.items()]
    legend = _legend_height([name for name, _, _ in bars])
    top, bottom = 14 + legend, 234 + legend
    canvas = Canvas(bottom + 48, f"{what.capitalize()} per second by {axis}")
    _legend(canvas, [(name, css) for name, css, _ in bars])
    y = linear([value for _, _, qps in bars for value in qps.values()], bottom, top, zero=True)
    canvas.axis_y(y, 46, WIDTH - 8, [words.tick(tick) for tick in y.ticks()])
    group = (WIDTH - 60) / len(levels)
    width = min(group * 0.8 / len(bars), 44)
    for place, level in enumerate(levels):
        middle = 52 + group * (place + 0.5)
        for index, (name, css, qps) in enumerate(bars):
            value = qps.get(level)
            if value is None:
                continue
            x = middle + (index - len(bars) / 2) * width
            canvas.rect(x + 1, y(value), width - 2, bottom - y(value), css, f"{name}: {words.figure(value)} {what}/s")
            if width >= 26:
                canvas.text(x + width / 2, y(value) - 4, words.figure(value, 2), "small", "middle")
        canvas.text(middle, bottom + 16, level, "tick", "middle")
    canvas.line(46, bottom, WIDTH - 8, bottom, "axis")
    canvas.text((46 + WIDTH - 8) / 2, bottom + 36, axis, "name", "middle")
    other = " The baseline is the one measured beside the first target." if len(measured) > 1 else ""
    return Plot(f"{what.capitalize()} per second", canvas.to_svg(), f"Higher is better.{other}")


def _latency(
    measured: Mapping[str, Any],
    series: Mapping[str, int],
    key: str,
    title: str,
    how: str = "One request at a time.",
) -> Plot:
    first = next(iter(measured.values()))
    lines = [("baseline", "base", first["baseline"]["samples"].get(key) or [])]
    lines += [(name, f"s{series[name] % 8}", speed["samples"].get(key) or []) for name, speed in measured.items()]
    lines = [(name, css, values) for name, css, values in lines if values]
    legend = _legend_height([name for name, _, _ in lines])
    top, bottom = 14 + legend, 234 + legend
    canvas = Canvas(bottom + 48, title)
    _legend(canvas, [(name, f"fill {css}") for name, css, _ in lines])
    x = logarithmic([max(value, 1e-3) for _, _, values in lines for value in values], 46, WIDTH - 12)
    y = Scale(0.0, 1.0, bottom, top)
    canvas.axis_x(x, top, bottom, "milliseconds, logarithmic", [words.tick(tick) for tick in x.ticks()])
    canvas.axis_y(y, 46, WIDTH - 12, [f"{tick * 100:.0f} %" for tick in y.ticks()])
    for name, css, values in lines:
        points = [(x(value), y(share)) for value, share in steps(values)]
        canvas.path(points, f"curve {css}", f"{name}: median {words.figure(values[len(values) // 2])} ms")
    return Plot(
        f"{title}: distribution",
        canvas.to_svg(),
        f"Share of figures at or below. Further left is faster; steeper is steadier. {how}",
    )


def _heat(name: str, damage: Sequence[Mapping[str, Any]], figure: str, title: str, caption: str) -> Plot:
    cells: dict[str, dict[int, tuple[float | None, str]]] = {}
    for item in damage:
        value = item["relative_error"]
        if figure == "delta_lost":
            value = None if item["delta_kept"] is None else abs(1 - item["delta_kept"])
        if item["layer"] is None:
            continue
        shown = f"{item['name']} ({item['type']}): {words.percent(value, 2)}"
        cells.setdefault(_kind(item["name"]), {})[item["layer"]] = (value, shown)
    layers = sorted({layer for row in cells.values() for layer in row}) or [0]
    known = [value for row in cells.values() for value, _ in row.values() if value is not None]
    worst = max(known, default=0.0) or 1.0
    left, pitch, top = 118, 22, 10
    width = (WIDTH - left - 8) / len(layers)
    bottom = top + pitch * len(cells)
    canvas = Canvas(bottom + 68, f"{title}, {name}")
    for place, (kind, row) in enumerate(cells.items()):
        y = top + pitch * place
        canvas.text(left - 8, y + 15, kind, "tick", "end")
        for layer, (value, shown) in row.items():
            x = left + width * layers.index(layer)
            gap = 1 if width > 6 else 0.3
            if value is None:
                canvas.rect(x + gap, y + 1, width - 2 * gap, pitch - 2, "absent", shown)
            else:
                canvas.rect(x + gap, y + 1, width - 2 * gap, pitch - 2, "heat", shown, 0.06 + 0.94 * value / worst)
    every = max(1, -(-len(layers) // 8))
    for place, layer in enumerate(layers):
        if place % every == 0:
            canvas.text(left + width * (place + 0.5), bottom + 15, str(layer), "tick", "middle")
    canvas.text(left + (WIDTH - left - 8) / 2, bottom + 31, "layer", "name", "middle")
    canvas.text(left - 8, bottom + 58, "0 %", "tick", "end")
    for step in range(20):
        canvas.rect(left + step * 8, bottom + 48, 8, 12, "heat", "", 0.06 + 0.94 * step / 19)
    canvas.text(left + 168, bottom + 58, words.percent(worst, 2), "tick")
    return Plot(f"{title}: {name}", canvas.to_svg(), caption)


def _kind(name: str) -> str:
    """ "model.layers.3.self_attn.q_proj.weight" → "q_proj", with its parent where that is not the usual one."""
    parts = [part for part in name.removesuffix(".weight").split(".") if not part.isdigit()]
    last = parts[-2:]
    return (
        last[-1] if len(last) == 1 or last[0] in {"self_attn", "mlp", "attention", "layers"} else ".".join(last)[-16:]
    )


def _legend_rows(names: Sequence[str]) -> list[list[tuple[str, float]]]:
    """Names with their left ends, row by row."""
    rows: list[list[tuple[str, float]]] = [[]]
    x = 46.0
    for name in names:
        width = 26 + len(name) * _LABEL
        if x + width > WIDTH and rows[-1]:
            rows.append([])
            x = 46.0
        rows[-1].append((name, x))
        x += width
    return rows


def _legend_height(names: Sequence[str]) -> int:
    return 18 * len(_legend_rows(names))


def _legend(canvas: Canvas, entries: Sequence[tuple[str, str]]) -> None:
    css = dict(entries)
    for number, row in enumerate(_legend_rows([name for name, _ in entries])):
        for name, x in row:
            y = 4 + 18 * number
            canvas.rect(x, y, 12, 12, css[name])
            canvas.text(x + 17, y + 10, name, "mark")
