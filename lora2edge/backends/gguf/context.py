"""One llama.cpp context that several sequences share.

Each turn builds one batch: the next token of every request that is answering, and as many prompt tokens as still fit.
Slots are sequence numbers; they are filled from the lowest, because llama.cpp splits a batch whose sequence numbers
have gaps.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lora2edge.backends.gguf.llama_cpp import Batch, Library
from lora2edge.backends.scheduler import Request
from lora2edge.errors import Lora2EdgeError

if TYPE_CHECKING:
    from lora2edge.contracts import FloatArray


class Context:
    """A `llama_context *`, which it owns and frees in `close`: the scheduler's Engine."""

    session = "GGUF"
    runtime = "llama.cpp"

    def __init__(self, library: Library, context: int, *, vocab_size: int, max_rows: int) -> None:
        self._library, self._c, self._context = library, library.c, context
        self._memory = self._c.llama_get_memory(context)
        self._vocab_size = vocab_size
        self._max_rows = max_rows
        self._batch = _BatchArrays(self._c.llama_n_batch(context))
        self._view_key: tuple[int, int] = (0, 0)
        self._view: FloatArray = np.empty((0, vocab_size), np.float32)

    def turn(self, active: Sequence[Request]) -> list[tuple[Request, FloatArray]]:
        """One llama_decode: fills the batch, runs it, and says which rows of its output are whose."""
        outputs = self._fill(active)
        if not self._batch.count:
            return []
        status = self._c.llama_decode(self._context, self._batch.struct)
        if status:
            raise Lora2EdgeError(
                "llama-decode",
                f"llama.cpp could not compute a batch of {self._batch.count} tokens (status {status})",
                why=self._library.take_errors(),
            )
        rows = self._rows(sum(count for _, count in outputs))
        stops = itertools.accumulate(count for _, count in outputs)
        return [(request, rows[stop - count : stop]) for (request, count), stop in zip(outputs, stops, strict=True)]

    def _fill(self, active: Sequence[Request]) -> list[tuple[Request, int]]:
        """Writes the batch; returns who gets how many of its output rows, in the batch's order."""
        batch = self._batch
        batch.clear()
        outputs: list[tuple[Request, int]] = []
        answering = sorted((request for request in active if request.answering), key=_slot)
        for request in answering:
            batch.add(request.slot, request.length, request.token, 1)
            request.length += 1
            outputs.append((request, 1))
        rows_left = self._max_rows - len(outputs)
        for request in active:
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

    def release(self, request: Request) -> None:
        """Removes the sequence from the context's memory."""
        self._c.llama_memory_seq_rm(self._memory, request.slot, -1, -1)

    def reset(self) -> None:
        """Empties the context's memory."""
        self._c.llama_memory_clear(self._memory, True)

    def close(self) -> None:
        """Frees the context."""
        self._c.llama_free(self._context)


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


def _slot(request: Request) -> int:
    return request.slot
