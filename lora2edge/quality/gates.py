"""The target's bounds against the measured intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from lora2edge.target import Gate, Target

Verdict = Literal["pass", "fail", "inconclusive"]
GateVerdict = Literal["pass", "fail", "inconclusive", "not applicable"]
_LANGUAGE, _CLASSIFIER = {"ppl_ratio"}, {"macro_f1", "macro_f1_loss"}
"""Figures of one task only."""
_OF_FLIPS = {"flips", "macro_f1_loss"}
"""Figures of a classifier whose interval has no width where no decision differs."""
_WITHOUT = {"gain_kept": "gain_kept_reason", "accuracy": "accuracy_reason"}
"""Figures that some texts do not have, and where the reason is. Their gates then rest on KL's."""


def judge(target: Target, quality: Mapping[str, Any]) -> tuple[list[dict[str, Any]], Verdict]:
    """Every gate of `target` on `quality` (of `measure_quality` or `measure_classifier`), and the target's verdict.

    A gate passes when the whole 95 % interval meets the bound, fails when the whole interval misses it, and is
    inconclusive where the interval straddles it. A gate on a figure that this text does not have takes the verdict
    of the gate on mean KL, and is inconclusive without one. One on a figure that models of this task never have is not
    applicable, and binds nothing. The target fails with any gate of action `fail`.
    """
    gates = []
    classifies = "macro_f1" in quality
    for metric, gate in target.gates.items():
        estimate = quality["intervals"].get(metric)
        verdict: GateVerdict
        if metric in (_LANGUAGE if classifies else _CLASSIFIER):
            others = "a language model" if classifies else "a classifier"
            verdict, reason = "not applicable", f"not measured: it is a figure of {others}"
            estimate = {"value": None, "low": None, "high": None}
        elif metric in _WITHOUT and quality.get(metric) is None:
            reason = f"{quality.get(_WITHOUT[metric]) or 'it was not measured'}; this gate rests on kl_mean"
            kl_gate = target.gates.get("kl_mean")
            verdict = _verdict(kl_gate, quality["intervals"]["kl_mean"])[0] if kl_gate else "inconclusive"
            estimate = {"value": None, "low": None, "high": None}
        else:
            verdict, reason = _verdict(gate, estimate)
        if metric in _OF_FLIPS and verdict == "pass" and (most := quality.get("flips_bound")) is not None:
            reason = f"nothing differs on {quality['items']} items; of others up to {most:.2%} could"
        gates.append(
            {
                "metric": metric,
                "bound": _bound(gate),
                "action": gate.action,
                "value": estimate["value"],
                "low": estimate["low"],
                "high": estimate["high"],
                "verdict": verdict,
                "reason": reason,
            }
        )
    binding = {gate["verdict"] for gate in gates if gate["action"] == "fail"}
    total: Verdict = "fail" if "fail" in binding else "inconclusive" if "inconclusive" in binding else "pass"
    return gates, total


def _verdict(gate: Gate, estimate: Mapping[str, float | None]) -> tuple[Verdict, str]:
    value, low, high = estimate["value"], estimate["low"], estimate["high"]
    if value is None or not math.isfinite(value):
        return "fail", "the figure is not finite"
    if low is None or high is None:
        return "inconclusive", "one item is too few for an interval"
    if not (math.isfinite(low) and math.isfinite(high)):
        return "inconclusive", "the interval is not finite"
    least = -math.inf if gate.min is None else gate.min
    most = math.inf if gate.max is None else gate.max
    if low >= least and high <= most:
        return "pass", ""
    if high < least or low > most:
        return "fail", ""
    return "inconclusive", "the interval straddles the bound: more test text narrows it (--tokens)"


def _bound(gate: Gate) -> str:
    parts = [] if gate.min is None else [f"≥ {gate.min:g}"]
    return " and ".join(parts if gate.max is None else [*parts, f"≤ {gate.max:g}"]) or "none"
