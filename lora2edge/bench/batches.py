"""A closed loop of batches to a classifier: the next one is sent when the last one is done."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from typing import Any

from lora2edge.bench.load import CUT_OFF
from lora2edge.bench.scenario import ClassifyScenario
from lora2edge.contracts import Classifier, Encoded
from lora2edge.errors import DataError


@dataclass(frozen=True, slots=True)
class ClassifyRun:
    """One recorded execution: texts in batches of one size."""

    batch_size: int
    wall_s: float
    """From the first batch's start to the last one's end."""
    batch_ms: tuple[float, ...]
    """Of each batch that was classified, in order."""
    error: str | None
    """Why not all of them were."""

    @property
    def errors(self) -> list[str]:
        """The one, if any."""
        return [self.error] if self.error else []

    @property
    def cut_off(self) -> bool:
        return self.error == CUT_OFF

    @property
    def qps(self) -> float:
        """Texts classified per second of wall time."""
        return len(self.batch_ms) * self.batch_size / max(self.wall_s, 1e-9)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> ClassifyRun:
        return ClassifyRun(data["batch_size"], data["wall_s"], tuple(data["batch_ms"]), data["error"])


def run_batches(
    classifier: Classifier,
    texts: Sequence[Encoded],
    *,
    batch_size: int,
    max_seconds: float = float("inf"),
    cancel: threading.Event | None = None,
) -> ClassifyRun:
    """Classifies `texts` in batches. Ends at the first one that raises, or when the time is over or `cancel` set."""
    times: list[float] = []
    error: str | None = None
    started = time.perf_counter()
    for at in range(0, len(texts), batch_size):
        begun = time.perf_counter()
        if begun - started > max_seconds or (cancel is not None and cancel.is_set()):
            error = CUT_OFF
            break
        batch = texts[at : at + batch_size]
        try:
            answers = classifier.classify(batch)
        except Exception as problem:  # a classifier may raise anything; the run then counts as failed
            error = f"{type(problem).__name__}: {getattr(problem, 'what', problem)}"
            break
        times.append((time.perf_counter() - begun) * 1000)
        if len(answers) != len(batch):
            error = f"gave {len(answers)} answers to {len(batch)} texts"
            break
    return ClassifyRun(batch_size, time.perf_counter() - started, tuple(times), error)


def make_texts(scenario: ClassifyScenario, texts: Sequence[Encoded]) -> list[Encoded]:
    """The distinct texts that `scenario` sends, made from the user's own encoded `texts`.

    Of a wanted length, the first and last token (the special ones) stay, and what is between is repeated or cut;
    segments are given up. Raises DataError where no text has a token between them.
    """
    if scenario.tokens is None:
        made = list(texts)
    else:
        inner = scenario.tokens - 2
        made = [
            Encoded((text.ids[0], *islice(cycle(text.ids[1:-1]), inner), text.ids[-1]))
            for text in texts
            if len(text.ids) > 2
        ]
    if not made:
        raise DataError(
            "no-bench-text", f"no test text fits the scenario {scenario.name!r}", why="all are of one token or two"
        )
    return list(dict.fromkeys(made))
