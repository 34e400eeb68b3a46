"""How fast a language model is against its baseline: the same requests, in turns, each side in its own process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle, islice
from math import ceil

from lora2edge.bench.load import Run
from lora2edge.bench.process import Command, WorkerProcess
from lora2edge.bench.result import SpeedResult, compare, summarize_side
from lora2edge.bench.scenario import Scenario
from lora2edge.bench.turns import ROUNDS_WORTH_HAVING, Budget, Load, Plan, take_turns
from lora2edge.contracts import Progress


def bench(
    baseline: Command,
    artifact: Command,
    requests: Sequence[Sequence[int]],
    scenario: Scenario,
    progress: Progress,
) -> SpeedResult:
    """Measures both sides on the same `requests` (token ids), as `take_turns` does."""

    def send(side: WorkerProcess, chosen: Sequence[Sequence[int]], level: int, seconds: float) -> Run:
        return side.run(chosen, concurrency=level, max_new=scenario.new_tokens, max_seconds=seconds)

    def warm_up(sides: Mapping[str, WorkerProcess], budget: Budget) -> Plan:
        """Runs what is in no figure, and from its time decides how many requests a round has."""
        seconds, top = 0.0, scenario.slots
        for side in sides.values():
            alone = send(side, list(islice(cycle(requests), scenario.warmup)), 1, budget.left)
            if top > 1:
                send(side, list(islice(cycle(requests), top)), top, budget.left)
            # The last one alone: the first may have paged weights in.
            seconds += alone.records[-1].seconds
        warmup = scenario.warmup + (top if top > 1 else 0)
        wanted = {level: level * ceil(scenario.requests / level) for level in scenario.concurrency}
        if sum(wanted.values()) * seconds <= budget.left / ROUNDS_WORTH_HAVING:
            return Plan(wanted, warmup)
        note = (
            f"one request a slot and round instead of {scenario.requests}: one takes {seconds:.1f} s on both "
            f"sides together and max_seconds is {scenario.max_seconds:.0f}"
        )
        return Plan({level: level for level in scenario.concurrency}, warmup, (note,))

    hint = f"new_tokens: {max(2, scenario.new_tokens // 4)}"
    # Level 1 gives the latencies.
    turns = take_turns(baseline, artifact, Load(requests, warm_up, send, needed=(1,)), scenario, hint, progress)
    old, new = (summarize_side(name, turns) for name in ("baseline", "artifact"))
    return compare(old, new, turns, scenario)
