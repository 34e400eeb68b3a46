"""How fast a classifier is against its baseline: batches of the same texts, in turns, each side in its own process."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from math import ceil
from typing import Any

import numpy as np

from lora2edge.bench.batches import ClassifyRun
from lora2edge.bench.process import Command, WorkerProcess
from lora2edge.bench.result import load_average, memory_ratio, notes_on
from lora2edge.bench.scenario import ClassifyScenario
from lora2edge.bench.statistics import Ratio, ratio_of_rounds, thin
from lora2edge.contracts import Encoded, Progress
from lora2edge.errors import Lora2EdgeError

_ROUNDS_WORTH_HAVING = 3

Round = Mapping[int, Mapping[str, ClassifyRun]]
"""Batch size → side → its run; both sides classified the same texts."""


@dataclass(frozen=True, slots=True)
class ClassifySide:
    """One side's figures."""

    latency_ms: Mapping[str, Mapping[str, float | int | None]]
    """Batch size → p50, p90, p99 and n of the time that a batch takes; encoding the text is not in it."""
    qps: Mapping[str, float]
    """Batch size → texts per second of wall time, over all rounds."""
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
    """Batch size → at most 400 of the batches' times in ms, evenly spaced in rank, for plots."""


@dataclass(frozen=True, slots=True)
class ClassifySpeed:
    """An artifact's speed beside its baseline's."""

    scenario: str
    artifact: ClassifySide
    baseline: ClassifySide
    qps_ratio: Mapping[str, Ratio | None]
    """Batch size → ratio; None where no round was complete at that size."""
    latency_ratio: Mapping[str, Ratio | None]
    """The same of the median times: baseline / artifact."""
    memory_ratio: Ratio | None
    load_ratio: Ratio
    rounds: int
    order: tuple[str, ...]
    warmup: int
    """Batches of each size and side that came before the first round and are in no figure."""
    failures: int
    texts: Mapping[str, int]
    """Batch size → measured texts of each side."""
    tokens: tuple[int, int, int]
    """Shortest, median and longest text sent."""
    seconds: float
    load_average: Mapping[str, float]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The artifact's figures at the top, the baseline's under `baseline`, then the ratios."""
        data = asdict(self)
        artifact = data.pop("artifact")
        return {**artifact, **data, "failures": self.failures, "artifact_failures": self.artifact.failures}


def bench_classifier(
    baseline: Command, artifact: Command, texts: Sequence[Encoded], scenario: ClassifyScenario, progress: Progress
) -> ClassifySpeed:
    """Measures both sides on the same `texts`, within `scenario.max_seconds` after loading.

    Raises Lora2EdgeError where a process dies, an open fails, or not one round could be finished.
    """
    load_before = load_average()
    sides: dict[str, WorkerProcess] = {}
    ready: dict[str, dict[str, Any]] = {}
    with ExitStack() as stack:
        for name, command in (("baseline", baseline), ("artifact", artifact)):
            sides[name] = stack.enter_context(WorkerProcess(name, command))
            ready[name] = sides[name].wait_ready(scenario.load_seconds)
        started = time.monotonic()
        counts, notes = _warm_up(sides, texts, scenario, started)
        rounds, failed, order = _rounds(sides, texts, scenario, counts, started, progress)
        seconds = time.monotonic() - started
        memory = {name: {**ready[name]["memory"], **side.quit()} for name, side in sides.items()}
    if not rounds:
        reasons = [reason for side in failed.values() for reason in side]
        raise Lora2EdgeError(
            "bench-no-round",
            f"not one round of the scenario {scenario.name!r} could be finished",
            why="; ".join(dict.fromkeys(reasons)) or f"max_seconds is {scenario.max_seconds:.0f}",
            hint=f"texts: {max(1, scenario.texts // 4)}",
        )
    results = {name: _summarize(name, rounds, ready[name], memory[name], failed[name]) for name in sides}
    old, new = results["baseline"], results["artifact"]
    lengths = sorted(len(text.ids) for text in texts)
    return ClassifySpeed(
        scenario=scenario.name,
        artifact=new,
        baseline=old,
        qps_ratio=_ratios(rounds, scenario, lambda pair: pair["artifact"].qps / pair["baseline"].qps),
        latency_ratio=_ratios(rounds, scenario, lambda pair: _median(pair["baseline"]) / _median(pair["artifact"])),
        memory_ratio=memory_ratio(old, new),
        load_ratio=Ratio(old.load_s / max(new.load_s, 1e-9), None, None),
        rounds=len(rounds),
        order=order,
        warmup=scenario.warmup,
        failures=old.failures + new.failures,
        texts={
            str(size): sum(len(each[size]["artifact"].batch_ms) * size for each in rounds if size in each)
            for size in scenario.batch_sizes
        },
        tokens=(lengths[0], lengths[len(lengths) // 2], lengths[-1]),
        seconds=seconds,
        load_average={"before": load_before, "after": load_average()},
        notes=tuple(notes + notes_on(results, load_before, len(rounds), scenario)),
    )


def _warm_up(
    sides: Mapping[str, WorkerProcess], texts: Sequence[Encoded], scenario: ClassifyScenario, started: float
) -> tuple[dict[int, int], list[str]]:
    """Runs what is in no figure; texts a round by batch size, fewer where its time says that not all would fit."""
    counts = {size: size * ceil(scenario.texts / size) for size in scenario.batch_sizes}
    seconds = 0.0
    for side in sides.values():
        for size in scenario.batch_sizes:
            warm = list(islice(cycle(texts), size * scenario.warmup))
            run = side.classify(warm, batch_size=size, max_seconds=_left(scenario, started))
            # The last batch alone: the first may have paged weights in.
            seconds += (run.batch_ms[-1] / 1000 if run.batch_ms else 0.0) * counts[size] / size
    affordable = _left(scenario, started) / _ROUNDS_WORTH_HAVING
    if seconds <= affordable:
        return counts, []
    note = (
        f"one batch of each size a round instead of {scenario.texts} texts: a round would take {seconds:.0f} s and "
        f"max_seconds is {scenario.max_seconds:.0f}"
    )
    return {size: size for size in scenario.batch_sizes}, [note]


def _rounds(
    sides: Mapping[str, WorkerProcess],
    texts: Sequence[Encoded],
    scenario: ClassifyScenario,
    counts: Mapping[int, int],
    started: float,
    progress: Progress,
) -> tuple[list[Round], dict[str, list[str]], tuple[str, ...]]:
    """Rounds without those that the budget cut, the reasons of failures by side, and the order of the sides."""
    rounds: list[Round] = []
    failed: dict[str, list[str]] = {name: [] for name in sides}
    order: list[str] = []
    supply = cycle(texts)
    longest = 0.0
    progress.start(f"bench {scenario.name}", scenario.rounds * len(scenario.batch_sizes) * 2, "runs")
    for number in range(scenario.rounds):
        if _left(scenario, started) < longest:
            break
        began = time.monotonic()
        names = list(sides) if number % 2 == 0 else list(sides)[::-1]
        this: dict[int, dict[str, ClassifyRun]] = {}
        for size in scenario.batch_sizes:
            chosen = list(islice(supply, counts[size]))
            this[size] = {}
            for name in names:
                left = _left(scenario, started)
                this[size][name] = sides[name].classify(chosen, batch_size=size, max_seconds=left)
                progress.advance()
        longest = max(longest, time.monotonic() - began)
        if any(run.cut_off for pair in this.values() for run in pair.values()):
            break
        for pair in this.values():
            for name, run in pair.items():
                failed[name] += [run.error] if run.error else []
        complete = {size: pair for size, pair in this.items() if not any(run.error for run in pair.values())}
        if complete:
            rounds.append(complete)
            order.append(" ".join(names))
    progress.finish()
    return rounds, failed, tuple(order)


def _summarize(
    name: str,
    rounds: Sequence[Round],
    ready: Mapping[str, Any],
    memory: Mapping[str, int | None],
    failed: Sequence[str],
) -> ClassifySide:
    latency, qps, samples = {}, {}, {}
    for size in sorted({size for each in rounds for size in each}):
        runs = [each[size][name] for each in rounds if size in each]
        times = [batch_ms for run in runs for batch_ms in run.batch_ms]
        latency[str(size)] = _percentiles(times)
        qps[str(size)] = len(times) * size / max(sum(run.wall_s for run in runs), 1e-9)
        samples[str(size)] = thin(times)
    return ClassifySide(
        latency_ms=latency,
        qps=qps,
        load_s=ready["load_s"],
        peak_rss_bytes=memory["peak_rss_bytes"],
        start_rss_bytes=memory["start_rss_bytes"],
        loaded_rss_bytes=memory["loaded_rss_bytes"],
        threads=ready["facts"]["threads"],
        facts=ready["facts"],
        failures=len(failed),
        failure_reasons=tuple(dict.fromkeys(failed)),
        samples=samples,
    )


def _percentiles(values: Sequence[float]) -> dict[str, float | int | None]:
    """`{"p50", "p90", "p99", "n"}` of `values`, linearly interpolated."""
    p50, p90, p99 = (float(value) for value in np.percentile(values, [50, 90, 99]))
    return {"p50": p50, "p90": p90, "p99": p99, "n": len(values)}


def _ratios(rounds: Sequence[Round], scenario: ClassifyScenario, ratio: Any) -> dict[str, Ratio | None]:
    found: dict[str, Ratio | None] = {}
    for size in scenario.batch_sizes:
        each = [ratio(measured[size]) for measured in rounds if size in measured]
        found[str(size)] = ratio_of_rounds(each) if each else None
    return found


def _median(run: ClassifyRun) -> float:
    return max(float(np.median(run.batch_ms)), 1e-6)


def _left(scenario: ClassifyScenario, started: float) -> float:
    return max(scenario.max_seconds - (time.monotonic() - started), 0.0)
