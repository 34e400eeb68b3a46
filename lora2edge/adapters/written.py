"""config.json as a merged checkpoint has it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora2edge.contracts import Checkpoint
from lora2edge.texts import padding_id


def written_config(view: Checkpoint) -> dict[str, Any]:
    """config.json for `view`: rotary settings under the names of transformers 4 and of 5.

    Version 4 reads `rope_theta`, `rope_scaling` and (Gemma 3) `rope_local_base_freq`, and takes its defaults
    without a word where they are missing; version 5 reads `rope_parameters`. A sequence classifier gets the padding
    token's id where only its tokenizer names it.
    """
    config = {key: value for key, value in view.config.items() if key != "_name_or_path"}
    if view.task == "sequence-classification" and (padding := padding_id(view)) is not None:
        # Without it a decoder's class cannot be read from a batch; training set it, and PEFT does not save it.
        config["pad_token_id"] = padding
    parameters = config.get("rope_parameters")
    if isinstance(parameters, dict) and isinstance(parameters.get("full_attention"), dict):
        config.update(_old_rope(parameters["full_attention"], config))
        local = parameters.get("sliding_attention")
        if isinstance(local, dict) and "rope_theta" in local:
            config.setdefault("rope_local_base_freq", local["rope_theta"])
    elif isinstance(parameters, dict):
        config.update(_old_rope(parameters, config))
    elif "rope_theta" in config and "rope_local_base_freq" not in config:
        scaling = dict(config.get("rope_scaling") or {})
        kind = scaling.pop("type", None)
        scaling.setdefault("rope_type", kind or "default")
        config["rope_parameters"] = {**scaling, "rope_theta": config["rope_theta"]}
        if "partial_rotary_factor" in config:
            config["rope_parameters"]["partial_rotary_factor"] = config["partial_rotary_factor"]
    return config


def _old_rope(parameters: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """What transformers 4 wants beside `rope_parameters`, without touching keys that are there."""
    old = {key: parameters[key] for key in ("rope_theta", "partial_rotary_factor") if key in parameters}
    kind = parameters.get("rope_type", "default")
    if kind != "default":
        old["rope_scaling"] = {key: value for key, value in parameters.items() if key not in old}
    return {key: value for key, value in old.items() if config.get(key) is None}
