"""What a measurement comes to: each side's figures, and their ratios over paired rounds."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from lora2edge.bench.load import Run
from lora2edge.bench.scenario import LoadPattern, Scenario
from lora2edge.bench.statistics import Ratio, geometric_mean, percentiles, ratio_of_rounds, thin

_BUSY = 0.5
"""Load average per core above which figures are taken with a warning."""

Round = Mapping[int, Mapping[str, Run]]
"""Concurrency → side → its run; both sides ran the same requests."""


class AnySide(Protocol):
    """What one side has, whatever was sent to it."""

    @property
    def peak_rss_bytes(self) -> int | None: ...
    @property
    def threads(self) -> int: ...
    @property
    def facts(self) -> Mapping[str, Any]: ...
    @property
    def failures(self) -> int: ...
    @property
    def failure_reasons(self) -> tuple[str, ...]: ...


@dataclass(frozen=True, slots=True)
class SideResult:
    """One side's figures. Latencies are of requests sent one at a time (concurrency 1)."""

    ttft_ms: Mapping[str, float | int | None]
    """p50, p95, p99 and n of the time from sending to the first token."""
    itl_ms: Mapping[str, float | int | None]
    """p50, p95, p99 and n of the time from one token to the next."""
    decode_tps: float
    """Median over requests of (tokens − 1) / (last token − first token), per second."""
    prefill_tps: float
    """Median over requests of prompt tokens / time to first token, per second."""
    qps: Mapping[str, float]
    """Concurrency → completed requests per second of wall time, over all rounds."""
    output_tps: Mapping[str, float]
    """Concurrency → generated tokens per second of wall time, over all slots and rounds."""
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
    """`itl_ms` and `ttft_ms`: at most 400 values each, evenly spaced in rank, for plots."""


