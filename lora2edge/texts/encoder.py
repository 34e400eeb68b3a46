"""Texts to what a classifier takes, by the checkpoint's own tokenizer.json and its post-processor."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from typing import Any

from lora2edge.checkpoint import read_tokenizer_file
from lora2edge.contracts import Encoded, LabelledItem, LabelledSample, TokenizerFiles
from lora2edge.errors import CheckpointError

_NO_SEGMENTS = "TokenizersBackend"
"""transformers 5's class for a tokenizer of no model's own gives no segment ids, unless model_input_names has them."""


class TextEncoder:
    """Token and segment ids of texts. `segments`: how many kinds of segments the model tells apart (`segment_count`).

    As in transformers, which classifiers are trained with, a special token's name inside a text is that token.
    Raises CheckpointError where there is no tokenizer.json, or a broken one.
    """

    def __init__(self, tokenizer: TokenizerFiles, segments: int) -> None:
        import tokenizers

        self._source = read_tokenizer_file(tokenizer, "tokenizer.json")
        if not self._source:
            raise CheckpointError(
                "no-tokenizer-json",
                "the checkpoint has no tokenizer.json",
                hint="AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER) writes one",
            )
        try:
            self.tokenizer: Any = tokenizers.Tokenizer.from_file(str(tokenizer.files["tokenizer.json"]))
            """The tokenizers library's own object, without padding and truncation."""
        except Exception as error:  # the Rust library raises plain Exception
            raise CheckpointError("broken-tokenizer", "tokenizer.json cannot be read", why=str(error)) from error
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        config = read_tokenizer_file(tokenizer, "tokenizer_config.json")
        inputs = config.get("model_input_names")
        told_apart = config.get("tokenizer_class") != _NO_SEGMENTS if inputs is None else "token_type_ids" in inputs
        self._segments = segments if told_apart else 0

    def encode(self, text: str, pair: str | None = None) -> Encoded:
        """Ids with the special tokens that the post-processor adds; nothing is cut."""
        return self._encoded(self.tokenizer.encode(text, pair))

    def encode_words(self, words: Sequence[str]) -> tuple[Encoded, list[int | None]]:
        """The same for words, and the place of each one's first token; None for a word that gives no token."""
        found = self._for_words.encode(list(words), is_pretokenized=True)
        places: list[int | None] = [None] * len(words)
        for place, word in enumerate(found.word_ids):
            if word is not None and places[word] is None:
                places[word] = place
        return self._encoded(found), places

    def sample(self, item: LabelledItem) -> LabelledSample:
        """`item`, encoded. Words without a token, or without a class, are not among its positions."""
        places: list[int | None] = [0]
        if item.words:
            encoded, places = self.encode_words(item.words)
        else:
            encoded = self.encode(item.text, item.pair)
        pairs = zip(places, item.gold, strict=True)
        scored = [(place, gold) for place, gold in pairs if place is not None and gold is not None]
        return LabelledSample(encoded, tuple(at for at, _ in scored), tuple(gold for _, gold in scored), item)

    def _encoded(self, found: Any) -> Encoded:
        types = tuple(int(kind) for kind in found.type_ids)
        if max(types, default=0) >= max(1, self._segments):
            types = ()  # a model with one kind of segment, or with none, was trained without them
        return Encoded(tuple(int(token) for token in found.ids), types if any(types) else ())

    @functools.cached_property
    def _for_words(self) -> Any:
        """The tokenizer with a space before each word, where it is of bytes: as transformers demands of words."""
        import tokenizers

        source = json.loads(json.dumps({**self._source, "padding": None, "truncation": None}))
        changed = False
        for part in _parts(source.get("pre_tokenizer")):
            if part.get("type") == "ByteLevel" and part.get("use_regex", True) and not part.get("add_prefix_space"):
                part["add_prefix_space"] = changed = True
        return tokenizers.Tokenizer.from_str(json.dumps(source)) if changed else self.tokenizer


def _parts(step: Any) -> list[dict[str, Any]]:
    """A pre-tokenizer and, where it is a sequence, its members."""
    if not isinstance(step, dict):
        return []
    return [step, *(part for inner in step.get("pretokenizers") or [] for part in _parts(inner))]
