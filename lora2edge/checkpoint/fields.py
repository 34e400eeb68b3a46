"""What the values of a checkpoint's and an adapter's JSON files must be, for every key that is read.

Python would take the string "false" for true, and a scale of infinity for a number: a wrong type is not only what
crashes. `null` counts as absent everywhere; keys that are not listed are passed on as they stand.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lora2edge.checkpoint.untrusted import compile_pattern
from lora2edge.errors import InputError, refuse

_MOST = 2**31 - 1
"""Counts and ids above it fit no format that is written."""
_LARGEST = 3.4e38
"""About the largest float32: what a scale is multiplied with."""
_MOST_CHARACTERS = 4096
_MOST_FILE_NAME_BYTES = 255
_MOST_REFUSALS = 10


@dataclass(frozen=True, slots=True)
class Kind:
    """What a value must be."""

    words: str
    """Follows "expected"."""
    holds: Callable[[Any], bool]


def check_fields(data: Mapping[str, Any], file_name: str, code: str, error: type[InputError]) -> None:
    """Refuses values of the wrong kind in `data`, which stands in a file called `file_name`; all at once.

    Raises `error` with `code`, or Refusals.
    """
    wrong: list[InputError] = []
    for key, kind in FIELDS.get(file_name, {}).items():
        value = data.get(key)
        if value is None or kind.holds(value):
            continue
        shown = json.dumps(value, ensure_ascii=False)
        wrong.append(
            error(
                code,
                f"{key} is {shown if len(shown) <= 80 else f'{shown[:80]}…'} in {file_name}",
                why=f"expected {kind.words}",
                hint=f"download or save it again, or correct {key}",
            )
        )
    refuse(wrong[:_MOST_REFUSALS])


def _is_whole(value: Any, least: int = -_MOST) -> bool:
    return type(value) is int and least <= value <= _MOST


def _is_number(value: Any) -> bool:
    """Finite, and within float32. NaN compares as false."""
    return type(value) in (int, float) and -_LARGEST <= value <= _LARGEST


def is_readable(value: Any) -> bool:
    """Whether `value` is a name that can be shown: one line, no control characters, not endless."""
    return isinstance(value, str) and len(value) <= _MOST_CHARACTERS and value.isprintable()


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


def _each(value: Any, holds: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(holds(item) for item in value)


def _is_rope(value: Any) -> bool:
    """Rotary settings, once or per kind of layer."""
    if not isinstance(value, dict):
        return False
    for key, inner in value.items():
        if inner is None:
            continue
        if key in _ROPE_NAMES:
            sound = is_readable(inner)
        elif key in _ROPE_LISTS:
            sound = _each(inner, _is_number)
        elif key in _ROPE_NUMBERS:
            sound = _is_number(inner)
        else:
            sound = key not in _ROPE_LAYERS or _is_rope(inner)
        if not sound:
            return False
    return True


_ROPE_NAMES = {"rope_type", "type"}
_ROPE_LISTS = {"long_factor", "short_factor", "mrope_section"}
_ROPE_LAYERS = {"full_attention", "sliding_attention"}
_ROPE_NUMBERS = {
    "rope_theta", "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow",
    "low_freq_factor", "high_freq_factor", "partial_rotary_factor", "mscale", "mscale_all_dim", "short_mscale",
    "long_mscale",
}  # fmt: skip


def _is_quantization(value: Any) -> bool:
    return isinstance(value, dict) and (value.get("quant_method") is None or is_readable(value["quant_method"]))


def _is_weight_map(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and bool(value)
        and all(is_readable(name) and 0 < len(name.encode()) <= _MOST_FILE_NAME_BYTES for name in _different(value))
    )


def _different(weight_map: Mapping[str, Any]) -> list[Any]:
    """The different values of a weight map, which may be no strings."""
    names = {name for name in weight_map.values() if isinstance(name, str)}
    return [*names, *(name for name in weight_map.values() if not isinstance(name, str))]


def _is_token(value: Any) -> bool:
    return _is_text(value.get("content") if isinstance(value, dict) else value)


def _is_template(value: Any) -> bool:
    """One template, or several by name."""
    return _is_text(value) or _each(
        value,
        lambda item: isinstance(item, dict) and _is_text(item.get("name")) and _is_text(item.get("template")),
    )


def _is_by_pattern(value: Any, holds: Callable[[Any], bool]) -> bool:
    return isinstance(value, dict) and all(holds(item) and _is_quick(key) for key, item in value.items())


def _is_quick(pattern: str) -> bool:
    """Whether a pattern can be matched at once; one that is none is refused with its place where it is used."""
    try:
        compile_pattern(pattern)
    except re.error:
        return True
    except ValueError:
        return False
    return True


def _is_token_choice(value: Any) -> bool:
    def indices(inner: Any) -> bool:
        return _each(inner, lambda item: _is_whole(item, 0))

    return indices(value) or (isinstance(value, dict) and all(indices(inner) for inner in value.values()))


_COUNT = Kind(f"a whole number from 1 to {_MOST}", lambda value: _is_whole(value, 1))
_COUNTS = Kind(
    f"a whole number from 1 to {_MOST}, or a list of them",
    lambda value: _is_whole(value, 1) or (value != [] and _each(value, lambda item: _is_whole(item, 1))),
)
_WINDOW = Kind("a whole number of tokens", lambda value: _is_whole(value, 0))
_WHOLES = Kind("a whole number, or a list of them", lambda value: _is_whole(value) or _each(value, _is_whole))
_NUMBER = Kind("a finite number", _is_number)
_POSITIVE = Kind("a finite number above 0", lambda value: _is_number(value) and value > 0)
_FLAG = Kind("true or false", lambda value: isinstance(value, bool))
_NAME = Kind("one line of text", is_readable)
_NAMES = Kind("a list of names", lambda value: _each(value, lambda item: is_readable(item) and item != ""))
_NAME_OR_NAMES = Kind("a name, or a list of names", lambda value: is_readable(value) or _each(value, is_readable))
_ROPE = Kind("an object whose factors are finite numbers", _is_rope)
_TOKEN = Kind("a text, or an object with one as its content", _is_token)

_TOKEN_IDS = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), _WHOLES)
_TOKENS = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), _TOKEN)

FIELDS: Mapping[str, Mapping[str, Kind]] = {
    "config.json": {
        **dict.fromkeys(
            ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
             "vocab_size", "max_position_embeddings", "n_embd", "n_layer", "n_head", "n_positions"),
            _COUNT,
        ),
        "intermediate_size": _COUNTS,
        "sliding_window": _WINDOW,
        "rms_norm_eps": Kind("a finite number of at least 0", lambda value: _is_number(value) and value >= 0),
        **dict.fromkeys(
            ("rope_theta", "rope_local_base_freq", "partial_rotary_factor", "query_pre_attn_scalar"), _POSITIVE
        ),
        **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping"), _NUMBER),
        **dict.fromkeys(("tie_word_embeddings", "use_sliding_window", "attention_bias", "mlp_bias"), _FLAG),
        **dict.fromkeys(("model_type", "hidden_act", "hidden_activation"), _NAME),
        **dict.fromkeys(("architectures", "layer_types"), _NAMES),
        **dict.fromkeys(("rope_scaling", "rope_parameters"), _ROPE),
        "quantization_config": Kind("an object with its quant_method", _is_quantization),
        **_TOKEN_IDS,
    },
    "model.safetensors.index.json": {
        "weight_map": Kind("an object that gives each tensor its file's name", _is_weight_map),
    },
    "generation_config.json": {
        **_TOKEN_IDS,
        **dict.fromkeys(("temperature", "top_p", "repetition_penalty"), _NUMBER),
        "top_k": Kind("a whole number", _is_whole),
        "do_sample": _FLAG,
    },
    "tokenizer_config.json": {
        **_TOKENS,
        **dict.fromkeys(("add_bos_token", "add_eos_token"), _FLAG),
        "chat_template": Kind("a template, or a list of objects with name and template", _is_template),
    },
    "special_tokens_map.json": _TOKENS,
    "adapter_config.json": {
        **dict.fromkeys(("peft_type", "task_type", "bias", "revision", "base_model_name_or_path"), _NAME),
        "r": Kind("a whole number, 0 or above", lambda value: _is_whole(value, 0)),  # 0 in OFT: by block size
        **dict.fromkeys(("lora_alpha", "alpha"), _NUMBER),
        "rank_pattern": Kind(  # AdaLoRA's gives a list of flags per module
            "whole numbers above 0, by patterns that can be matched at once",
            lambda value: _is_by_pattern(
                value, lambda item: _is_whole(item, 1) or _each(item, lambda flag: type(flag) is bool)
            ),
        ),
        "alpha_pattern": Kind(
            "finite numbers, by patterns that can be matched at once", lambda value: _is_by_pattern(value, _is_number)
        ),
        "feedforward_modules": Kind(
            "a list of names, or a pattern that can be matched at once",
            lambda value: _is_quick(value) if isinstance(value, str) else _each(value, is_readable),
        ),
        **dict.fromkeys(("target_modules", "exclude_modules", "layers_pattern"), _NAME_OR_NAMES),
        **dict.fromkeys(("modules_to_save", "target_parameters"), _NAMES),
        "layers_to_transform": _WHOLES,
        "layer_replication": Kind(
            "a list of pairs of layer numbers",
            lambda value: _each(value, lambda pair: _each(pair, lambda item: _is_whole(item, 0)) and len(pair) == 2),
        ),
        "trainable_token_indices": Kind("a list of token ids, or an object of such lists", _is_token_choice),
        **dict.fromkeys(
            ("use_rslora", "use_dora", "lora_bias", "fan_in_fan_out", "ensure_weight_tying", "inference_mode"), _FLAG
        ),
        "init_lora_weights": Kind(
            "true, false, or a method's name", lambda value: isinstance(value, bool) or is_readable(value)
        ),
    },
}  # fmt: skip
"""File → key → what its value must be."""