@dataclass(frozen=True, slots=True)
class SpeedResult:
    """An artifact's speed beside its baseline's."""

    scenario: str
    artifact: SideResult
    baseline: SideResult
    decode_ratio: Ratio
    ttft_ratio: Ratio
    itl_ratio: Ratio
    qps_ratio: Mapping[str, Ratio | None]
    """Concurrency → ratio; None where no round was complete at that level."""
    memory_ratio: Ratio | None
    """None where the two sides run on different devices, or the kernel does not say."""
    load_ratio: Ratio
    rounds: int
    order: tuple[str, ...]
    warmup: int
    """Requests of each side that came before the first round and are in no figure."""
    failures: int
    requests: Mapping[str, int]
    """Concurrency → measured requests of each side."""
    prompt_tokens: tuple[int, int, int]
    """Shortest, median and longest prompt sent."""
    new_tokens: int
    seconds: float
    load_average: Mapping[str, float]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The artifact's figures at the top, the baseline's under `baseline`, then the ratios."""
        data = asdict(self)
        artifact = data.pop("artifact")
        return {**artifact, **data, "failures": self.failures, "artifact_failures": self.artifact.failures}


def summarize_side(
    name: str,
    rounds: Sequence[Round],
    ready: Mapping[str, Any],
    memory: Mapping[str, int | None],
    failed: Sequence[str],
) -> SideResult:
    alone = [record for measured in rounds for record in measured[1][name].done]
    itl = [gap for record in alone for gap in record.itl_ms]
    ttft = [record.ttft_ms for record in alone]
    qps, output_tps = {}, {}
    for level in sorted({level for measured in rounds for level in measured}):
        runs = [measured[level][name] for measured in rounds if level in measured]
        wall_s = max(sum(run.wall_s for run in runs), 1e-9)
        qps[str(level)] = sum(len(run.done) for run in runs) / wall_s
        output_tps[str(level)] = sum(len(record.token_ms) for run in runs for record in run.done) / wall_s
    return SideResult(
        ttft_ms=percentiles(ttft),
        itl_ms=percentiles(itl),
        decode_tps=float(percentiles([record.decode_tps for record in alone])["p50"] or 0.0),
        prefill_tps=float(
            percentiles([record.prompt_tokens * 1000 / max(record.ttft_ms, 1e-6) for record in alone])["p50"] or 0.0
        ),
        qps=qps,
        output_tps=output_tps,
        load_s=ready["load_s"],
        peak_rss_bytes=memory["peak_rss_bytes"],
        start_rss_bytes=memory["start_rss_bytes"],
        loaded_rss_bytes=memory["loaded_rss_bytes"],
        threads=ready["facts"]["threads"],
        facts=ready["facts"],
        failures=len(failed),
        failure_reasons=tuple(dict.fromkeys(failed)),
        samples={"itl_ms": thin(itl), "ttft_ms": thin(ttft)},
    )


def compare(
    results: Mapping[str, SideResult],
    rounds: Sequence[Round],
    order: tuple[str, ...],
    scenario: Scenario,
    warmup: int,
    seconds: float,
    load_before: float,
    notes: Sequence[str],
) -> SpeedResult:
    baseline, artifact = results["baseline"], results["artifact"]
    qps_ratio: dict[str, Ratio | None] = {}
    for level in scenario.concurrency:
        pairs = [measured[level] for measured in rounds if level in measured]
        ratios = [pair["artifact"].qps / pair["baseline"].qps for pair in pairs]
        qps_ratio[str(level)] = ratio_of_rounds(ratios) if ratios else None
    alone = [measured[1] for measured in rounds]
    lengths = sorted(record.prompt_tokens for pair in alone for record in pair["artifact"].done)
    sent = {
        str(level): sum(len(measured[level]["artifact"].records) for measured in rounds if level in measured)
        for level in scenario.concurrency
    }
    return SpeedResult(
        scenario=scenario.name,
        artifact=artifact,
        baseline=baseline,
        decode_ratio=ratio_of_rounds([_paired(pair, "decode_tps", better_is_higher=True) for pair in alone]),
        ttft_ratio=ratio_of_rounds([_paired(pair, "ttft_ms", better_is_higher=False) for pair in alone]),
        itl_ratio=ratio_of_rounds([_median_itl(pair["baseline"]) / _median_itl(pair["artifact"]) for pair in alone]),
        qps_ratio=qps_ratio,
        memory_ratio=memory_ratio(baseline, artifact),
        load_ratio=Ratio(baseline.load_s / max(artifact.load_s, 1e-9), None, None),
        rounds=len(rounds),
        order=order,
        warmup=warmup,
        failures=baseline.failures + artifact.failures,
        requests=sent,
        prompt_tokens=(lengths[0], lengths[len(lengths) // 2], lengths[-1]),
        new_tokens=scenario.new_tokens,
        seconds=seconds,
        load_average={"before": load_before, "after": load_average()},
        notes=tuple(notes),
    )


def _paired(pair: Mapping[str, Run], figure: str, *, better_is_higher: bool) -> float:
    """Geometric mean over requests of the two sides' ratio, each request against itself."""
    ratios = []
    for old, new in zip(pair["baseline"].records, pair["artifact"].records, strict=True):
        before, after = getattr(old, figure), getattr(new, figure)
        ratios.append(after / before if better_is_higher else before / after)
    return geometric_mean(ratios)


def _median_itl(run: Run) -> float:
    gaps = [gap for record in run.done for gap in record.itl_ms]
    return max(float(percentiles(gaps)["p50"] or 0.0), 1e-6)


def memory_ratio(baseline: AnySide, artifact: AnySide) -> Ratio | None:
    """Peak of the baseline / of the artifact; None on different devices, or where the kernel does not say."""
    if baseline.facts["device"] != artifact.facts["device"]:
        return None
    if not baseline.peak_rss_bytes or not artifact.peak_rss_bytes:
        return None
    return Ratio(baseline.peak_rss_bytes / artifact.peak_rss_bytes, None, None)


def notes_on(results: Mapping[str, AnySide], load: float, rounds: int, scenario: LoadPattern) -> list[str]:
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


def load_average() -> float:
    """Over the last minute; the workers themselves are in the figure after a measurement, not in that before."""
    return os.getloadavg()[0]
