"""Continuous batching: one thread that owns a runtime serves the requests of many callers.

Each turn the runtime computes once for all requests that are under way, and hands out rows of logits. A request is
scored (logits of given positions) or answered (new tokens); both kinds wait in one queue for a free slot.
"""

from __future__ import annotations

import heapq
import math
import queue
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np

from lora2edge.contracts import Sampling
from lora2edge.errors import InputError, Lora2EdgeError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lora2edge.contracts import FloatArray


@dataclass(eq=False, slots=True)
class Request:
    """One sequence to score or to answer. What the scheduler thread changes is below the first block."""

    ids: NDArray[np.int32]
    wanted: NDArray[np.int8]
    """Per id: 1 where its logits are wanted."""
    rows: FloatArray | None = None
    """`[wanted.sum(), V]` float32 that the logits are copied to; None for a request to answer."""
    max_new: int = 0
    stop: frozenset[int] = frozenset()
    temperature: float = 0.0
    random: np.random.Generator | None = None
    events: queue.SimpleQueue[int | Lora2EdgeError | None] = field(default_factory=queue.SimpleQueue)
    """New tokens; then None at the end, or the error that ended it."""

    cancelled: bool = False
    slot: int = -1
    length: int = 0
    """Tokens of this sequence in the runtime's memory."""
    copied: int = 0
    made: int = 0
    token: int = -1
    """The newest token, not in the memory yet."""

    @property
    def answering(self) -> bool:
        return self.length >= len(self.ids)


class Engine(Protocol):
    """A runtime with a memory for several sequences. Used by the scheduler's thread alone."""

    @property
    def session(self) -> str:
        """Its session's name in errors, e.g. "GGUF"."""
        ...

    @property
    def runtime(self) -> str:
        """Its own name in errors, e.g. "llama.cpp"."""
        ...

    def turn(self, active: Sequence[Request]) -> Sequence[tuple[Request, FloatArray]]:
        """Computes once: the newest token of each request that is answering, and as much of the prompts as fits.

        Raises `length` of the requests, and gives those rows of logits `[wanted, V]` that came out of it; they are
        read before the next turn.
        """
        ...

    def release(self, request: Request) -> None:
        """Forgets the sequence in the request's slot."""
        ...

    def reset(self) -> None:
        """Forgets all sequences, after an error."""
        ...

    def close(self) -> None:
        """Frees the memory."""
        ...


class Scheduler:
    """Runs requests on an engine, which it owns and closes in `close`. Slots are filled from the lowest."""

    def __init__(self, engine: Engine, *, slots: int) -> None:
        self._engine = engine
        self._free = list(range(slots))
        self._active: list[Request] = []
        self._pending: deque[Request] = deque()
        self._wake = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name=f"lora2edge-{engine.runtime}", daemon=True)
        self._thread.start()

    def submit(self, requests: Sequence[Request]) -> None:
        """Queues the requests together: with free slots they start in the same turn, in this order."""
        with self._wake:
            if self._closing:
                raise self._closed()
            self._pending.extend(requests)
            self._wake.notify()

    def cancel(self, request: Request) -> None:
        """Frees the request's slot at the next turn; harmless for one that has ended."""
        with self._wake:
            request.cancelled = True
            self._wake.notify()

    def close(self) -> None:
        """Ends the thread and closes the engine; requests under way get an error. Harmless when done twice."""
        with self._wake:
            first, self._closing = not self._closing, True
            self._wake.notify()
        self._thread.join()
        if first:
            self._engine.close()

    def _run(self) -> None:
        while True:
            with self._wake:
                while not (self._closing or self._pending or self._active):
                    self._wake.wait()
                if self._closing:
                    break
                self._admit()
            try:
                for request, rows in self._engine.turn(self._active):
                    self._hand_out(request, rows)
            except Exception as error:  # whatever it is, the callers must hear of it: they wait on their queues
                self._fail(error)
        for request in (*self._active, *self._pending):
            request.events.put(self._closed())

    def _admit(self) -> None:
        """Drops what was cancelled, and gives free slots to waiting requests, first come, first served."""
        for request in [request for request in self._active if request.cancelled]:
            self._release(request)
        while self._pending and (self._free or self._pending[0].cancelled):
            request = self._pending.popleft()
            if not request.cancelled:
                request.slot = heapq.heappop(self._free)
                self._active.append(request)

    def _hand_out(self, request: Request, rows: FloatArray) -> None:
        if request.rows is not None:
            request.rows[request.copied : request.copied + len(rows)] = rows
            request.copied += len(rows)
            if request.answering:
                self._finish(request)
        elif len(rows):
            token = self._choose(rows[0], request)
            request.made += 1
            request.token = token
            if token in request.stop:
                self._finish(request)
                return
            request.events.put(token)
            if request.made >= request.max_new:
                self._finish(request)

    def _choose(self, logits: FloatArray, request: Request) -> int:
        """The next token: the largest logit, or one drawn from softmax(logits / temperature)."""
        best = int(logits.argmax())
        top = float(logits[best])
        if not math.isfinite(top):  # argmax returns the first NaN, so this sees every one
            raise Lora2EdgeError(
                "not-finite", f"{self._engine.runtime} computed {top} among the logits of the next token"
            )
        if request.random is None:
            return best
        weights = np.exp((logits.astype(np.float64) - top) / request.temperature)
        cumulative = np.cumsum(weights)
        drawn = int(np.searchsorted(cumulative, request.random.random() * cumulative[-1], side="right"))
        return min(drawn, len(weights) - 1)

    def _finish(self, request: Request) -> None:
        self._release(request)
        request.events.put(None)

    def _release(self, request: Request) -> None:
        self._engine.release(request)
        self._active.remove(request)
        heapq.heappush(self._free, request.slot)

    def _fail(self, error: Exception) -> None:
        """Ends all requests under way with the error, and empties the memory: the next ones start clean."""
        for request in self._active:
            request.events.put(self._as_error(error))
            heapq.heappush(self._free, request.slot)
        self._active.clear()
        self._engine.reset()

    def _closed(self) -> InputError:
        return InputError("session-closed", f"the {self._engine.session} session was closed")

    def _as_error(self, error: Exception) -> Lora2EdgeError:
        """An own exception object for each caller: a shared one would mix their tracebacks."""
        if isinstance(error, Lora2EdgeError):
            return type(error)(error.code, error.what, why=error.why, hint=error.hint)
        wrapped = Lora2EdgeError("session-failed", f"the {self._engine.session} session failed: {error!r}")
        wrapped.__cause__ = error
        return wrapped


