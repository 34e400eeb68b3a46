"""A decoder artifact, opened with ONNX Runtime: logits and generation."""

from __future__ import annotations

import atexit
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lora2edge.backends.onnxruntime.artifact_files import check_options, padding_of, tokenizer_of
from lora2edge.backends.onnxruntime.decoder import Cache, Call, Decoder
from lora2edge.backends.onnxruntime.engine import CHUNK_TOKENS, DecoderEngine
from lora2edge.backends.onnxruntime.finalize import open_finalized
from lora2edge.backends.onnxruntime.runtime import Device, Opened
from lora2edge.backends.scheduler import Answer, Scheduler, ask, check_kept, check_prompt, check_room
from lora2edge.contracts import GREEDY, Message, Sampling, SessionFacts
from lora2edge.errors import InputError
from lora2edge.texts import Renderer

if TYPE_CHECKING:
    from lora2edge.contracts import FloatArray, IntArray

BATCH_TOKENS = 1024
"""Padded tokens that are scored together. A longer sequence is scored in chunks of as many, on a cache of its own."""
BATCH_BYTES = 64 << 20
"""Bound of the logits of one call, but for a single sequence's."""
_LEAST_TOKENS = 64
"""Of a chunk, however large the vocabulary: fewer would not use the processor."""
SCORED_BYTES = 256 << 20
"""Bound of the logits that `logits` computes ahead of its reader."""


