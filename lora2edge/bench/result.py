"""What a measurement of a language model comes to: each side's figures, and their ratios over paired rounds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lora2edge.bench.load import Run
from lora2edge.bench.scenario import Scenario
from lora2edge.bench.sides import Comparison, Side, compare_sides, process_figures, spread_of
from lora2edge.bench.statistics import Ratio, geometric_mean, percentiles, ratio_of_rounds, thin
from lora2edge.bench.turns import Turns


@dataclass(frozen=True, slots=True, kw_only=True)
class SideResult(Side):
    """One side's figures, levels being concurrencies. Latencies are of requests sent one at a time."""

    ttft_ms: Mapping[str, float | int | None]
    """p50, p95, p99 and n of the time from sending to the first token."""
    itl_ms: Mapping[str, float | int | None]
    """p50, p95, p99 and n of the time from one token to the next."""
    decode_tps: float
    """Median over requests of (tokens − 1) / (last token − first token), per second."""
    prefill_tps: float
    """Median over requests of prompt tokens / time to first token, per second."""
    output_tps: Mapping[str, float]
    """Concurrency → generated tokens per second of wall time, over all slots and rounds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedResult(Comparison):
    """An artifact's speed beside its baseline's."""

    artifact: SideResult
    baseline: SideResult
    decode_ratio: Ratio
    ttft_ratio: Ratio
    itl_ratio: Ratio
    requests: Mapping[str, int]
    """Concurrency → measured requests of each side."""
    prompt_tokens: tuple[int, int, int]
    """Shortest, median and longest prompt sent."""
    new_tokens: int


def summarize_side(name: str, turns: Turns[Run]) -> SideResult:
    alone = [record for measured in turns.rounds for record in measured[1][name].done]
    itl = [gap for record in alone for gap in record.itl_ms]
    ttft = [record.ttft_ms for record in alone]
    qps, output_tps = {}, {}
    for level in sorted({level for measured in turns.rounds for level in measured}):
        runs = [measured[level][name] for measured in turns.rounds if level in measured]
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
        samples={"itl_ms": thin(itl), "ttft_ms": thin(ttft)},
        **process_figures(name, turns),
    )


def compare(baseline: SideResult, artifact: SideResult, turns: Turns[Run], scenario: Scenario) -> SpeedResult:
    alone = [measured[1] for measured in turns.rounds]
    return SpeedResult(
        decode_ratio=ratio_of_rounds([_paired(pair, "decode_tps", better_is_higher=True) for pair in alone]),
        ttft_ratio=ratio_of_rounds([_paired(pair, "ttft_ms", better_is_higher=False) for pair in alone]),
        itl_ratio=ratio_of_rounds([_median_itl(pair["baseline"]) / _median_itl(pair["artifact"]) for pair in alone]),
        requests={
            str(level): sum(len(measured[level]["artifact"].records) for measured in turns.rounds if level in measured)
            for level in scenario.concurrency
        },
        prompt_tokens=spread_of([record.prompt_tokens for pair in alone for record in pair["artifact"].done]),
        new_tokens=scenario.new_tokens,
        **compare_sides(baseline, artifact, turns, scenario),
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
