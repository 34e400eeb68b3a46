"""Values of config.json that whoever lays out a model's graph must have."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lora2edge.errors import CheckpointError

TYPE_OF_CLASS = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3_text",
    "Phi3ForCausalLM": "phi3",
}
"""transformers' class of a decoder → its model_type."""


def decoder_class(config: Mapping[str, Any]) -> str:
    """transformers' class that config.json names, by itself or by its model_type; of others, whatever it says.

    Raises CheckpointError `config-key` where it names two models.
    """
    kind = config.get("model_type")
    if not (named := config.get("architectures")):
        return next((name for name, type_ in TYPE_OF_CLASS.items() if type_ == kind), f"model_type {kind!r}")
    name = str(named[0])
    if kind not in (None, TYPE_OF_CLASS.get(name, kind)):
        raise CheckpointError(
            "config-key",
            f"config.json names {name}, and the model_type {kind}",
            why="transformers goes by the second, other runtimes by the first: it would be two models",
            hint="make both name the model that it was trained as",
        )
    return name


def need(config: Mapping[str, Any], key: str) -> Any:
    """A value that config.json must have. Raises CheckpointError."""
    value = config.get(key)
    if value is None:
        raise CheckpointError("config-key", f"config.json has no {key}", why="the model's graph depends on it")
    return value


def count(config: Mapping[str, Any], key: str) -> int:
    """A positive whole number that config.json must have. Raises CheckpointError."""
    value = need(config, key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CheckpointError("config-key", f"{key} is {value!r} in config.json", why="a positive number is needed")
    return value


def rope_kind(params: Mapping[str, Any]) -> str:
    """How rotary frequencies are scaled: transformers 5 calls it rope_type, 4 also type."""
    return str(params.get("rope_type") or params.get("type") or "default").lower()


def rope_number(params: Mapping[str, Any], key: str) -> float:
    """A positive number of the rope's parameters. Raises CheckpointError."""
    value = params.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise CheckpointError(
            "config-key", f"the rope's {key} of config.json is {value!r}", why="a positive number was expected"
        )
    return float(value)


def first_names(names: list[str]) -> str:
    """The first four names, and how many more there are."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
