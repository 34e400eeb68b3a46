"""Continuous batching over one decoder graph and one cache in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from lora2edge.backends.onnxruntime.decoder import Cache, Call, Decoder, lengths_mask
from lora2edge.backends.scheduler import Request

if TYPE_CHECKING:
    from lora2edge.contracts import FloatArray

CHUNK_TOKENS = {"cpu": 128, "cuda": 1024}
"""Prompt tokens in one call: at most what the answers under way wait for beside their own step. (On a CPU 64 tokens
are as fast for each as 512.)"""


class DecoderEngine:
    """The scheduler's Engine: requests sit in the lowest rows of the cache, whatever their slots.

    Each turn is one token for all rows that are answering, in one call, and one chunk of the oldest prompt, alone in
    its row. Rows that are not answering take part in the common call, too: what it writes behind their end is
    overwritten by their next chunk, or by the next request.
    """

    session = "ONNX Runtime"
    runtime = "ONNX Runtime"

    def __init__(self, decoder: Decoder, *, slots: int, max_length: int) -> None:
        self._decoder = decoder
        self._cache = Cache(decoder, slots, max_length)
        self._ones = np.ones((1, max_length), np.int64)
        """The mask of a lone row, up to its length."""
        self._rows: list[Request | None] = []
        self._steps: dict[int, Call] = {}
        """Of a number of rows."""
        self._prefills: dict[int, Call] = {}
        """Of a row."""
        self._answers: dict[Request, list[int]] = {}
        """Tokens so far, where a sequence may have to be given again."""

    def turn(self, active: Sequence[Request]) -> list[tuple[Request, FloatArray]]:
        """One token for every answer under way, and one chunk of one prompt."""
        self._place(active)
        self._begin_again()
        done = self._step()
        if (waiting := next((request for request in active if not request.answering), None)) is not None:
            logits = self._prefill(waiting)
            if waiting.answering:
                done.append((waiting, logits))
        return done

    def release(self, request: Request) -> None:
        """Frees the request's row."""
        self._answers.pop(request, None)
        if request in self._rows:  # one that was cancelled may have no row yet
            self._rows[self._rows.index(request)] = None

    def reset(self) -> None:
        """Frees all rows."""
        self._rows.clear()
        self._answers.clear()

    def close(self) -> None:
        """Frees the cache."""
        self._steps.clear()
        self._prefills.clear()
        del self._cache

    def _place(self, active: Sequence[Request]) -> None:
        """New requests take free rows; then the last rows move into those that are left: each costs time."""
        rows = self._rows
        for request in active:
            if request not in rows:
                if None in rows:
                    rows[rows.index(None)] = request
                else:
                    rows.append(request)
        while None in rows:
            last = rows.pop()
            if last is None:
                continue
            if not self._cache.is_movable:
                rows.append(last)
                break
            hole = rows.index(None)
            self._cache.move(len(rows), hole, last.length)
            rows[hole] = last

    def _begin_again(self) -> None:
        """Makes prompts of the answers whose next token is the first that turns by other angles."""
        if (switch := self._decoder.recompute_length) is None:
            return
        for request in self._rows:
            if request is not None and request.answering:
                answer = self._answers.setdefault(request, [])
                answer.append(request.token)
                if request.length == switch:
                    request.ids = np.concatenate([request.ids, np.array(answer, request.ids.dtype)])
                    request.length = 0

    def _step(self) -> list[tuple[Request, FloatArray]]:
        rows = self._rows
        answering = [(row, request) for row, request in enumerate(rows) if request and request.answering]
        if not answering:
            return []
        count = answering[-1][0] + 1
        lengths = [request.length + 1 if request else 1 for request in rows[:count]]
        tokens = [[request.token if request and request.answering else 0] for request in rows[:count]]
        mask = self._ones[:, : lengths[0]] if count == 1 else lengths_mask(np.array(lengths))
        if (call := self._steps.get(count)) is None:
            call = self._steps[count] = Call(self._decoder, self._cache, 0, count)
        logits = call.run(np.array(tokens), mask)
        for _, request in answering:
            request.length += 1
        return [(request, logits[row : row + 1]) for row, request in answering]

    def _prefill(self, request: Request) -> FloatArray:
        """The request's next chunk: logits `[1, V]` of the chunk's last token."""
        row = self._rows.index(request)
        stop = min(len(request.ids), request.length + CHUNK_TOKENS[self._decoder.device])
        if (switch := self._decoder.switch_length) is not None and len(request.ids) > switch:
            stop = len(request.ids)
        if (call := self._prefills.get(row)) is None:
            call = self._prefills[row] = Call(self._decoder, self._cache, row, 1)
        ids = request.ids[None, request.length : stop].astype(np.int64)
        logits = call.run(ids, self._ones[:, :stop])
        request.length = stop
        return logits
