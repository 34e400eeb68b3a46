"""Texts to what a classifier takes, by the checkpoint's own tokenizer.json and its post-processor."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from lora2edge.checkpoint import read_tokenizer_file
from lora2edge.contracts import Encoded, LabelledItem, LabelledSample, TokenizerFiles
from lora2edge.errors import CheckpointError
from lora2edge.texts.tokenizer import open_tokenizer

_NO_SEGMENTS = "TokenizersBackend"
"""transformers 5's class for a tokenizer of no model's own gives no segment ids, unless model_input_names has them."""
_AS_STORED = (_NO_SEGMENTS, "PreTrainedTokenizerFast")
"""Classes that take tokenizer.json as it is. Those of a model set some of its steps from tokenizer_config.json."""

_OF_BERT = {
    "do_lower_case": "lowercase", "strip_accents": "strip_accents", "tokenize_chinese_chars": "handle_chinese_chars",
}  # fmt: skip
"""Setting in tokenizer_config.json → the same of tokenizer.json's BertNormalizer."""


class TextEncoder:
    """Token and segment ids of texts. `segments`: how many kinds of segments the model tells apart (`segment_count`).

    As in transformers, which classifiers are trained with, a special token's name inside a text is that token.
    Raises CheckpointError where there is no tokenizer.json, a broken one, or one that tokenizer_config.json
    contradicts: transformers follows the latter, and runtimes that know tokenizer.json alone follow the former.
    """

    def __init__(self, tokenizer: TokenizerFiles, segments: int) -> None:
        self.tokenizer: Any
        """The tokenizers library's own object, without padding and truncation."""
        self._source, self.tokenizer = open_tokenizer(tokenizer)
        config = read_tokenizer_file(tokenizer, "tokenizer_config.json")
        inputs = config.get("model_input_names")
        _check_agreement(self._source, config)
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


def _check_agreement(source: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Raises CheckpointError where a setting of tokenizer_config.json is another one in tokenizer.json."""
    kind = config.get("tokenizer_class")
    if kind in _AS_STORED:
        return
    for part in _parts(source.get("normalizer")):
        if part.get("type") == "BertNormalizer":
            # A class of BERT's kin has these defaults where its configuration is silent.
            told = {"do_lower_case": True, "strip_accents": None, "tokenize_chinese_chars": True} if kind else {}
            told |= {key: config[key] for key in _OF_BERT if key in config}
            stored = {key: part.get(name) for key, name in _OF_BERT.items()}
            _compare(stored | told, stored)
    for part in _parts(source.get("pre_tokenizer")):
        if part.get("type") == "ByteLevel" and isinstance(told_space := config.get("add_prefix_space"), bool):
            _compare({"add_prefix_space": told_space}, {"add_prefix_space": bool(part.get("add_prefix_space"))})


def _compare(told: dict[str, Any], stored: dict[str, Any]) -> None:
    for values in (told, stored):
        if values.get("strip_accents", False) is None:  # accents go where capitals do
            values["strip_accents"] = values["do_lower_case"]
    key = next((key for key, value in told.items() if value != stored[key]), None)
    if key:
        raise CheckpointError(
            "tokenizer-contradiction",
            f"{key} is {str(told[key]).lower()} in tokenizer_config.json, and {str(stored[key]).lower()} in "
            "tokenizer.json",
            why="transformers, which trains, follows tokenizer_config.json or its own default; other runtimes read "
            "tokenizer.json alone, and the same text would be other tokens",
            hint="AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER) makes tokenizer.json follow",
        )


def _parts(step: Any) -> list[dict[str, Any]]:
    """A normalizer or pre-tokenizer and, where it is a sequence, its members."""
    if not isinstance(step, dict):
        return []
    inside = [*(step.get("pretokenizers") or []), *(step.get("normalizers") or [])]
    return [step, *(part for inner in inside for part in _parts(inner))]
