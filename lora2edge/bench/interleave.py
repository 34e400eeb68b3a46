"""Baseline and artifact, each in its own process, measured in turns: A B, B A, A B, …

What the machine does meanwhile (turbo, heat, other people's work) then falls on both sides alike, and each round
is a pair. Only one of the two works at any time; both hold their memory all the time.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import cycle, islice
from math import ceil
from typing import Any

from lora2edge.bench.load import Run
from lora2edge.bench.process import Command, WorkerProcess
from lora2edge.bench.result import Round, SpeedResult, compare, load_average, notes_on, summarize_side
from lora2edge.bench.scenario import Scenario
from lora2edge.contracts import Progress
from lora2edge.errors import Lora2EdgeError

_ROUNDS_WORTH_HAVING = 3


@dataclass(slots=True)
class _Plan:
    """How much is sent, fixed after the warm-up and the same on both sides."""

    requests: dict[int, int]
    """Concurrency → requests a round."""
    notes: list[str] = field(default_factory=list)


def bench(
    baseline: Command,
    artifact: Command,
    requests: Sequence[Sequence[int]],
    scenario: Scenario,
    progress: Progress,
) -> SpeedResult:
    """Measures both sides on the same `requests` (token ids), within `scenario.max_seconds` after loading.

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
        plan, warmup = _warm_up(sides, requests, scenario, started)
        rounds, failed, order = _rounds(sides, requests, scenario, plan, started, progress)
        seconds = time.monotonic() - started
        memory = {name: {**ready[name]["memory"], **side.quit()} for name, side in sides.items()}
    if not rounds:
        reasons = [reason for side in failed.values() for reason in side]
        raise Lora2EdgeError(
            "bench-no-round",
            f"not one round of the scenario {scenario.name!r} could be finished",
            why="; ".join(dict.fromkeys(reasons)) or f"max_seconds is {scenario.max_seconds:.0f}",
            hint=f"new_tokens: {max(2, scenario.new_tokens // 4)}",
        )
    results = {name: summarize_side(name, rounds, ready[name], memory[name], failed[name]) for name in sides}
    notes = plan.notes + notes_on(results, load_before, len(rounds), scenario)
    return compare(results, rounds, order, scenario, warmup, seconds, load_before, notes)


def _warm_up(
    sides: Mapping[str, WorkerProcess], requests: Sequence[Sequence[int]], scenario: Scenario, started: float
) -> tuple[_Plan, int]:
    """Runs what is in no figure, and from its time decides how many requests a round has."""
    seconds = 0.0
    top = scenario.slots
    for side in sides.values():
        alone = side.run(
            list(islice(cycle(requests), scenario.warmup)),
            concurrency=1,
            max_new=scenario.new_tokens,
            max_seconds=_left(scenario, started),
        )
        if top > 1:
            side.run(
                list(islice(cycle(requests), top)),
                concurrency=top,
                max_new=scenario.new_tokens,
                max_seconds=_left(scenario, started),
            )
        # The last one alone: the first may have paged weights in.
        seconds += alone.records[-1].seconds
    wanted = {level: level * ceil(scenario.requests / level) for level in scenario.concurrency}
    affordable = _left(scenario, started) / _ROUNDS_WORTH_HAVING
    plan = _Plan(wanted)
    if sum(wanted.values()) * seconds > affordable:
        plan.requests = {level: level for level in scenario.concurrency}
        plan.notes.append(
            f"one request a slot and round instead of {scenario.requests}: one takes {seconds:.1f} s on both "
            f"sides together and max_seconds is {scenario.max_seconds:.0f}"
        )
    return plan, scenario.warmup + (top if top > 1 else 0)


def _rounds(
    sides: Mapping[str, WorkerProcess],
    requests: Sequence[Sequence[int]],
    scenario: Scenario,
    plan: _Plan,
    started: float,
    progress: Progress,
) -> tuple[list[Round], dict[str, list[str]], tuple[str, ...]]:
    """Complete rounds, the reasons of failed requests by side, and the order of the sides in each round."""
    rounds: list[Round] = []
    failed: dict[str, list[str]] = {name: [] for name in sides}
    order: list[str] = []
    supply = cycle(requests)
    longest = 0.0
    progress.start(f"bench {scenario.name}", scenario.rounds * len(scenario.concurrency) * 2, "runs")
    for number in range(scenario.rounds):
        if _left(scenario, started) < longest:
            break
        began = time.monotonic()
        names = list(sides) if number % 2 == 0 else list(sides)[::-1]
        this: dict[int, dict[str, Run]] = {}
        for level in scenario.concurrency:
            batch = list(islice(supply, plan.requests[level]))
            this[level] = {}
            for name in names:
                run = sides[name].run(
                    batch,
                    concurrency=level,
                    max_new=scenario.new_tokens,
                    max_seconds=_left(scenario, started),
                )
                this[level][name] = run
                progress.advance()
        longest = max(longest, time.monotonic() - began)
        runs = [run for level in this.values() for run in level.values()]
        if any(run.cut_off for run in runs):
            break  # the budget ended inside this round: it is no pair
        for pair in this.values():
            for name, run in pair.items():
                failed[name] += [record.error or "" for record in run.failed]
        # A level where a request failed on either side is no pair; level 1 gives the latencies.
        complete = {level: pair for level, pair in this.items() if not any(run.failed for run in pair.values())}
        if 1 in complete:
            rounds.append(complete)
            order.append(" ".join(names))
    progress.finish()
    return rounds, failed, tuple(order)


def _left(scenario: Scenario, started: float) -> float:
    return max(scenario.max_seconds - (time.monotonic() - started), 0.0)
