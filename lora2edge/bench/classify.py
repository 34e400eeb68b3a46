"""How fast a classifier is against its baseline: batches of the same texts, in turns, each side in its own process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from math import ceil

import numpy as np

from lora2edge.bench.batches import ClassifyRun
from lora2edge.bench.process import Command, WorkerProcess
from lora2edge.bench.scenario import ClassifyScenario
from lora2edge.bench.sides import Comparison, Side, compare_sides, process_figures, spread_of
from lora2edge.bench.statistics import Ratio, ratio_of_rounds, thin
from lora2edge.bench.turns import ROUNDS_WORTH_HAVING, Budget, Load, Plan, Turns, take_turns
from lora2edge.contracts import Encoded, Progress


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassifySide(Side):
    """One side's figures, levels being sizes of batches."""

    latency_ms: Mapping[str, Mapping[str, float | int | None]]
    """Batch size → p50, p90, p99 and n of the time that a batch takes; encoding the text is not in it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassifySpeed(Comparison):
    """An artifact's speed beside its baseline's."""

    artifact: ClassifySide
    baseline: ClassifySide
    latency_ratio: Mapping[str, Ratio | None]
    """As `qps_ratio`, of the median times: baseline / artifact."""
    texts: Mapping[str, int]
    """Batch size → measured texts of each side."""
    tokens: tuple[int, int, int]
    """Shortest, median and longest text sent."""


def bench_classifier(
    baseline: Command, artifact: Command, texts: Sequence[Encoded], scenario: ClassifyScenario, progress: Progress
) -> ClassifySpeed:
    """Measures both sides on the same `texts`, as `take_turns` does."""

    def send(side: WorkerProcess, chosen: Sequence[Encoded], size: int, seconds: float) -> ClassifyRun:
        return side.classify(chosen, batch_size=size, max_seconds=seconds)

    def warm_up(sides: Mapping[str, WorkerProcess], budget: Budget) -> Plan:
        """Runs what is in no figure, and from its time decides how many batches a round has."""
        wanted = {size: size * ceil(scenario.texts / size) for size in scenario.batch_sizes}
        seconds = 0.0
        for side in sides.values():
            for size in scenario.batch_sizes:
                run = send(side, list(islice(cycle(texts), size * scenario.warmup)), size, budget.left)
                # The last batch alone: the first may have paged weights in.
                seconds += (run.batch_ms[-1] / 1000 if run.batch_ms else 0.0) * wanted[size] / size
        if seconds <= budget.left / ROUNDS_WORTH_HAVING:
            return Plan(wanted, scenario.warmup)
        note = (
            f"one batch of each size a round instead of {scenario.texts} texts: a round would take {seconds:.0f} s and "
            f"max_seconds is {scenario.max_seconds:.0f}"
        )
        return Plan({size: size for size in scenario.batch_sizes}, scenario.warmup, (note,))

    hint = f"texts: {max(1, scenario.texts // 4)}"
    turns = take_turns(baseline, artifact, Load(texts, warm_up, send), scenario, hint, progress)
    old, new = (_summarize(name, turns) for name in ("baseline", "artifact"))
    return ClassifySpeed(
        latency_ratio={str(size): _latency_ratio(turns, size) for size in scenario.batch_sizes},
        texts={
            str(size): sum(len(each[size]["artifact"].batch_ms) * size for each in turns.rounds if size in each)
            for size in scenario.batch_sizes
        },
        tokens=spread_of([len(text.ids) for text in texts]),
        **compare_sides(old, new, turns, scenario),
    )


def _summarize(name: str, turns: Turns[ClassifyRun]) -> ClassifySide:
    latency, qps, samples = {}, {}, {}
    for size in sorted({size for each in turns.rounds for size in each}):
        runs = [each[size][name] for each in turns.rounds if size in each]
        times = [batch_ms for run in runs for batch_ms in run.batch_ms]
        latency[str(size)] = _percentiles(times)
        qps[str(size)] = len(times) * size / max(sum(run.wall_s for run in runs), 1e-9)
        samples[str(size)] = thin(times)
    return ClassifySide(latency_ms=latency, qps=qps, samples=samples, **process_figures(name, turns))


def _percentiles(values: Sequence[float]) -> dict[str, float | int | None]:
    """`{"p50", "p90", "p99", "n"}` of `values`, linearly interpolated."""
    p50, p90, p99 = (float(value) for value in np.percentile(values, [50, 90, 99]))
    return {"p50": p50, "p90": p90, "p99": p99, "n": len(values)}


def _latency_ratio(turns: Turns[ClassifyRun], size: int) -> Ratio | None:
    pairs = [each[size] for each in turns.rounds if size in each]
    return ratio_of_rounds([_median(pair["baseline"]) / _median(pair["artifact"]) for pair in pairs]) if pairs else None


def _median(run: ClassifyRun) -> float:
    return max(float(np.median(run.batch_ms)), 1e-6)
