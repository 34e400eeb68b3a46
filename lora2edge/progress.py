"""How long work says how far it is: a bar on a terminal, JSON lines for a parent process, else nothing."""

from __future__ import annotations

import json
import threading
import time
from types import TracebackType
from typing import IO, Any, Self

from lora2edge.contracts import Progress


class Silent:
    """Says nothing."""

    def start(self, what: str, total: int, unit: str = "") -> None: ...
    def advance(self, amount: int = 1) -> None: ...
    def finish(self) -> None: ...


class Followed:
    """A Progress that passes everything on, for another thread that goes no faster than the work does.

    `_changed` guards what is counted, and tells of it.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._total = self._done = 0
        self._ended = self._given_up = False
        self._changed = threading.Condition()

    def start(self, what: str, total: int, unit: str = "") -> None:
        self._progress.start(what, total, unit)
        with self._changed:
            self._total, self._done = total, 0

    def advance(self, amount: int = 1) -> None:
        self._progress.advance(amount)
        with self._changed:
            self._done += amount
            self._changed.notify_all()

    def finish(self) -> None:
        self._progress.finish()

    def end(self, *, give_up: bool = False) -> None:
        """Lets the other thread run to the end; with `give_up`, stops it."""
        with self._changed:
            self._ended = True
            self._given_up |= give_up
            self._changed.notify_all()


class JsonLines:
    """One JSON object a line on `stream`: how a stage process reports to its parent."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._what = ""
        self._started = self._cpu = 0.0
        self.phases: list[dict[str, Any]] = []
        """What was begun and finished so far: `what`, `seconds` and `cpu_seconds`."""

    def start(self, what: str, total: int, unit: str = "") -> None:
        self._what, self._started, self._cpu = what, time.monotonic(), time.process_time()
        self._print({"event": "start", "what": what, "total": total, "unit": unit})

    def advance(self, amount: int = 1) -> None:
        self._print({"event": "advance", "amount": amount})

    def finish(self) -> None:
        took = {"seconds": time.monotonic() - self._started, "cpu_seconds": time.process_time() - self._cpu}
        self.phases.append({"what": self._what, **{key: round(value, 3) for key, value in took.items()}})
        self._print({"event": "finish", "what": self._what})

    def _print(self, event: dict[str, Any]) -> None:
        self._stream.write(json.dumps(event) + "\n")
        self._stream.flush()


class Bars:
    """rich progress bars on standard error, one a stage."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}"),
            TimeElapsedColumn(),
            console=Console(stderr=True),
        )
        self._task: Any = None

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def start(self, what: str, total: int, unit: str = "") -> None:
        self._task = self._bars.add_task(what, total=total, unit=unit)

    def advance(self, amount: int = 1) -> None:
        self._bars.advance(self._task, amount)

    def finish(self) -> None:
        self._bars.update(self._task, total=self._bars.tasks[self._task].completed or 1)


SILENT: Progress = Silent()
