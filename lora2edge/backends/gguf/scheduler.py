"""Continuous batching over one llama.cpp context.

One thread owns the context. Each turn it builds one batch: the next token of every request that is answering, and
as many prompt tokens as still fit. A request is scored (logits of given positions) or answered (new tokens); both
kinds wait in one queue for a free slot. Slots are filled from the lowest, because llama.cpp splits a batch whose
sequence numbers have gaps.
"""

from __future__ import annotations

import ctypes
import heapq
import math
import queue
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from lora2edge.backends.gguf.llama_cpp import Batch, Library
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
    """Tokens of this sequence in the context's memory."""
    copied: int = 0
    made: int = 0
    token: int = -1
    """The newest token, not in the memory yet."""

    @property
    def answering(self) -> bool:
        return self.length >= len(self.ids)


class Scheduler:
    """Runs requests on a `llama_context *`, which it owns and frees in `close`."""

    def __init__(self, library: Library, context: int, *, slots: int, vocab_size: int, max_rows: int) -> None:
        self._library, self._c, self._context = library, library.c, context
        self._memory = self._c.llama_get_memory(context)
        self._vocab_size = vocab_size
        self._max_rows = max_rows
        self._batch = _BatchArrays(self._c.llama_n_batch(context))
        self._free = list(range(slots))
        self._active: list[Request] = []
        self._pending: deque[Request] = deque()
        self._wake = threading.Condition()
        self._closing = False
        self._view_key: tuple[int, int] = (0, 0)
        self._view: FloatArray = np.empty((0, vocab_size), np.float32)
        self._thread = threading.Thread(target=self._run, name="lora2edge-llama", daemon=True)
        self._thread.start()

    def submit(self, requests: Sequence[Request]) -> None:
        """Queues the requests together: with free slots they start in the same turn, in this order."""
        with self._wake:
            if self._closing:
                raise _closed()
            self._pending.extend(requests)
            self._wake.notify()

    def cancel(self, request: Request) -> None:
        """Frees the request's slot at the next turn; harmless for one that has ended."""
        with self._wake:
            request.cancelled = True
            self._wake.notify()

    def close(self) -> None:
        """Ends the thread and frees the context; requests under way get an error. Harmless when done twice."""
        with self._wake:
            first, self._closing = not self._closing, True
            self._wake.notify()
        self._thread.join()
        if first:
            self._c.llama_free(self._context)

    def _run(self) -> None:
        while True:
            with self._wake:
                while not (self._closing or self._pending or self._active):
                    self._wake.wait()
                if self._closing:
                    break
                self._admit()
            try:
                self._turn()
            except Exception as error:  # whatever it is, the callers must hear of it: they wait on their queues
                self._fail(error)
        for request in (*self._active, *self._pending):
            request.events.put(_closed())

    def _admit(self) -> None:
        """Drops what was cancelled, and gives free slots to waiting requests, first come, first served."""
        for request in [request for request in self._active if request.cancelled]:
            self._release(request)
        while self._pending and (self._free or self._pending[0].cancelled):
            request = self._pending.popleft()
            if not request.cancelled:
                request.slot = heapq.heappop(self._free)
                self._active.append(request)

    def _turn(self) -> None:
        """One llama_decode: fills the batch, runs it, hands its outputs out."""
        outputs = self._fill()
        if not self._batch.count:
            return
        status = self._c.llama_decode(self._context, self._batch.struct)
        if status:
            raise Lora2EdgeError(
                "llama-decode",
                f"llama.cpp could not compute a batch of {self._batch.count} tokens (status {status})",
                why=self._library.take_errors(),
            )
        rows = self._rows(sum(count for _, count in outputs))
        start = 0
        for request, count in outputs:
            self._hand_out(request, rows[start : start + count])
            start += count

    def _fill(self) -> list[tuple[Request, int]]:
        """Writes the batch; returns who gets how many of its output rows, in the batch's order."""
        batch = self._batch
        batch.clear()
        outputs: list[tuple[Request, int]] = []
        answering = sorted((request for request in self._active if request.answering), key=_slot)
        for request in answering:
            batch.add(request.slot, request.length, request.token, 1)
            request.length += 1
            outputs.append((request, 1))
        rows_left = self._max_rows - len(outputs)
        for request in self._active:
            left = len(request.ids) - request.length
            if left <= 0 or not batch.room:
                continue
            stop = request.length + min(left, batch.room)
            wanted = request.wanted[request.length : stop]
            count = int(wanted.sum())
            if count > rows_left:
                taken = int(np.searchsorted(np.cumsum(wanted, dtype=np.int64), rows_left, side="right"))
                stop, wanted, count = request.length + taken, wanted[:taken], rows_left
            if stop > request.length:
                batch.add(request.slot, request.length, request.ids[request.length : stop], wanted)
                request.length = stop
                rows_left -= count
                outputs.append((request, count))
        batch.seal()
        return outputs

    def _rows(self, count: int) -> FloatArray:
        """The batch's outputs `[count, V]`, a view of llama.cpp's own buffer."""
        if not count:
            return self._view[:0]
        address = self._c.llama_get_logits(self._context)
        if not address:
            raise Lora2EdgeError("llama-decode", "llama.cpp gave no logits", why=self._library.take_errors())
        if self._view_key != (address, count):
            buffer = (ctypes.c_float * (count * self._vocab_size)).from_address(address)
            self._view = np.ctypeslib.as_array(buffer).reshape(count, self._vocab_size)
            self._view_key = (address, count)
        return self._view

    def _hand_out(self, request: Request, rows: FloatArray) -> None:
        if request.rows is not None:
            request.rows[request.copied : request.copied + len(rows)] = rows
            request.copied += len(rows)
            if request.answering:
                self._finish(request)
        elif len(rows):
            token = _choose(rows[0], request)
            request.made += 1
            request.token = token
            if token in request.stop:
                self._finish(request)
                return
            request.events.put(token)
            if request.made >= request.max_new:
                self._finish(request)

    def _finish(self, request: Request) -> None:
        self._release(request)
        request.events.put(None)

    def _release(self, request: Request) -> None:
        self._c.llama_memory_seq_rm(self._memory, request.slot, -1, -1)
        self._active.remove(request)
        heapq.heappush(self._free, request.slot)

    def _fail(self, error: Exception) -> None:
        """Ends all requests under way with the error, and empties the memory: the next ones start clean."""
        for request in self._active:
            request.events.put(_as_error(error))
            heapq.heappush(self._free, request.slot)
        self._active.clear()
        self._c.llama_memory_clear(self._memory, True)


