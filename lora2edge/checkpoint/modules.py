"""Names in the files against names in transformers 5's models, which renames some and stacks a layer's experts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_EXPERT = re.compile(r"(?P<experts>.+\.experts)\.(?P<expert>\d+)\.(?P<layer>\w+)\.weight")
_STACKS = {
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
    "down_proj": ("down_proj", 0),
    "w1": ("gate_up_proj", 0),
    "w3": ("gate_up_proj", 1),
    "w2": ("down_proj", 0),
}
"""Layer of one expert → the parameter that holds all experts' (`[experts, out, in]`), and which part of its rows.

As transformers' conversion_mapping has it for `qwen2_moe` and `mixtral`, which other models' refer to.
"""
_RENAMED: Mapping[str, Mapping[str, str]] = {
    "mixtral": {".block_sparse_moe.": ".mlp."},
    "minimax": {".block_sparse_moe.": ".mlp."},
    "gpt_neox": {"embed_out.": "lm_head."},
}


@dataclass(frozen=True, slots=True)
class ExpertPlace:
    """Where one expert's matrix lies in the parameter that stacks them."""

    parameter: str
    """Path in the model, e.g. `model.layers.0.mlp.experts.gate_up_proj`."""
    expert: int
    part: int
    """0: the first rows, 1: the rows behind those of part 0, as many."""


def module_name(config: Mapping[str, Any], name: str) -> str:
    """The parameter of transformers 5's model that the tensor `name` is loaded into, whole or as a part."""
    place = expert_place(config, name)
    return place.parameter if place else _renamed(config, name)


def expert_place(config: Mapping[str, Any], name: str) -> ExpertPlace | None:
    """Where the tensor `name` lies in a stack of experts; None where it is none of an expert's matrices."""
    found = _EXPERT.fullmatch(_renamed(config, name))
    if found is None or found["layer"] not in _STACKS:
        return None
    parameter, part = _STACKS[found["layer"]]
    return ExpertPlace(f"{found['experts']}.{parameter}", int(found["expert"]), part)


def _renamed(config: Mapping[str, Any], name: str) -> str:
    for old, new in _RENAMED.get(str(config.get("model_type")), {}).items():
        name = name.replace(old, new)
    return name
