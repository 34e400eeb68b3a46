"""Texts that an exported graph is compared with the merged model on."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from lora2edge.contracts import Checkpoint, Encoded
from lora2edge.errors import CheckpointError

_LENGTHS = (5, 24, 128)
_BEYOND = 8
"""Tokens that a long prompt has more than a window holds."""
_WINDOWS = {
    "sliding_window",
    "attention_chunk_size",
    "local_attention",
    "window_size",
    "attention_window",
    "original_max_position_embeddings",
}
"""Keys of config.json with a length from which on a model computes something else."""
_NO_TEXT = ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id", "mask_token_id")


def longest_example(config: Mapping[str, Any]) -> int:
    """Tokens of the longest prompt that is compared: beyond every window that the config speaks of."""
    positions = _number(config, "max_position_embeddings") or math.inf
    windows = [length for length in _lengths(config) if length < positions]
    return int(min(positions, max([max(_LENGTHS), *(length + _BEYOND for length in windows)])))


def make_examples(checkpoint: Checkpoint) -> list[Encoded]:
    """Random tokens, none of them with a meaning to the model's code, the same on every call; the longest is last."""
    config = checkpoint.config
    text = config["text_config"] if isinstance(config.get("text_config"), dict) else config
    vocabulary = _number(text, "vocab_size")
    if not vocabulary:
        raise CheckpointError("config-key", "config.json does not say vocab_size", hint="fetch the base again")
    special: set[Any] = set()
    for name in _NO_TEXT:
        value = config.get(name)
        special.update(value if isinstance(value, list) else [value])
    allowed = np.setdiff1d(np.arange(vocabulary), [token for token in special if isinstance(token, int)])
    longest = longest_example(config)
    room = longest - 2 if checkpoint.task != "causal-lm" else longest  # RoBERTa's kin count from behind the padding
    lengths = sorted({min(length, room) for length in (*_LENGTHS, longest)})
    generator = np.random.default_rng(0)
    pairs = checkpoint.task != "causal-lm" and (_number(config, "type_vocab_size") or 0) > 1
    return [
        Encoded(
            tuple(generator.choice(allowed, length).tolist()),
            tuple(int(place >= length // 2) for place in range(length)) if pairs else (),
        )
        for length in lengths
    ]


def _lengths(config: Mapping[str, Any]) -> Iterator[int]:
    """All lengths of windows that a config and the objects in it name."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _lengths(value)
        elif key in _WINDOWS and not (key == "sliding_window" and config.get("use_sliding_window") is False):
            listed = value if isinstance(value, list) else [value]
            yield from (item for item in listed if isinstance(item, int) and not isinstance(item, bool) and item > 0)


def _number(config: Mapping[str, Any], key: str) -> int | None:
    found = config.get(key)
    return found if isinstance(found, int) and found > 0 else None
