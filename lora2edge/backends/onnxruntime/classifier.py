"""An encoder artifact, opened with ONNX Runtime: logits of classes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lora2edge.backends.onnxruntime.artifact_files import (
    check_options,
    padding_of,
    read_config,
    tokenizer_of,
)
from lora2edge.backends.onnxruntime.finalize import open_finalized
from lora2edge.backends.onnxruntime.runtime import Device, Opened
from lora2edge.contracts import Encoded, SessionFacts
from lora2edge.errors import InputError, UnsupportedError
from lora2edge.texts import TextEncoder, class_names

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lora2edge.contracts import FloatArray, IntArray

BATCH_TOKENS = {"cpu": 4096, "cuda": 65536}
"""Padded tokens of one call: matrices are at full speed long before, and activations stay below 200 MB for BERT-base.
A larger batch is classified in several calls."""
_INPUTS = {"input_ids", "attention_mask", "token_type_ids"}


class OnnxClassifier:
    """`contracts.Classifier` over ONNX Runtime. Made by `open_classifier`. Safe to call from several threads."""

    def __init__(self, opened: Opened, folder: Path, facts: SessionFacts) -> None:
        self._opened = opened
        self._session: Any = opened.session
        self._folder = folder
        self._facts = facts
        self._encoder: TextEncoder | None = None
        inputs = {value.name for value in self._session.get_inputs()}
        outputs = [value for value in self._session.get_outputs() if value.name == "logits"]
        if not outputs or not {"input_ids", "attention_mask"} <= inputs <= _INPUTS:
            raise UnsupportedError(
                "classifier-inputs",
                f"{opened.folder} holds no classifier that can be run",
                why=f"its inputs are {', '.join(sorted(inputs))}; logits are {'there' if outputs else 'missing'}",
                hint="lora2edge inspect says what the artifact was made for",
            )
        config = read_config(folder)
        self._has_types = "token_type_ids" in inputs
        self._type_count = int(config.get("type_vocab_size", 2)) if self._has_types else 0
        self._vocabulary = int(config.get("vocab_size", 0))
        self._padding = padding_of(folder)
        self._labels = _names(outputs[0].shape[-1], config)

    @property
    def facts(self) -> SessionFacts:
        return self._facts

    @property
    def opened(self) -> Opened:
        """What runs where: `opened.nodes`."""
        return self._opened

    @property
    def labels(self) -> Sequence[str]:
        """config.json's names of the classes, in the order of the logits."""
        return self._labels

    def encode(self, text: str, pair: str | None = None) -> Encoded:
        """Ids with the special tokens of tokenizer.json's post-processor; not cut, however long."""
        if self._encoder is None:
            self._encoder = TextEncoder(tokenizer_of(self._folder), self._type_count)
        return self._encoder.encode(text, pair)

    def classify(self, batch: Sequence[Encoded]) -> list[FloatArray]:
        """For each text, in order, float32 logits: `[labels]`, or `[tokens, labels]` where tokens are classified.

        Padded on the right, in calls of at most BATCH_TOKENS padded tokens: similar lengths together where one call is
        not enough. Raises InputError for a text that is empty, too long or padded already, or has ids out of range.
        """
        for item in batch:
            self._require(item)
        found: dict[int, FloatArray] = {}
        for group in _groups([len(item.ids) for item in batch], BATCH_TOKENS[self._opened.device]):
            logits = self._run([batch[index] for index in group])
            for row, index in enumerate(group):
                # Copies: a text's logits must not keep its whole batch in memory.
                found[index] = (logits[row] if logits.ndim == 2 else logits[row, : len(batch[index].ids)]).copy()
        return [found[index] for index in range(len(batch))]

    def close(self) -> None:
        """Frees the model; harmless when done twice."""
        self._session = None

    def __enter__(self) -> OnnxClassifier:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, texts: Sequence[Encoded]) -> FloatArray:
        if (session := self._session) is None:
            raise InputError("session-closed", "the ONNX Runtime session was closed")
        width = max(len(item.ids) for item in texts)
        ids: IntArray = np.full((len(texts), width), self._padding.id if self._padding else 0, np.int64)
        mask, types = np.zeros_like(ids), np.zeros_like(ids)
        for row, item in enumerate(texts):
            ids[row, : len(item.ids)] = item.ids
            mask[row, : len(item.ids)] = 1
            types[row, : len(item.types)] = item.types
        feeds: dict[str, NDArray[Any]] = {"input_ids": ids, "attention_mask": mask}
        if self._has_types:
            feeds["token_type_ids"] = types
        logits: FloatArray = session.run(["logits"], feeds)[0]
        return logits

    def _require(self, item: Encoded) -> None:
        if not item.ids:
            raise InputError("empty-text", "a text needs at least one token")
        if len(item.ids) > self._facts.max_length:
            raise InputError(
                "too-long",
                f"a text of {len(item.ids)} tokens exceeds the session's max_length of {self._facts.max_length}",
                hint="shorten the text, or open the session with a larger max_length where the model has room",
            )
        if item.types and len(item.types) != len(item.ids):
            raise InputError("token-types", f"{len(item.types)} segment ids for {len(item.ids)} tokens")
        if self._has_types and item.types and not 0 <= min(item.types) <= max(item.types) < self._type_count:
            raise InputError("token-types", f"segment ids to {max(item.types)}, the model has {self._type_count}")
        if self._vocabulary and not 0 <= min(item.ids) <= max(item.ids) < self._vocabulary:
            wrong = next(token for token in item.ids if not 0 <= token < self._vocabulary)
            raise InputError("token-id", f"token id {wrong} is not in the vocabulary of {self._vocabulary}")
        if self._padding is not None:
            self._padding.refuse(item.ids)


def open_classifier(
    folder: Path, *, device: Device, threads: int, max_length: int, weights: str = ""
) -> OnnxClassifier:
    """Opens the artifact in `folder` for texts of up to `max_length` tokens.

    `weights`: their type in words, for the facts. Raises InputError where the files, the labels or the length do not
    fit, and what `open_model` raises.
    """
    check_options(folder, max_length, threads=threads)
    opened = open_finalized(folder, device=device, threads=threads)
    facts = SessionFacts(
        backend="onnxruntime",
        device=device,
        dtype=f"weights {weights}" if weights else "float32",
        slots=1,
        threads=threads,
        max_length=max_length,
        batching=f"a batch is one call, or several of {BATCH_TOKENS[device]} tokens, padded on the right",
        build=opened.build,
        versions=opened.versions,
    )
    return OnnxClassifier(opened, folder, facts)


def _names(count: int, config: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the graph's classes; as in transformers, LABEL_0, LABEL_1, … where config.json names none."""
    if not config.get("id2label"):
        return tuple(f"LABEL_{index}" for index in range(count))
    names = class_names(config)
    if len(names) != count:
        raise InputError(
            "bad-labels",
            f"config.json names {len(names)} labels, the model has {count}",
            hint="build the artifact again, with the config.json of the classifier's own base",
        )
    return names


def _groups(lengths: Sequence[int], most: int) -> Iterator[list[int]]:
    """Indices of the texts of each call: all at once, or, where that is too much, sorted by length."""
    if lengths and len(lengths) * max(lengths) <= most:
        yield list(range(len(lengths)))
        return
    group: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: lengths[index]):
        if group and (len(group) + 1) * lengths[index] > most:
            yield group
            group = []
        group.append(index)
    if group:
        yield group