class _BatchArrays:
    """A `llama_batch` over arrays that are allocated once."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._token = np.zeros(size, np.int32)
        self._pos = np.zeros(size, np.int32)
        self._one = np.ones(size, np.int32)
        self._sequence = np.zeros(size, np.int32)
        self._sequence_pointers = self._sequence.ctypes.data + 4 * np.arange(size, dtype=np.uint64)
        self._wanted = np.zeros(size, np.int8)
        self._counting = np.arange(size, dtype=np.int32)
        self.count = 0
        self.struct = Batch(
            0,
            self._token.ctypes.data,
            None,
            self._pos.ctypes.data,
            self._one.ctypes.data,
            self._sequence_pointers.ctypes.data,
            self._wanted.ctypes.data,
        )

    @property
    def room(self) -> int:
        return self._size - self.count

    def clear(self) -> None:
        self.count = 0

    def add(self, slot: int, position: int, tokens: Any, wanted: Any) -> None:
        """Appends tokens (one, or an array) of one sequence, the first at `position`."""
        length = 1 if isinstance(tokens, int) else len(tokens)
        start, stop = self.count, self.count + length
        self._token[start:stop] = tokens
        self._pos[start:stop] = position if length == 1 else self._counting[:length] + position
        self._sequence[start:stop] = slot
        self._wanted[start:stop] = wanted
        self.count = stop

    def seal(self) -> None:
        self.struct.n_tokens = self.count


def _choose(logits: FloatArray, request: Request) -> int:
    """The next token: the largest logit, or one drawn from softmax(logits / temperature)."""
    best = int(logits.argmax())
    top = float(logits[best])
    if not math.isfinite(top):  # argmax returns the first NaN, so this sees every one
        raise Lora2EdgeError("not-finite", f"llama.cpp computed {top} among the logits of the next token")
    if request.random is None:
        return best
    weights = np.exp((logits.astype(np.float64) - top) / request.temperature)
    cumulative = np.cumsum(weights)
    drawn = int(np.searchsorted(cumulative, request.random.random() * cumulative[-1], side="right"))
    return min(drawn, len(weights) - 1)


def _slot(request: Request) -> int:
    return request.slot


def _closed() -> InputError:
    return InputError("session-closed", "the GGUF session was closed")


def _as_error(error: Exception) -> Lora2EdgeError:
    """An own exception object for each caller: a shared one would mix their tracebacks."""
    if isinstance(error, Lora2EdgeError):
        return type(error)(error.code, error.what, why=error.why, hint=error.hint)
    wrapped = Lora2EdgeError("llama-scheduler", f"the GGUF session failed: {error!r}")
    wrapped.__cause__ = error
    return wrapped