class OnnxSession:
    """`contracts.Session` over ONNX Runtime. Made by `open_session`.

    Requests beyond the slots wait. Which other requests are decoded beside one changes the order of additions: logits
    differ in the last bits, and a greedy answer can differ where two tokens are that close. With weights in
    int8-dynamic they differ as much as by rounding: one scale holds for the activations of all tokens of a call, those
    of other requests and of padding included. `logits` is repeatable for the same batch.
    """

    def __init__(
        self, opened: Opened, decoder: Decoder, folder: Path, facts: SessionFacts, *, is_alone: bool = False
    ) -> None:
        self._decoder = decoder
        self._most_rows = 1 if is_alone else BATCH_TOKENS
        self._facts = facts
        self._opened = opened
        self._folder = folder
        self._renderer: Renderer | None = None
        self._padding = padding_of(folder)
        self._numbers = itertools.count()
        self._closed = False
        self._process = os.getpid()
        engine = DecoderEngine(self._decoder, slots=facts.slots, max_length=facts.max_length)
        self._scheduler = Scheduler(engine, slots=facts.slots)
        atexit.register(self.close)  # a daemon thread inside ONNX Runtime would crash the interpreter's end

    @property
    def facts(self) -> SessionFacts:
        return self._facts

    @property
    def opened(self) -> Opened:
        """What runs where: `opened.nodes`."""
        return self._opened

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Token ids by the artifact's own tokenizer.json and chat template, with the generation prompt."""
        return self._tokenizer().encode(messages)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, special tokens left out."""
        return self._tokenizer().decode(ids)

    def logits(self, batch: Sequence[Sequence[int]], keep: Sequence[Sequence[int]]) -> Iterator[FloatArray]:
        """For each sequence, in order: `[len(keep[i]), V]` float32, the caller's own array.

        Tokens after the last kept position are not computed. Raises InputError at the call for a sequence that is
        too long or padded, an id outside the vocabulary or a position outside the sequence.
        """
        check_kept(batch, keep)
        for ids in batch:
            self._require(ids, 0)
        return self._score(batch, keep)

    def generate(self, ids: Sequence[int], *, max_new: int, stop: Sequence[int], sampling: Sampling = GREEDY) -> Answer:
        """New token ids, without the stop token. The request is queued at the call, not at the first `next`.

        Sampling with a temperature draws from a generator seeded with the request's number in this session.
        Raises InputError at the call where the prompt is empty or padded, or together with `max_new` longer than a
        slot.
        """
        check_prompt(ids, max_new)
        self._require(ids, max_new)
        number = next(self._numbers)
        return ask(self._scheduler, ids, max_new=max_new, stop=stop, sampling=sampling, number=number)

    def close(self) -> None:
        """Ends the requests under way with an error; harmless when done twice."""
        atexit.unregister(self.close)
        self._closed = True
        if os.getpid() == self._process:
            self._scheduler.close()

    def __enter__(self) -> OnnxSession:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _tokenizer(self) -> Renderer:
        if self._renderer is None:
            self._renderer = Renderer(tokenizer_of(self._folder))
        return self._renderer

    def _score(self, batch: Sequence[Sequence[int]], keep: Sequence[Sequence[int]]) -> Iterator[FloatArray]:
        kept = [sorted(set(positions)) for positions in keep]
        used = [ids[: wanted[-1] + 1] if wanted else () for ids, wanted in zip(batch, kept, strict=True)]
        for window in self._windows(kept):
            found: dict[int, FloatArray] = {}
            for group in self._groups(window, used, kept):
                if self._closed:
                    raise InputError("session-closed", "the ONNX Runtime session was closed")
                if len(used[group[0]]) > BATCH_TOKENS:
                    found[group[0]] = self._score_long(used[group[0]], kept[group[0]])
                else:
                    found.update(self._score_group(group, used, kept))
            for index in window:
                rows = found.pop(index, None)
                if rows is None:
                    yield np.empty((0, self._decoder.vocab_size), np.float32)
                elif list(keep[index]) == kept[index]:
                    yield rows
                else:
                    yield rows[np.searchsorted(kept[index], keep[index])]

    def _windows(self, kept: Sequence[Sequence[int]]) -> Iterator[list[int]]:
        """Sequences whose logits are held together until they are read."""
        most = SCORED_BYTES // (4 * self._decoder.vocab_size)
        window: list[int] = []
        rows = 0
        for index, positions in enumerate(kept):
            if window and rows + len(positions) > most:
                yield window
                window, rows = [], 0
            window.append(index)
            rows += len(positions)
        if window:
            yield window

    def _groups(
        self, window: Sequence[int], used: Sequence[Sequence[int]], kept: Sequence[Sequence[int]]
    ) -> Iterator[list[int]]:
        """Sequences of one call, of similar lengths; those of which nothing is wanted are in none."""
        most = BATCH_BYTES // (4 * self._decoder.vocab_size)
        group: list[int] = []
        widest = 0
        for index in sorted((index for index in window if kept[index]), key=lambda index: len(used[index])):
            length = len(used[index])
            rows = len(kept[index]) if self._decoder.picks_positions else length
            count = len(group) + 1
            if group and (count > self._most_rows or count * length > BATCH_TOKENS or count * max(widest, rows) > most):
                yield group
                group, widest = [], 0
            group.append(index)
            widest = max(widest, rows)
        if group:
            yield group

    def _score_group(
        self, group: Sequence[int], used: Sequence[Sequence[int]], kept: Sequence[Sequence[int]]
    ) -> Iterator[tuple[int, FloatArray]]:
        positions = np.zeros((len(group), max(len(kept[index]) for index in group)), np.int64)
        for row, index in enumerate(group):
            positions[row, : len(kept[index])] = kept[index]
        logits = self._decoder.run_rows([used[index] for index in group], positions)
        for row, index in enumerate(group):
            found = logits[row, : len(kept[index])]
            yield index, found if len(group) == 1 else found.copy()

    def _score_long(self, ids: Sequence[int], kept: Sequence[int]) -> FloatArray:
        """One sequence in chunks: attention of all of it to all of it at once would grow with its square."""
        call = Call(self._decoder, Cache(self._decoder, 1, len(ids)), 0, 1)
        tokens = np.asarray(ids, np.int64)[None]
        wanted: IntArray = np.asarray(kept, np.int64)
        rows = np.empty((len(kept), self._decoder.vocab_size), np.float32)
        most = BATCH_BYTES // (4 * self._decoder.vocab_size)
        step = BATCH_TOKENS if len(kept) <= most else max(_LEAST_TOKENS, min(BATCH_TOKENS, most))
        if (switch := self._decoder.switch_length) is not None and len(ids) > switch:
            step = len(ids)
        for start in range(0, len(ids), step):
            stop = min(len(ids), start + step)
            first, last = np.searchsorted(wanted, (start, stop))
            mask = np.ones((1, stop), np.int64)
            if first == last:
                call.run(tokens[:, start:stop], mask)
            else:
                call.run_kept(tokens[:, start:stop], mask, wanted[first:last] - start, rows[first:last])
        return rows

    def _require(self, ids: Sequence[int], max_new: int) -> None:
        if os.getpid() != self._process:
            raise InputError(
                "forked", "an ONNX Runtime session cannot be used in a forked process", hint="open one there"
            )
        if self._closed:
            raise InputError("session-closed", "the ONNX Runtime session was closed")
        check_room(ids, max_new, self._facts.max_length)
        if ids and (min(ids) < 0 or max(ids) >= self._decoder.vocab_size):
            wrong = next(token for token in ids if not 0 <= token < self._decoder.vocab_size)
            raise InputError("token-id", f"token id {wrong} is not in the vocabulary of {self._decoder.vocab_size}")
        if self._padding is not None:
            self._padding.refuse(ids)


def open_session(
    folder: Path,
    *,
    device: Device,
    threads: int,
    slots: int,
    max_length: int,
    weights: str = "",
    is_alone: bool = False,
) -> OnnxSession:
    """Opens the artifact in `folder` with room for `slots` sequences of `max_length` tokens each.

    `weights`: their type in words, for the facts. `is_alone`: each sequence is computed by itself, since what is in the
    same call would change its answer (activations that share one range). Raises InputError where the files, the length
    or the memory does not fit, and what `open_model` raises.
    """
    check_options(folder, max_length, threads=threads, slots=slots)
    slots = 1 if is_alone else slots
    opened = open_finalized(folder, device=device, threads=threads)
    decoder = Decoder(opened)
    facts = SessionFacts(
        backend="onnxruntime",
        device=device,
        dtype=", ".join(filter(None, (weights and f"weights {weights}", f"cache {decoder.cache_type.name}"))),
        slots=slots,
        threads=threads,
        max_length=max_length,
        batching="one request at a time: what is in the same call would change its answer"
        if is_alone
        else (
            f"continuous: up to {slots} requests are decoded together, prompts are read beside them in chunks of "
            f"{CHUNK_TOKENS[device]} tokens; no prompt cache"
        ),
        build=opened.build,
        versions=opened.versions,
    )
    return OnnxSession(opened, decoder, folder, facts, is_alone=is_alone)
