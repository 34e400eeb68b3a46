"""Baseline and artifact, each in its own process, measured in turns: A B, B A, A B, …

What the machine does meanwhile (turbo, heat, other people's work) then falls on both sides alike, and each round
is a pair. Only one of the two works at any time; both hold their memory all the time.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any, Generic, Protocol, TypeVar

from lora2edge.bench.process import Command, WorkerProcess
from lora2edge.bench.scenario import LoadPattern
from lora2edge.contracts import Progress
from lora2edge.errors import Lora2EdgeError

ROUNDS_WORTH_HAVING = 3
"""Where the budget has no room for as many, less is sent in each."""


class AnyRun(Protocol):
    """One recorded execution, whatever was sent."""

    @property
    def cut_off(self) -> bool: ...
    @property
    def qps(self) -> float: ...
    @property
    def errors(self) -> list[str]:
        """Why not all of it was done."""
        ...


R = TypeVar("R", bound=AnyRun)


class Budget:
    """The time of the warm-up and all rounds."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._started = seconds, time.monotonic()

    @property
    def used(self) -> float:
        """Seconds."""
        return time.monotonic() - self._started

    @property
    def left(self) -> float:
        """Seconds; never below 0."""
        return max(self._seconds - self.used, 0.0)


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is sent, fixed by the warm-up and the same on both sides."""

    items: Mapping[int, int]
    """Level (concurrency, or size of a batch) → requests or texts a round."""
    warmup: int
    """What each side ran before the first round."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Turns(Generic[R]):
    """What both sides did; mappings are by side, "baseline" and "artifact"."""

    plan: Plan
    rounds: Sequence[Mapping[int, Mapping[str, R]]]
    """Of each round level → side → its run; a level at which something failed is left out."""
    order: tuple[str, ...]
    """The sides in the order of each round."""
    ready: Mapping[str, Mapping[str, Any]]
    memory: Mapping[str, Mapping[str, int | None]]
    failed: Mapping[str, Sequence[str]]
    """Reasons."""
    seconds: float
    load_before: float


@dataclass(frozen=True, slots=True)
class Load(Generic[R]):
    """What is sent, and how."""

    items: Sequence[Any]
    """Requests or texts, used over and over."""
    warm_up: Callable[[Mapping[str, WorkerProcess], Budget], Plan]
    send: Callable[[WorkerProcess, Sequence[Any], int, float], R]
    """Runs some items at a level within so many seconds."""
    needed: Collection[int] = ()
    """Levels without which a round is worth nothing."""


def take_turns(
    baseline: Command, artifact: Command, load: Load[R], scenario: LoadPattern, hint: str, progress: Progress
) -> Turns[R]:
    """Runs the same on both sides, within `scenario.max_seconds` after loading. `hint`: what would be less of it.

    Raises Lora2EdgeError where a process dies, an open fails, or not one round could be finished.
    """
    load_before = load_average()
    sides: dict[str, WorkerProcess] = {}
    ready: dict[str, dict[str, Any]] = {}
    with ExitStack() as stack:
        for name, command in (("baseline", baseline), ("artifact", artifact)):
            sides[name] = stack.enter_context(WorkerProcess(name, command))
            ready[name] = sides[name].wait_ready(scenario.load_seconds)
        budget = Budget(scenario.max_seconds)
        plan = load.warm_up(sides, budget)
        rounds, failed, order = _rounds(sides, load, plan, scenario, budget, progress)
        seconds = budget.used
        memory = {name: {**ready[name]["memory"], **side.quit()} for name, side in sides.items()}
    if not rounds:
        reasons = [reason for side in failed.values() for reason in side]
        raise Lora2EdgeError(
            "bench-no-round",
            f"not one round of the scenario {scenario.name!r} could be finished",
            why="; ".join(dict.fromkeys(reasons)) or f"max_seconds is {scenario.max_seconds:.0f}",
            hint=hint,
        )
    return Turns(plan, rounds, order, ready, memory, failed, seconds, load_before)


def _rounds(
    sides: Mapping[str, WorkerProcess],
    load: Load[R],
    plan: Plan,
    scenario: LoadPattern,
    budget: Budget,
    progress: Progress,
) -> tuple[list[Mapping[int, Mapping[str, R]]], dict[str, list[str]], tuple[str, ...]]:
    """Rounds without those that the budget cut, the reasons of failures by side, and the order of the sides."""
    rounds: list[Mapping[int, Mapping[str, R]]] = []
    failed: dict[str, list[str]] = {name: [] for name in sides}
    order: list[str] = []
    supply = cycle(load.items)
    longest = 0.0
    progress.start(f"bench {scenario.name}", scenario.rounds * len(plan.items) * 2, "runs")
    for number in range(scenario.rounds):
        if budget.left < longest:
            break
        began = time.monotonic()
        names = list(sides) if number % 2 == 0 else list(sides)[::-1]
        this: dict[int, dict[str, R]] = {}
        for level, count in plan.items.items():
            chosen = list(islice(supply, count))
            this[level] = {}
            for name in names:
                this[level][name] = load.send(sides[name], chosen, level, budget.left)
                progress.advance()
        longest = max(longest, time.monotonic() - began)
        if any(run.cut_off for pair in this.values() for run in pair.values()):
            break  # the budget ended inside this round: it is no pair
        for pair in this.values():
            for name, run in pair.items():
                failed[name] += run.errors
        # A level where something failed on either side is no pair.
        complete = {level: pair for level, pair in this.items() if not any(run.errors for run in pair.values())}
        if complete and all(level in complete for level in load.needed):
            rounds.append(complete)
            order.append(" ".join(names))
    progress.finish()
    return rounds, failed, tuple(order)


def load_average() -> float:
    """Over the last minute; the workers themselves are in the figure after a measurement, not in that before."""
    return os.getloadavg()[0]
