"""What a reader of the report should not miss, as sentences, drawn from its figures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lora2edge.report import classifier, words

_ACCURACY_DROP = 0.05
_KEPT_LITTLE = 0.9

Tone = Literal["fail", "warn", "note"]


@dataclass(frozen=True, slots=True)
class Finding:
    tone: Tone
    subject: str
    """The target's name, or the stage's."""
    text: str


def headline(report: Mapping[str, Any]) -> str:
    """The verdict in one sentence."""
    targets = report["targets"]
    by_verdict = {
        verdict: [name for name, target in targets.items() if target["verdict"] == verdict]
        for verdict in ("pass", "fail", "inconclusive")
    }
    if (report.get("merge") or {}).get("verdict") == "fail":
        return "The merged model does not answer like base + live adapter."
    if by_verdict["fail"]:
        return f"{len(by_verdict['fail'])} of {len(targets)} targets failed: {', '.join(by_verdict['fail'])}."
    if report["verdict"] == "fail":
        return "The build failed."
    if report["verdict"] == "inconclusive":
        names = ", ".join(by_verdict["inconclusive"]) or "The build"
        return f"{names}: the interval straddles a bound. More test data would decide it."
    gated = [
        name
        for name, target in targets.items()
        if any(gate["verdict"] != "not applicable" for gate in target.get("gates", []))
    ]
    if not gated:
        return f"{len(targets)} of {len(targets)} targets were built. No gate was set."
    return f"{len(targets)} of {len(targets)} targets were built and met every gate that fails a build."


def find(report: Mapping[str, Any]) -> list[Finding]:
    """All findings, the gravest first; in the report's order within one tone."""
    found = [*_of_the_build(report)]
    for name, target in report["targets"].items():
        found += _of_a_target(name, target, report)
    rank = {"fail": 0, "warn": 1, "note": 2}
    return sorted(found, key=lambda finding: rank[finding.tone])


def _of_the_build(report: Mapping[str, Any]) -> Iterator[Finding]:
    merge, unit = report.get("merge"), words.unit(report)
    if merge and merge.get("verdict", "pass") != "pass":
        tone: Tone = "fail" if merge["verdict"] == "fail" else "warn"
        yield Finding(
            tone,
            "merge",
            f"KL {words.figure(merge['kl_mean'])} nats per {unit} against base + live adapter, "
            f"{words.same_top(unit)} at {words.percent(merge['top1_agreement'], 2)} of {merge['positions']} "
            f"{words.scored(unit)}.",
        )
    if chosen := report.get("merge_base"):
        told = chosen["measured"]
        yield Finding("warn" if told and not told["decided"] else "note", "merge", _sentence(chosen, unit))
    if merge is None:
        yield Finding("warn", "merge", "There is no merge proof in this report.")
    if merge and merge.get("reference"):
        method = (report["inputs"].get("combine") or {}).get("method", "sum")
        yield Finding(
            "note",
            "baseline",
            f"There is {merge['reference']} of {method}, because PEFT computes nothing live that equals it for these "
            "adapters. The baseline is their merge, unrounded; the merge proof holds for each adapter alone.",
        )
    baseline = report.get("baseline")
    if baseline is None:
        yield Finding("warn", "baseline", "The baseline was not measured: there is nothing to compare with.")
    elif baseline.get("gain") and (baseline["gain"].get("low") or baseline["gain"]["value"]) <= 0:
        yield Finding(
            "warn",
            "adapter",
            f"The adapter did not clearly lower the loss on the test data: gain "
            f"{words.figure(baseline['gain']['value'])} {words.interval(baseline['gain'])} nats per {unit}.",
        )
    for path in report.get("not_finite", []):
        yield Finding("fail", path, "This figure was infinite or not a number; report.json holds null for it.")


def _sentence(chosen: Mapping[str, Any], unit: str) -> str:
    return ". ".join(words.merge_base_lines(chosen, unit)) + "."


def _of_a_target(name: str, target: Mapping[str, Any], report: Mapping[str, Any]) -> Iterator[Finding]:
    error = target.get("error")
    if error:
        yield Finding("fail", name, _sentences(error["what"], error.get("why", ""), _try(error.get("hint", ""))))
        return
    yield from _of_gates(name, target)
    quality = target.get("quality")
    if quality is None:
        yield Finding("warn", name, _sentences("Quality was not measured", target.get("quality_reason", "")))
    else:
        told = any(gate["metric"] == "gain_kept" and gate["value"] is None for gate in target.get("gates", []))
        if quality.get("gain_kept") is None and not told:
            yield Finding("warn", name, _sentences("No gain kept", quality.get("gain_kept_reason", "")))
        baseline = report.get("baseline") or {}
        if "by_class" in quality:
            yield from (Finding("warn", name, text) for text in classifier.of_classes(quality, baseline))
        else:
            yield from _of_accuracy(name, quality, baseline)
    for note in ((target.get("lowering") or {}).get("notes") or {}).get("notes") or ():
        yield Finding("note", name, f"{note[:1].upper()}{note[1:]}.")
    yield from _of_tokenizer(name, target.get("tokenizer"))
    yield from _of_damage(name, target.get("damage") or [])
    yield from _of_speed(name, target)
    for stage, reused in (target.get("reused") or {}).items():
        if reused and stage != "lower":
            when = (target.get("measured_at") or {}).get(stage, "an earlier build")
            yield Finding("note", name, f"The {stage} figures were taken earlier ({when}) and used again.")


