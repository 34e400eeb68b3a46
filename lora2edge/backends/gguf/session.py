"""A GGUF file, opened with llama.cpp: logits and generation."""

from __future__ import annotations

import atexit
import ctypes
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from lora2edge.backends.gguf.context import Context
from lora2edge.backends.gguf.llama_cpp import Kind, Library, load_library
from lora2edge.backends.gguf.tokens import Vocabulary, load_model
from lora2edge.backends.scheduler import Request, Scheduler, ask, check_kept, check_prompt, check_room
from lora2edge.contracts import GREEDY, Message, Sampling, SessionFacts
from lora2edge.errors import InputError, UnsupportedError

if TYPE_CHECKING:
    from lora2edge.contracts import FloatArray

CHUNK_TOKENS = 512
"""Prompt tokens in one llama_decode; longer prompts are read in several, beside the answers under way."""
OUTPUT_BYTES = 64 << 20
"""Bound of llama.cpp's output buffer, which would take 311 MB for 512 rows of a 152k vocabulary."""
SCORED_BYTES = 256 << 20
"""Bound of the logits that `logits` computes ahead of its reader."""
MOST_SLOTS = 256
"""LLAMA_MAX_SEQ."""
CACHE_TYPES = {"f32": 0, "f16": 1}
"""`ggml_type` of the attention cache."""
FLASH_ATTENTION_OFF = 0

Cache = Literal["f32", "f16"]


class GgufSession:
    """`contracts.Session` over llama.cpp. Made by `open_session`.

    Requests beyond the slots wait. What is decoded together is one matrix product, whose shape changes the order
    of additions: with several slots the logits differ from those of one slot in the last bits, and a greedy answer
    can differ where two tokens are that close. `logits` alone on a session is repeatable bit by bit.
    """

    def __init__(self, vocabulary: Vocabulary, scheduler: Scheduler, facts: SessionFacts, *, rows_ahead: int) -> None:
        self._vocabulary = vocabulary
        self._scheduler = scheduler
        self._facts = facts
        self._rows_ahead = rows_ahead
        self._numbers = itertools.count()
        self._process = os.getpid()
        atexit.register(self.close)  # a daemon thread inside llama.cpp would crash the interpreter's end

    @property
    def facts(self) -> SessionFacts:
        return self._facts

    @property
    def vocabulary(self) -> Vocabulary:
        """The artifact's own tokenizer."""
        return self._vocabulary

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Ids of the rendered conversation with the generation prompt; see `Vocabulary.encode`."""
        return self._vocabulary.encode(messages)

    def tokenize(self, text: str, *, special: bool) -> list[int]:
        """Ids of `text`, no BOS or EOS added; `special`: markers in it become their ids."""
        return self._vocabulary.tokenize(text, special=special)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, control tokens left out."""
        return self._vocabulary.decode(ids)

    def token_id(self, text: str) -> int | None:
        """The id of the token that is written `text` in the vocabulary; None where there is none."""
        return self._vocabulary.token_id(text)

    def logits(self, batch: Sequence[Sequence[int]], keep: Sequence[Sequence[int]]) -> Iterator[FloatArray]:
        """For each sequence, in order: `[len(keep[i]), V]` float32, the caller's own array.

        Tokens after the last kept position are not computed. Raises InputError at the call for a sequence that is
        too long, an id outside the vocabulary or a position outside the sequence.
        """
        check_kept(batch, keep)
        for ids in batch:
            self._require(ids, 0)
        return self._score(batch, keep)

    def generate(
        self, ids: Sequence[int], *, max_new: int, stop: Sequence[int], sampling: Sampling = GREEDY
    ) -> Iterator[int]:
        """New token ids, without the stop token. The request is queued at the call, not at the first `next`.

        Sampling with a temperature draws from a generator seeded with the request's number in this session.
        Raises InputError at the call where the prompt is empty, or together with `max_new` longer than a slot.
        """
        check_prompt(ids, max_new)
        self._require(ids, max_new)
        number = next(self._numbers)
        return ask(self._scheduler, ids, max_new=max_new, stop=stop, sampling=sampling, number=number)

    def close(self) -> None:
        """Ends the requests under way with an error and frees the model; harmless when done twice."""
        atexit.unregister(self.close)
        if os.getpid() == self._process:
            self._scheduler.close()
            self._vocabulary.close()

    def __enter__(self) -> GgufSession:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _score(self, batch: Sequence[Sequence[int]], keep: Sequence[Sequence[int]]) -> Iterator[FloatArray]:
        for group in self._groups(keep):
            requests = [_scoring(batch[index], keep[index], self._vocabulary.size) for index in group]
            try:
                self._scheduler.submit([request for request in requests if len(request.ids)])
                for index, request in zip(group, requests, strict=True):
                    yield _scored(request, keep[index])
            finally:
                for request in requests:
                    self._scheduler.cancel(request)

    def _groups(self, keep: Sequence[Sequence[int]]) -> Iterator[list[int]]:
        """Sequences that are computed together. The split depends on the input alone, so that logits repeat."""
        group: list[int] = []
        rows = 0
        for index, positions in enumerate(keep):
            if group and (len(group) == self._facts.slots or rows + len(positions) > self._rows_ahead):
                yield group
                group, rows = [], 0
            group.append(index)
            rows += len(positions)
        if group:
            yield group

    def _require(self, ids: Sequence[int], max_new: int) -> None:
        """Raises InputError for what llama.cpp would answer by ending the process."""
        if os.getpid() != self._process:
            raise InputError("forked", "a GGUF session cannot be used in a forked process", hint="open one there")
        check_room(ids, max_new, self._facts.max_length)
        self._vocabulary.require_ids(ids)


