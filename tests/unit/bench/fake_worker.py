"""A measured process with a session that sleeps instead of computing. argv: JSON options."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lora2edge.bench.worker import serve_stdio
from lora2edge.contracts import GREEDY, Encoded, Message, Sampling, SessionFacts
from lora2edge.errors import UnsupportedError


class SleepingSession:
    """Takes `first_ms` for the first token and `next_ms` for each other; `slots` requests at a time."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._options = options
        self._slots = threading.Semaphore(options.get("slots", 4))
        self._count = 0
        self.facts = SessionFacts(
            "fake", options.get("device", "cpu"), "float32", options.get("slots", 4), 1, 4096, "in threads", "none"
        )

    def encode(self, messages: Sequence[Message]) -> list[int]:
        return [1]

    def logits(self, batch: Sequence[Sequence[int]], keep: Sequence[Sequence[int]]) -> Iterator[Any]:
        return iter(())

    def generate(
        self, ids: Sequence[int], *, max_new: int, stop: Sequence[int], sampling: Sampling = GREEDY
    ) -> Iterator[int]:
        assert list(stop) == [] and sampling == GREEDY and all(isinstance(token, int) for token in ids)
        self._count += 1
        if self._count == self._options.get("die_at"):
            print("the kernel is not happy", file=sys.stderr, flush=True)
            os.abort()
        fails = self._count == self._options.get("fail_at")
        with self._slots:
            time.sleep(self._options["first_ms"] / 1000)
            yield 7
            if fails:
                raise ValueError("no memory for the slot")
            for _ in range(self._options.get("gives", max_new) - 1):
                time.sleep(self._options["next_ms"] / 1000)
                yield 8

    def close(self) -> None:
        time.sleep(self._options.get("close_s", 0))


class SleepingClassifier:
    """Takes `batch_ms` for a batch, whatever is in it."""

    labels = ("a", "b")

    def __init__(self, options: dict[str, Any]) -> None:
        self._options = options
        self._count = 0
        self.facts = SessionFacts("fake", options.get("device", "cpu"), "float32", 4, 1, 4096, "", "none")

    def encode(self, text: str, pair: str | None = None) -> Encoded:
        return Encoded((1,))

    def classify(self, batch: Sequence[Encoded]) -> list[Any]:
        assert all(isinstance(text, Encoded) and all(isinstance(token, int) for token in text.ids) for text in batch)
        self._count += 1
        if self._count == self._options.get("fail_at"):
            raise ValueError("no memory for the batch")
        time.sleep(self._options["batch_ms"] / 1000)
        return [[0.0, 1.0]] * self._options.get("gives", len(batch))

    def close(self) -> None:
        pass


def open_session() -> SleepingSession | SleepingClassifier:
    options = json.loads(sys.argv[1])
    print("a library prints on standard output")
    os.write(1, b"and so does a C library\n")
    if "refuse" in options:
        raise UnsupportedError("unknown-architecture", options["refuse"], why="not built in", hint="use another")
    if "raise" in options:
        raise RuntimeError(options["raise"])
    if "exit" in options:
        print("last words", file=sys.stderr, flush=True)
        os._exit(options["exit"])
    time.sleep(options.get("open_s", 0))
    return SleepingClassifier(options) if "batch_ms" in options else SleepingSession(options)


if __name__ == "__main__":
    if len(sys.argv) > 2:  # so that a test finds this process
        with Path(sys.argv[2]).open("a") as file:
            file.write(f"{os.getpid()}\n")
    serve_stdio(open_session)
