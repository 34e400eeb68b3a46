"""What a measurement of two sides comes to, whatever was sent to them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lora2edge.bench.scenario import LoadPattern
from lora2edge.bench.statistics import Ratio, ratio_of_rounds
from lora2edge.bench.turns import AnyRun, Turns, load_average

_BUSY = 0.5
"""Load average per core above which figures are taken with a warning."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One side's figures. A level is a concurrency, or the size of a batch."""

    qps: Mapping[str, float]
    """Level → completed requests, or texts, per second of wall time, over all rounds."""
    load_s: float
    peak_rss_bytes: int | None
    """Largest resident memory of the process in its whole life: Python and its libraries included."""
    start_rss_bytes: int | None
    loaded_rss_bytes: int | None
    threads: int
    facts: Mapping[str, Any]
    failures: int
    failure_reasons: tuple[str, ...]
    samples: Mapping[str, list[float]]
    """Of times in ms, at most 400 values each, evenly spaced in rank, for plots."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """An artifact's speed beside its baseline's."""

    scenario: str
    artifact: Side
    baseline: Side
    qps_ratio: Mapping[str, Ratio | None]
    """Level → ratio; None where no round was complete at that level."""
    memory_ratio: Ratio | None
    """None where the two sides run on different devices, or the kernel does not say."""
    load_ratio: Ratio
    rounds: int
    order: tuple[str, ...]
    warmup: int
    """Requests of each side, or batches of each size and side, that came before the first round: in no figure."""
    failures: int
    seconds: float
    load_average: Mapping[str, float]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The artifact's figures at the top, the baseline's under `baseline`, then the ratios."""
        data = asdict(self)
        artifact = data.pop("artifact")
        return {**artifact, **data, "failures": self.failures, "artifact_failures": self.artifact.failures}


def process_figures(name: str, turns: Turns[Any]) -> dict[str, Any]:
    """The fields of `Side` that its process tells."""
    ready, memory, failed = turns.ready[name], turns.memory[name], turns.failed[name]
    return {
        "load_s": ready["load_s"],
        "peak_rss_bytes": memory["peak_rss_bytes"],
        "start_rss_bytes": memory["start_rss_bytes"],
        "loaded_rss_bytes": memory["loaded_rss_bytes"],
        "threads": ready["facts"]["threads"],
        "facts": ready["facts"],
        "failures": len(failed),
        "failure_reasons": tuple(dict.fromkeys(failed)),
    }


def compare_sides(baseline: Side, artifact: Side, turns: Turns[Any], scenario: LoadPattern) -> dict[str, Any]:
    """The fields of `Comparison`."""
    results = {"baseline": baseline, "artifact": artifact}
    ratios: dict[str, Ratio | None] = {}
    for level in turns.plan.items:
        each = [_qps_ratio(measured[level]) for measured in turns.rounds if level in measured]
        ratios[str(level)] = ratio_of_rounds(each) if each else None
    return {
        "scenario": scenario.name,
        **results,
        "qps_ratio": ratios,
        "memory_ratio": _memory_ratio(baseline, artifact),
        "load_ratio": Ratio(baseline.load_s / max(artifact.load_s, 1e-9), None, None),
        "rounds": len(turns.rounds),
        "order": turns.order,
        "warmup": turns.plan.warmup,
        "failures": baseline.failures + artifact.failures,
        "seconds": turns.seconds,
        "load_average": {"before": turns.load_before, "after": load_average()},
        "notes": (*turns.plan.notes, *_notes_on(results, turns.load_before, len(turns.rounds), scenario)),
    }


def spread_of(lengths: Sequence[int]) -> tuple[int, int, int]:
    """Shortest, median and longest."""
    ordered = sorted(lengths)
    return ordered[0], ordered[len(ordered) // 2], ordered[-1]


def _qps_ratio(pair: Mapping[str, AnyRun]) -> float:
    return pair["artifact"].qps / pair["baseline"].qps


def _memory_ratio(baseline: Side, artifact: Side) -> Ratio | None:
    """Peak of the baseline / of the artifact; None on different devices, or where the kernel does not say."""
    if baseline.facts["device"] != artifact.facts["device"]:
        return None
    if not baseline.peak_rss_bytes or not artifact.peak_rss_bytes:
        return None
    return Ratio(baseline.peak_rss_bytes / artifact.peak_rss_bytes, None, None)


def _notes_on(results: Mapping[str, Side], load: float, rounds: int, scenario: LoadPattern) -> list[str]:
    """What a reader of the figures should know: missing rounds, a busy machine, other devices, failures."""
    baseline, artifact = results["baseline"], results["artifact"]
    cores = len(os.sched_getaffinity(0))
    notes = []
    if rounds < scenario.rounds:
        notes.append(
            f"{rounds} of {scenario.rounds} rounds: others failed or did not fit into {scenario.max_seconds:.0f} s"
        )
    if load > _BUSY * cores:
        notes.append(f"the machine was busy before: load average {load:.2f} on {cores} cores")
    if baseline.facts["device"] != artifact.facts["device"]:
        notes.append(
            f"the baseline ran on {baseline.facts['device']}, the artifact on {artifact.facts['device']}: "
            "no memory ratio, and the other ratios compare the devices too"
        )
    elif baseline.threads != artifact.threads:
        notes.append(f"the baseline used {baseline.threads} threads, the artifact {artifact.threads}")
    if "cuda" in f"{baseline.facts['device']} {artifact.facts['device']}":
        notes.append("memory is that of the host: what lies on the GPU is not in it")
    for name, side in results.items():
        if side.failures:
            notes.append(f"{name}: {side.failures} failed requests ({'; '.join(side.failure_reasons)})")
    return notes