def open_session(
    path: Path,
    *,
    library: Kind = "auto",
    device: str,
    threads: int,
    slots: int,
    max_length: int,
    cache: Cache = "f16",
) -> GgufSession:
    """Opens the GGUF file `path` with room for `slots` sequences of `max_length` tokens each.

    `device`: "cpu", "cuda", or "auto" (the GPU where the library was built for one). `cache`: type of the keys and
    values kept; float16, with flash attention where llama.cpp chooses it, is its default and what users run.
    Raises InputError where the file, the length or the memory does not fit, and what `load_library` raises.
    """
    if threads < 1 or not 1 <= slots <= MOST_SLOTS or max_length < 1:
        raise InputError(
            "session-options",
            f"threads {threads}, slots {slots}, max_length {max_length} cannot be had",
            why=f"each must be at least 1, and slots at most {MOST_SLOTS}",
        )
    loaded = load_library(library)
    offload = _offload(loaded, device)
    vocabulary = Vocabulary(loaded, load_model(loaded, path, offload=offload))
    try:
        longest = loaded.c.llama_model_n_ctx_train(vocabulary.model)
        if max_length > longest:
            raise InputError(
                "too-long",
                f"max_length {max_length} exceeds the {longest} positions that the model was made for",
                hint=f"use max_length {longest}",
            )
        rows = max(slots, min(CHUNK_TOKENS, OUTPUT_BYTES // (4 * vocabulary.size)))
        context = _open_context(
            loaded,
            vocabulary.model,
            offload=offload,
            threads=threads,
            slots=slots,
            max_length=max_length,
            rows=rows,
            cache=cache,
        )
    except BaseException:
        vocabulary.close()
        raise
    engine = Context(loaded, context, vocab_size=vocabulary.size, max_rows=rows)
    scheduler = Scheduler(engine, slots=slots)
    dtype = f"weights {_weight_type(loaded, vocabulary)}, cache {cache.upper()}"
    facts = _facts(loaded, dtype, offload=offload, threads=threads, slots=slots, max_length=max_length)
    return GgufSession(vocabulary, scheduler, facts, rows_ahead=SCORED_BYTES // (4 * vocabulary.size))


def _open_context(
    library: Library,
    model: int,
    *,
    offload: bool,
    threads: int,
    slots: int,
    max_length: int,
    rows: int,
    cache: Cache,
) -> int:
    params = library.c.llama_context_default_params()
    per_slot = -(-max_length // 256) * 256  # llama.cpp rounds so itself, but down over all slots
    params.n_ctx = slots * per_slot
    params.n_batch = params.n_ubatch = max(CHUNK_TOKENS, slots)
    params.n_outputs_max = rows
    params.n_seq_max = slots
    params.n_threads = params.n_threads_batch = threads
    params.offload_kqv = params.op_offload = offload
    params.kv_unified = False
    params.type_k = params.type_v = CACHE_TYPES[cache]
    if cache == "f32":
        params.flash_attn_type = FLASH_ATTENTION_OFF  # which would round a float32 cache to float16
    library.take_errors()
    context = library.c.llama_init_from_model(model, params)
    if not context:
        raise InputError(
            "gguf-context",
            f"llama.cpp cannot make room for {slots} slots of {max_length} tokens",
            why=library.take_errors() or "no reason was given",
            hint="use fewer slots or a smaller max_length",
        )
    if library.c.llama_n_ctx_seq(context) < max_length:
        given = library.c.llama_n_ctx_seq(context)
        library.c.llama_free(context)
        raise InputError("gguf-context", f"llama.cpp gave each slot {given} tokens, {max_length} were asked for")
    return int(context)


def _offload(library: Library, device: str) -> bool:
    if device not in {"auto", "cpu", "cuda"}:
        raise InputError("device", f"there is no device {device!r}", hint="use cpu, cuda or auto")
    can = bool(library.c.llama_supports_gpu_offload())
    if device == "cuda" and not can:
        raise UnsupportedError(
            "no-gpu-build",
            f"{library.facts['library']} {library.facts['version']} was built without a GPU",
            hint="CMAKE_ARGS=-DGGML_CUDA=on pip install --force-reinstall --no-binary llama-cpp-python "
            "'lora2edge[gguf-native]'",
        )
    return can and device != "cpu"


def _facts(library: Library, dtype: str, *, offload: bool, threads: int, slots: int, max_length: int) -> SessionFacts:
    return SessionFacts(
        backend="gguf",
        device=library.device_names()[0] if offload else "cpu",
        dtype=dtype,
        slots=slots,
        threads=threads,
        max_length=max_length,
        batching=(
            f"continuous: up to {slots} requests are decoded together, prompts are read beside them in chunks of "
            f"{CHUNK_TOKENS} tokens; no prompt cache"
        ),
        build=f"{library.facts['library']} {library.facts['version']} {library.facts['build']}",
        versions={
            library.facts["library"]: library.facts["version"],
            "llama.cpp": library.facts["llama_cpp"],
        },
    )


def _weight_type(library: Library, vocabulary: Vocabulary) -> str:
    """llama.cpp's words for the weights: the end of its description, e.g. of "qwen2 0.5B Q4_K - Medium"."""
    buffer = ctypes.create_string_buffer(128)
    library.c.llama_model_desc(vocabulary.model, buffer, len(buffer))
    return buffer.value.decode("utf-8", "replace").split(" ", 2)[-1]


def _scoring(ids: Sequence[int], keep: Sequence[int], vocab_size: int) -> Request:
    """A request for the logits of the kept positions, each once and in the sequence's order."""
    positions = sorted(set(keep))
    used = ids[: positions[-1] + 1] if positions else ()
    wanted = np.zeros(len(used), np.int8)
    wanted[positions] = 1
    return Request(np.asarray(used, np.int32), wanted, rows=np.empty((len(positions), vocab_size), np.float32))


def _scored(request: Request, keep: Sequence[int]) -> FloatArray:
    """Waits for the rows, and puts them into the order that was asked for."""
    rows = request.rows
    if rows is None or not len(request.ids):
        return np.empty((0, 0), np.float32) if rows is None else rows
    event = request.events.get()
    if isinstance(event, Exception):
        raise event
    positions = sorted(set(keep))
    return rows if list(keep) == positions else rows[np.searchsorted(positions, keep)]