class Answer:
    """The new tokens of one request, an iterator. `close`, or dropping it, cancels the request."""

    def __init__(self, scheduler: Scheduler, request: Request) -> None:
        self._scheduler = scheduler
        self._request = request
        self._ended = False

    def __iter__(self) -> Answer:
        return self

    def __next__(self) -> int:
        if self._ended:
            raise StopIteration
        event = self._request.events.get()
        if isinstance(event, int):
            return event
        self._ended = True
        if event is None:
            raise StopIteration
        raise event

    def close(self) -> None:
        """Cancels the request, if it is still under way, and frees its slot."""
        if not self._ended:
            self._ended = True
            self._scheduler.cancel(self._request)

    def __del__(self) -> None:
        self.close()


def ask(
    scheduler: Scheduler, ids: Sequence[int], *, max_new: int, stop: Sequence[int], sampling: Sampling, number: int
) -> Answer:
    """Queues a prompt. With a temperature, tokens are drawn from a generator seeded with `number`."""
    wanted = np.zeros(len(ids), np.int8)
    wanted[-1] = 1
    request = Request(
        np.asarray(ids, np.int32),
        wanted,
        max_new=max_new,
        stop=frozenset(stop),
        temperature=sampling.temperature,
        random=np.random.default_rng((0, number)) if sampling.temperature > 0 else None,
    )
    scheduler.submit([request])
    return Answer(scheduler, request)


def check_prompt(ids: Sequence[int], max_new: int) -> None:
    """Raises InputError where there is nothing to read, or nothing to write."""
    if not ids:
        raise InputError("empty-prompt", "a prompt needs at least one token")
    if max_new < 1:
        raise InputError("max-new", f"max_new is {max_new}, at least 1 is needed")


def check_kept(batch: Sequence[Sequence[int]], keep: Sequence[Sequence[int]]) -> None:
    """Raises InputError for positions that are not in their sequence."""
    if len(batch) != len(keep):
        raise InputError("keep-shape", f"{len(batch)} sequences, but positions for {len(keep)}")
    for ids, positions in zip(batch, keep, strict=True):
        if positions and (min(positions) < 0 or max(positions) >= len(ids)):
            raise InputError(
                "keep-position",
                f"positions {min(positions)} to {max(positions)} were asked of {len(ids)} tokens",
            )


def check_room(ids: Sequence[int], max_new: int, limit: int) -> None:
    """Raises InputError for what a slot of `limit` tokens does not hold."""
    if len(ids) + max_new > limit:
        what = f"a sequence of {len(ids)} tokens" if not max_new else f"{len(ids)} prompt + {max_new} new tokens"
        raise InputError(
            "too-long",
            f"{what} exceeds the session's max_length of {limit}",
            hint=f"open the session with max_length {len(ids) + max_new} or more",
        )
