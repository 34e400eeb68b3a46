"""Static batching: requests that wait are decoded together by one thread, streamed to each caller."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

GATHER_S = 0.005
"""The longest that a batch waits for the requests of callers that were there when the last batch ended: a caller that
sends its next request at once is in the next batch. A lone caller never waits."""
_END = -1


@dataclass(slots=True, eq=False)
class _Request:
    ids: list[int]
    max_new: int
    stop: frozenset[int]
    temperature: float
    tokens: queue.SimpleQueue[int | BaseException] = field(default_factory=queue.SimpleQueue)
    cancelled: bool = False
    emitted: int = 0


class Tokens:
    """The tokens of one request as they come. Closing it, or dropping it, cancels the request."""

    def __init__(self, request: _Request) -> None:
        self._request = request
        self._done = False

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> int:
        if self._done:
            raise StopIteration
        token = self._request.tokens.get()
        if isinstance(token, int) and token != _END:
            return token
        self.close()
        if isinstance(token, BaseException):
            raise token
        raise StopIteration

    def close(self) -> None:
        self._done = True
        self._request.cancelled = True

    def __del__(self) -> None:
        self._request.cancelled = True


class Batcher:
    """Decodes up to `slots` requests at a time in a thread of its own, with a key-value cache.

    `causal` is a transformers causal model, `head` maps hidden states to logits. A row that is finished leaves the
    batch, and the others go on without it; the next batch starts when none is left.
    """

    def __init__(self, causal: Any, head: Callable[[Any], Any], *, device: str, threads: int, slots: int) -> None:
        self._body: Any = causal.base_model
        self._head = head
        self._device = device
        self._threads = threads
        self._slots = slots
        self._expected = 1
        """Requests that were being served or waiting when the last batch ended."""
        self._waiting: queue.SimpleQueue[_Request | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._closed = False

    def stream(self, ids: Sequence[int], *, max_new: int, stop: Sequence[int], temperature: float) -> Tokens:
        """Submits the request now; its tokens come from the iterator."""
        request = _Request(list(ids), max_new, frozenset(stop), temperature)
        with self._lock:
            if self._closed:
                raise RuntimeError("the session is closed")
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="hf-batcher", daemon=True)
                self._thread.start()
            self._waiting.put(request)
        return Tokens(request)

    def close(self) -> None:
        """Cancels what waits or runs and ends the thread."""
        with self._lock:
            self._closed = True
            thread = self._thread
            self._waiting.put(None)
        if thread is not None:
            thread.join()
        self._body = None

    def _work(self) -> None:
        import torch

        torch.set_num_threads(self._threads)
        while (batch := self._gather()) is not None:
            try:
                with torch.inference_mode():
                    self._decode(batch)
            except Exception as error:  # every caller gets it; the thread lives on
                for request in batch:
                    request.tokens.put(error)
            self._expected = len(batch) + self._waiting.qsize()
        self._refuse_waiting()

    def _gather(self) -> list[_Request] | None:
        """The next batch; None when the session is closed."""
        first = self._waiting.get()
        if first is None or self._closed:
            if first is not None:
                first.tokens.put(RuntimeError("the session is closed"))
            return None
        batch = [first]
        deadline = time.monotonic() + GATHER_S
        while len(batch) < self._slots:
            patience = deadline - time.monotonic() if len(batch) < self._expected else 0.0
            try:
                request = self._waiting.get(timeout=max(0.0, patience))
            except queue.Empty:
                break
            if request is None:
                self._waiting.put(None)
                break
            batch.append(request)
        return batch

    def _refuse_waiting(self) -> None:
        while not self._waiting.empty():
            request = self._waiting.get()
            if request is not None:
                request.tokens.put(RuntimeError("the session is closed"))

    def _decode(self, batch: list[_Request]) -> None:
        """Prefills `batch` padded on the left, then one token for every row per step."""
        import torch

        width = max(len(request.ids) for request in batch)
        ids = torch.zeros(len(batch), width, dtype=torch.long)
        mask = torch.zeros(len(batch), width, dtype=torch.long)
        for row, request in enumerate(batch):
            ids[row, width - len(request.ids) :] = torch.tensor(request.ids)
            mask[row, width - len(request.ids) :] = 1
        ids, mask = ids.to(self._device), mask.to(self._device)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        cache = None
        rows = batch
        while True:
            output = self._body(
                input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
            )
            cache = output.past_key_values
            chosen = _choose(self._head(output.last_hidden_state[:, -1]), rows)
            going = [row for row, token in enumerate(chosen) if self._emit(rows[row], token)]
            if not going:
                return
            if len(going) < len(rows):
                index = torch.tensor(going, device=self._device)
                cache.batch_select_indices(index)
                mask, positions = mask[index], positions[index]
                rows = [rows[row] for row in going]
            ids = torch.tensor([[chosen[row]] for row in going], device=self._device)
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
            positions = positions[:, -1:] + 1

    def _emit(self, request: _Request, token: int) -> bool:
        """Hands the token over; False when the request is finished."""
        if self._closed:
            request.tokens.put(RuntimeError("the session was closed while it generated"))
            return False
        if request.cancelled or token in request.stop or request.max_new < 1:
            request.tokens.put(_END)
            return False
        request.tokens.put(token)
        request.emitted += 1
        if request.emitted >= request.max_new:
            request.tokens.put(_END)
            return False
        return True


def _choose(logits: Any, rows: Sequence[_Request]) -> list[int]:
    """`[rows, V]` → one token id a row: the likeliest, or drawn at the row's temperature."""
    import torch

    chosen = logits.float().argmax(-1)
    for row, request in enumerate(rows):
        if request.temperature > 0:
            chosen[row] = torch.multinomial(torch.softmax(logits[row].float() / request.temperature, -1), 1)[0]
    result: list[int] = chosen.tolist()
    return result
