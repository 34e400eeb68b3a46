"""Figures as people read them. One function per unit; None is a dash."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Mapping
from typing import Any

NONE = "–"
METRIC_NAMES = {
    "kl_mean": "KL, mean",
    "kl_p99": "KL, 99th percentile",
    "flips": "Flips",
    "ppl_ratio": "Perplexity ratio",
    "accuracy": "Accuracy",
    "macro_f1": "Macro-F1",
    "macro_f1_loss": "Macro-F1 loss",
    "gain_kept": "Gain kept",
}
_FRACTIONS = {"flips", "accuracy", "macro_f1", "macro_f1_loss", "gain_kept", "top1_agreement"}
_UNITS = {"sequence-classification": "text", "token-classification": "word"}
"""What is scored; of all other tasks it is a token."""


def unit(report: Mapping[str, Any]) -> str:
    """What is scored: "token" of a language model; "text" or "word" of a classifier."""
    return _UNITS.get(str(report.get("task")), "token")


def scored(unit: str) -> str:
    """What figures are means over."""
    return "positions" if unit == "token" else f"{unit}s"


def same_top(unit: str) -> str:
    """What two models agree on."""
    return "same top token" if unit == "token" else "same class"


def points(value: float | None) -> str:
    """A difference of two fractions."""
    return NONE if value is None else f"{value * 100:.2f} points"


def figure(value: float | None, digits: int = 3) -> str:
    """`digits` significant digits, no exponent between 0.001 and 1e6."""
    if value is None:
        return NONE
    if value == 0:
        return "0"
    if not 1e-3 <= abs(value) < 1e6:
        mantissa, _, exponent = f"{value:.{digits - 1}e}".partition("e")
        return f"{mantissa}e{int(exponent)}"
    whole = math.floor(math.log10(abs(value))) + 1
    return f"{value:.{max(0, digits - whole)}f}"


def tick(value: float) -> str:
    """A round figure of an axis."""
    return f"{value:.6g}".replace("e-0", "e-").replace("e+0", "e")


def percent(value: float | None, digits: int = 1) -> str:
    """A fraction as a percentage."""
    return NONE if value is None else f"{value * 100:.{digits}f}\u00a0%"


def size(value: float | None) -> str:
    """Bytes in decimal units, as disks are sold."""
    if value is None:
        return NONE
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= scale:
            return f"{figure(value / scale)} {unit}"
    return f"{value:.0f} B"


def count(value: int | None) -> str:
    """A whole number with thin spaces between thousands."""
    return NONE if value is None else f"{value:,}".replace(",", "\u202f")


def parameters(value: int) -> str:
    """A number of parameters, in millions or billions."""
    for unit, scale in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= scale:
            return f"{figure(value / scale)} {unit}"
    return str(value)


def times(value: float | None) -> str:
    """A ratio against the baseline."""
    return NONE if value is None else f"{figure(value)}\u00a0×"


def duration(seconds: float | None) -> str:
    """Seconds as a person says them."""
    if seconds is None:
        return NONE
    if seconds < 60:
        return f"{figure(seconds, 2)} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def interval(data: Mapping[str, Any] | None, fraction: bool = False) -> str:
    """`[low, high]` of a 95 % interval; empty where there is none."""
    if data is None or data.get("low") is None or data.get("high") is None:
        return ""
    if fraction:
        return f"[{data['low'] * 100:.1f}, {data['high'] * 100:.1f}]"
    return f"[{figure(data['low'])}, {figure(data['high'])}]"


def metric(name: str, value: float | None) -> str:
    """A gate's figure, in its own unit."""
    if name == "macro_f1_loss":
        return points(value)
    if name in _FRACTIONS:
        return percent(value)
    return f"{figure(value)} nats" if name.startswith("kl") and value is not None else figure(value)


def bound(name: str, text: str) -> str:
    """A gate's bound, "≥ 0.95", in the unit that its figure is shown in."""
    if name not in _FRACTIONS:
        return text
    sign = " points" if name == "macro_f1_loss" else "\u00a0%"
    return re.sub(r"\d[\d.]*(e-?\d+)?", lambda found: f"{float(found.group()) * 100:g}{sign}", text)


