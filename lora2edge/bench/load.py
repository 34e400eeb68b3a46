"""A closed-loop load generator: `concurrency` threads, each sending its next request when its last is done."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any, cast

from lora2edge.contracts import GREEDY, Session

CUT_OFF = "cut off: the time budget was used up"


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """One request, as its sender saw it."""

    index: int
    prompt_tokens: int
    seconds: float
    """From sending to the last token, or to the error."""
    token_ms: tuple[float, ...]
    """When each token arrived, after sending."""
    error: str | None
    """Why it does not count; None where it gave exactly the tokens asked for."""

    @property
    def ttft_ms(self) -> float:
        """Sending to first token."""
        return self.token_ms[0]

    @property
    def itl_ms(self) -> list[float]:
        """Time between one token and the next; one fewer than there are tokens."""
        return [after - before for before, after in zip(self.token_ms, self.token_ms[1:], strict=False)]

    @property
    def decode_tps(self) -> float:
        """(tokens − 1) / (time of the last − time of the first), per second."""
        return (len(self.token_ms) - 1) * 1000 / max(self.token_ms[-1] - self.token_ms[0], 1e-6)


@dataclass(frozen=True, slots=True)
class Run:
    """One recorded execution: some requests at one level of concurrency."""

    concurrency: int
    wall_s: float
    """From the moment all senders start to the moment the last one is done."""
    records: tuple[RequestRecord, ...]

    @property
    def done(self) -> list[RequestRecord]:
        return [record for record in self.records if record.error is None]

    @property
    def failed(self) -> list[RequestRecord]:
        return [record for record in self.records if record.error is not None]

    @property
    def errors(self) -> list[str]:
        """Of the requests that failed."""
        return [record.error or "" for record in self.failed]

    @property
    def cut_off(self) -> bool:
        return any(record.error == CUT_OFF for record in self.records)

    @property
    def qps(self) -> float:
        """Completed requests per second of wall time."""
        return len(self.done) / max(self.wall_s, 1e-9)

    @property
    def output_tps(self) -> float:
        """Tokens of completed requests per second of wall time, over all slots, prompts' time included."""
        return sum(len(record.token_ms) for record in self.done) / max(self.wall_s, 1e-9)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Run:
        records = tuple(
            RequestRecord(**{**record, "token_ms": tuple(record["token_ms"])}) for record in data["records"]
        )
        return Run(data["concurrency"], data["wall_s"], records)


def run_load(
    session: Session,
    requests: Sequence[Sequence[int]],
    *,
    concurrency: int,
    max_new: int,
    max_seconds: float = float("inf"),
    cancel: threading.Event | None = None,
) -> Run:
    """Sends every request once, greedily and without a stop token, so that each gives `max_new` tokens.

    A request that raises, or gives another number of tokens, is recorded with its error. Requests that are
    under way or not yet sent when `max_seconds` are over (or `cancel` is set) are recorded as cut off.
    """
    records: list[RequestRecord | None] = [None] * len(requests)
    waiting = iter(range(len(requests)))
    lock = threading.Lock()
    senders = min(concurrency, len(requests))
    together = threading.Barrier(senders + 1)
    cancel = cancel or threading.Event()
    deadline = time.perf_counter() + max_seconds

    def over() -> bool:
        return cancel.is_set() or time.perf_counter() > deadline

    def send_all() -> None:
        together.wait()
        while True:
            with lock:
                index = next(waiting, None)
            if index is None:
                return
            records[index] = _send(session, index, requests[index], max_new, over)

    threads = [threading.Thread(target=send_all, daemon=True) for _ in range(senders)]
    for thread in threads:
        thread.start()
    together.wait()
    started = time.perf_counter()
    for thread in threads:
        thread.join()
    wall_s = time.perf_counter() - started
    return Run(concurrency, wall_s, tuple(record for record in records if record is not None))


def _send(session: Session, index: int, ids: Sequence[int], max_new: int, over: Any) -> RequestRecord:
    """Sends one request and takes the time of each of its tokens."""
    times: list[float] = []
    error: str | None = CUT_OFF if over() else None
    started = time.perf_counter()
    if error is None:
        try:
            tokens = cast("Generator[int]", session.generate(ids, max_new=max_new, stop=(), sampling=GREEDY))
            with closing(tokens):
                for _ in tokens:
                    times.append((time.perf_counter() - started) * 1000)
                    if len(times) > max_new:
                        break
                    if len(times) < max_new and over():
                        error = CUT_OFF
                        break
        except Exception as problem:  # a session may raise anything; the request is then counted as failed
            error = f"{type(problem).__name__}: {getattr(problem, 'what', problem)}"
    if error is None and len(times) != max_new:
        more = "more than " if len(times) > max_new else ""
        error = f"gave {more}{min(len(times), max_new)} tokens where {max_new} were asked for"
    return RequestRecord(index, len(ids), time.perf_counter() - started, tuple(times), error)