def _of_gates(name: str, target: Mapping[str, Any]) -> Iterator[Finding]:
    if all(gate["verdict"] == "not applicable" for gate in target.get("gates", [])):
        yield Finding("note", name, "No gates: this target could not fail on quality.")
    for gate in target.get("gates", []):
        if gate["verdict"] == "pass":
            continue
        if gate["verdict"] == "not applicable":
            label = words.METRIC_NAMES.get(gate["metric"], gate["metric"])
            yield Finding("note", name, _sentences(f"The gate on {label} does not apply", gate["reason"]))
            continue
        tone: Tone = "fail" if gate["verdict"] == "fail" and gate["action"] == "fail" else "warn"
        how = "misses" if gate["verdict"] == "fail" else "may or may not meet"
        label = words.METRIC_NAMES.get(gate["metric"], gate["metric"])
        if gate["value"] is None:
            text = f"{label} was not measured"
        else:
            figure = words.metric(gate["metric"], gate["value"])
            ends = words.metric_interval(gate["metric"], gate)
            bound = words.bound(gate["metric"], gate["bound"])
            text = f"{label} {figure}{ends and ' '}{ends} {how} the bound {bound}"
        after = " (this gate only warns)" if gate["action"] == "warn" else ""
        yield Finding(tone, name, _sentences(text + after, gate.get("reason", "")))


def _of_accuracy(name: str, quality: Mapping[str, Any], baseline: Mapping[str, Any]) -> Iterator[Finding]:
    for label, values in (quality.get("accuracy_by") or {}).items():
        before = (baseline.get("accuracy_by") or {}).get(label, {})
        fallen = [
            f"{words.visible(value)} ({words.percent(before[value])} → {words.percent(accuracy)})"
            for value, accuracy in values.items()
            if value in before and before[value] - accuracy > _ACCURACY_DROP
        ]
        if fallen:
            drop = f"{_ACCURACY_DROP * 100:.0f} points"
            yield Finding("warn", name, f"Accuracy fell by more than {drop} where {label} is {', '.join(fallen)}.")


def _of_tokenizer(name: str, tokenizer: Mapping[str, Any] | None) -> Iterator[Finding]:
    if tokenizer is None:
        return
    kinds = [item["kind"] for item in tokenizer["differences"] if not item["mended"]]
    if kinds:
        yield Finding(
            "note",
            name,
            f"The runtime's tokenizer differs on awkward texts ({', '.join(kinds)}): see Tokenizer. "
            f"All {tokenizer['own_texts']} of your own were equal.",
        )


def _of_damage(name: str, damage: list[Mapping[str, Any]]) -> Iterator[Finding]:
    adapted = [item for item in damage if item.get("delta_kept") is not None]
    little = [item for item in adapted if item["delta_kept"] < _KEPT_LITTLE]
    drowned = [item for item in adapted if (item.get("delta_noise") or 0) > 1]
    if little:
        worst = min(little, key=lambda item: item["delta_kept"])
        yield Finding(
            "warn",
            name,
            f"{len(little)} of {len(adapted)} adapted weights kept less than {words.percent(_KEPT_LITTLE, 0)} of "
            f"the adapter's change; the least: {worst['name']} with {words.percent(worst['delta_kept'])}.",
        )
    if drowned:
        yield Finding(
            "note",
            name,
            f"In {len(drowned)} of {len(adapted)} adapted weights the rounding is larger than the adapter's "
            "change. That alone is no fault: the change has a direction, the rounding has none. Gain kept decides.",
        )


def _of_speed(name: str, target: Mapping[str, Any]) -> Iterator[Finding]:
    speed = target.get("speed")
    if speed is None:
        yield Finding("note", name, _sentences("Speed was not measured", target.get("speed_reason", "")))
        return
    if "latency_ms" in speed:
        yield from (Finding("warn", name, text) for text in classifier.of_speed(name, speed))
    else:
        yield from _of_generation(name, speed)
    for note in speed.get("notes", []):
        yield Finding("warn" if "fail" in note or "busy" in note else "note", name, f"Speed: {note}.")


def _of_generation(name: str, speed: Mapping[str, Any]) -> Iterator[Finding]:
    for level, ratio in speed["qps_ratio"].items():
        if ratio and (ratio.get("high") or ratio["value"]) < 1:
            yield Finding(
                "warn",
                name,
                f"Slower than the baseline at {level} concurrent request{'s' if level != '1' else ''}: "
                f"{words.times(ratio['value'])} {words.interval(ratio)} of its requests per second.",
            )
    for label, key in (("Decoding", "decode_ratio"), ("The first token", "ttft_ratio")):
        ratio = speed[key]
        if (ratio.get("high") or ratio["value"]) < 1:
            yield Finding(
                "warn",
                name,
                f"{label} is slower than the baseline's: {words.times(ratio['value'])} {words.interval(ratio)}.",
            )


def _sentences(*parts: str) -> str:
    """The non-empty parts, each with a capital letter and a full stop."""
    ended = (part if part.endswith((".", "!", "?")) else f"{part}." for part in parts if part)
    return " ".join(part[0].upper() + part[1:] for part in ended)


def _try(hint: str) -> str:
    return f"Try: {hint}" if hint else ""