def metric_interval(name: str, data: Mapping[str, Any]) -> str:
    return interval(data, fraction=name in _FRACTIONS)


def adapter_lines(adapter: Mapping[str, Any]) -> list[str]:
    """A plan's adapter in a few lines: its kind and size, what it reaches, and how it matches the base."""
    lines = [f"{adapter['name']}: {adapter['kind']} of rank {adapter['rank']}, {adapter['tensors']} tensors"]
    if adapter.get("weight", 1) != 1:
        lines[0] += f", weight {adapter['weight']:g}"
    if "coverage" not in adapter:
        return lines
    coverage, delta, match = adapter["coverage"], adapter["delta"], adapter["match"]
    lines[0] += (
        f" ({parameters(delta['parameters'])} parameters, {size(delta['bytes'])}) on {coverage['modules']} modules; "
        f"changes {percent(delta['share'])} of the weights"
    )
    if coverage["missed"]:
        lines.append(f"Hit nothing when it was trained: {', '.join(coverage['missed'])}")
    if coverage["unadapted"]:
        left = ", ".join(f"{name} × {number}" for name, number in coverage["unadapted"].items())
        lines.append(f"Linear layers that it leaves as they are: {left}")
    else:
        lines.append("It adapts every linear layer")
    vocabulary = f"{match['tokenizer_ids']} token ids of the {match['tokenizer_from']}'s tokenizer" if (
        match["tokenizer_ids"]
    ) else "no tokenizer"  # fmt: skip
    lines.append(
        f"Fits the base: names and shapes of {match['parts']} parts; {vocabulary} in {match['embedding_rows']} rows"
    )
    if match["named"]:
        lines.append(named_base(match))
    return lines


def named_base(match: Mapping[str, Any]) -> str:
    """What base the adapter names, and whether that can be the one that was given."""
    revision = f" at {match['named_revision']}" if match["named_revision"] else ""
    line = f"It was trained on {match['named']}{revision}"
    if match["same_name"] is False:
        line += f", and {match['given']} has another name: only names and shapes could be compared"
    return line


def merged_kl(report: Mapping[str, Any]) -> float | None:
    """KL(baseline ‖ merged, rounded as written, in float32); None where the proof was against another live model."""
    merge, base = report.get("merge"), report.get("merge_base")
    if not merge or merge.get("reference"):
        return None
    if base and base["chosen"] == "original":  # the baseline is on the quantized one
        measured = base["measured"]
        return float(measured["candidates"]["original"]["kl_mean"]["value"]) if measured else None
    steps = merge.get("steps")
    return float((steps[-1] if steps else merge)["rounding_kl"])


def merge_base_lines(found: Mapping[str, Any], unit: str = "token") -> list[str]:
    """Which base a QLoRA adapter was merged into, and what both cost where they were measured."""
    measured = found["measured"]
    lines = [f"Trained on {quantized_base(found['trained_on'])}; merged into the {found['chosen']} base"]
    if measured is None:
        return lines
    kls = ", ".join(
        f"{name} {figure(each['kl_mean']['value'])} {interval(each['kl_mean'])}"
        for name, each in measured["candidates"].items()
    )
    lines.append(
        f"KL against the live adapter, nats per {unit} over {count(measured['positions'])} {scored(unit)}: {kls}"
        + ("" if measured["decided"] else "; their intervals do not tell them apart")
    )
    return lines


def quantized_base(trained_on: Mapping[str, Any]) -> str:
    """What the adapter was trained on."""
    settings = trained_on["settings"]
    if not settings:
        return f"the quantized base {trained_on['folder']}"
    double = " with double quantization" if settings["double_quant"] else ""
    return f"a base in {settings['quant_type'].upper()}{double}"


def visible(text: str, limit: int = 60) -> str:
    """`text` with everything that does not show (controls, format characters, lone marks) as its code point."""
    shown = []
    for character in text[:limit]:
        kind = unicodedata.category(character)
        hidden = kind in {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp", "Mn", "Me"} or (kind == "Zs" and character != " ")
        shown.append(f"‹U+{ord(character):04X}›" if hidden else character)
    return "".join(shown) + ("…" if len(text) > limit else "")
