"""adapter_config.json: what can be merged exactly, and a refusal by name for all else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora2edge.adapters.kinds.starts import OLORA, PISSA
from lora2edge.adapters.kinds.table import KINDS
from lora2edge.errors import AdapterError, InputError, refuse

_REFUSED = {
    "layer_replication": ("the adapter stacks copies of layers", "build that base first, then train on it"),
    "use_qalora": ("QALoRA pools the inputs of each group", "train with use_qalora=False"),
    "alora_invocation_tokens": (
        "an activated LoRA acts only after its invocation tokens, a merged weight always",
        "serve it as a live adapter",
    ),
    "arrow_config": ("Arrow routes each token to other adapters", "merge one of its adapters"),
    "megatron_config": ("Megatron's parallel layers split the weights", "convert the adapter to plain PEFT first"),
}
_ONLY = {"LORA": "lora_only", "ADALORA": "lora_only", "OFT": "oft_only", "BOFT": "boft_only", "VERA": "vera_only"}
"""Kinds that can train the base's biases → the setting for those of their own layers."""
_PLAIN_STARTS = ("gaussian", "eva", "orthogonal")
_RESIDUAL = {
    "pissa_niter": "it is drawn at random: PEFT takes another one off the base whenever it loads the adapter",
    "corda": "it was computed from the training data",
    "lora_ga": "it was computed from gradients on the training data",
    "loftq": "the base that it was trained on was quantized, and differs from the original by more than rounding",
}
"""Starts that cannot be computed again from the base → why."""
RESIDUAL_HINT = (
    "save it with path_initial_model_for_weight_conversion=..., which turns it into a plain LoRA; or give the residual "
    'base that was saved when training started, --base RESIDUAL, with "init_lora_weights": true in adapter_config.json'
)


def kind_name(config: Mapping[str, Any]) -> str:
    """What people call the adapter's kind: "LoRA", "rsLoRA", "DoRA", "LoHa", …"""
    if config["peft_type"] != "LORA":
        return KINDS[config["peft_type"]].label
    if config.get("use_dora"):
        return "rsDoRA" if config.get("use_rslora") else "DoRA"
    return "rsLoRA" if config.get("use_rslora") else "LoRA"


def check_settings(config: Mapping[str, Any]) -> None:
    """Refuses settings under which the merged weights are not what the live adapter computes. All refusals at once."""
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind not in KINDS:
        known = ", ".join(KINDS)
        raise AdapterError(
            "adapter-kind",
            f"a {kind or 'nameless'} adapter cannot be merged",
            why=f"peft_type in adapter_config.json; what can be merged: {known}",
            hint="prompts and prefixes are no weights: serve such an adapter live; else train one of the kinds above",
        )
    errors: list[InputError] = [*_entries(config)]
    if kind == "LORA":
        errors.extend(_numbers(config))
        errors.extend(_start(config))
    keys = KINDS[kind].keys
    for key, (why, hint) in _REFUSED.items():
        if key not in keys and _is_set(config.get(key)):
            errors.append(_refusal(key, config[key], why, hint))
    bias = config.get("bias") or "none"
    choices = ("none", "all", _ONLY[kind]) if kind in _ONLY else ("none",)
    if bias not in choices:
        why = f"PEFT knows for {KINDS[kind].label}: {', '.join(choices)}"
        errors.append(_refusal("bias", bias, why, "train with bias='none'"))
    for key, value in config.items():
        if key not in keys and key not in _REFUSED and key != "bias" and _is_set(value):
            why = "this version does not know whether it changes what the adapter computes"
            errors.append(_refusal(key, value, why, "a newer lora2edge may know it; else train without it"))
    refuse(errors)


def _numbers(config: Mapping[str, Any]) -> list[AdapterError]:
    errors = []
    for key in ("r", "lora_alpha"):
        value = config.get(key)
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or (key == "r" and not 0 < value == int(value))
        ):
            errors.append(_malformed(key, value, "a positive number"))
    for key in ("rank_pattern", "alpha_pattern"):
        value = config.get(key) or {}
        if not isinstance(value, dict) or not all(
            isinstance(n, int | float) and not isinstance(n, bool) and (key == "alpha_pattern" or n > 0)
            for n in value.values()
        ):
            errors.append(_malformed(key, value, "an object of numbers"))
    return errors


def _entries(config: Mapping[str, Any]) -> list[AdapterError]:
    errors = []
    for key in ("modules_to_save", "target_parameters"):
        entries = config.get(key) or []
        if not isinstance(entries, list) or not all(isinstance(entry, str) and entry for entry in entries):
            errors.append(_malformed(key, entries, "a list of names"))
    return errors


def _start(config: Mapping[str, Any]) -> list[AdapterError]:
    """PiSSA and its kin take a part of the base's weight into the adapter when training starts.

    Two of them can be taken off again, as PEFT does (`kinds.starts`): `pissa` and `olora`.
    """
    value = config.get("init_lora_weights", True)
    if isinstance(value, bool) or value is None or str(value).lower() in _PLAIN_STARTS:
        return []
    name = str(value).lower()
    if value == PISSA or name == OLORA:
        if not config.get("target_parameters"):
            return []
        why = "PEFT knows that start for layers, not for target_parameters"
        return [_refusal("init_lora_weights", value, why, "train with True")]
    for start, why in _RESIDUAL.items():
        if name.startswith(start):
            what = f"the adapter was started with {value!r}, which changed the base's weights"
            return [AdapterError("adapter-residual-base", what, why=why, hint=RESIDUAL_HINT)]
    return [_refusal("init_lora_weights", value, "this start of the weights is not known", "train with True")]


def _is_set(value: Any) -> bool:
    return value not in (None, False, "", [], {})


def _refusal(key: str, value: Any, why: str, hint: str) -> AdapterError:
    shown = str(value) if len(str(value)) < 60 else f"{str(value)[:57]}..."
    return AdapterError("adapter-setting", f"{key}: {shown} is not supported yet", why=why, hint=hint)


def _malformed(key: str, value: Any, wanted: str) -> AdapterError:
    return AdapterError("bad-adapter-config", f"{key} is {value!r}, expected {wanted}", why="in adapter_config.json")
