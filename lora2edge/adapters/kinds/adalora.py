"""AdaLoRA (arXiv 2303.10512): ΔW = B diag(E) A, of a rank that training chose for each module."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lora2edge.adapters.kinds.common import (
    COMMON_KEYS,
    SAVE_AGAIN,
    axes,
    by_module,
    demand,
    integer,
    malformed,
    number,
    product_misfit,
    rank_error,
    whole,
)
from lora2edge.adapters.kinds.lora import PairUpdate
from lora2edge.adapters.parts import Part
from lora2edge.checkpoint import TensorReader
from lora2edge.errors import AdapterError

KEYS = COMMON_KEYS | {
    "alpha_pattern", "beta1", "beta2", "corda_config", "deltaT", "ensure_weight_tying", "eva_config",
    "init_lora_weights", "init_r", "lora_alpha", "lora_bias", "lora_dropout", "lora_ga_config", "megatron_core",
    "orth_reg_weight", "qalora_group_size", "r", "rank_pattern", "runtime_config", "target_r", "tfinal", "tinit",
    "total_step", "use_qalora", "use_rslora",
}  # fmt: skip
"""Settings that are handled here or have no effect after training.

PEFT's AdaLoRA takes no notice of LoRA's own `r`, `alpha_pattern`, `init_lora_weights`, `lora_bias`, `use_qalora`
and `use_rslora`.
"""

_NAMES = re.compile(r"(?P<module>.+)\.(?P<role>lora_[ABE])")


@dataclass(frozen=True, slots=True)
class Triplet:
    """ΔW = scale · B diag(E) A."""

    module: str
    reader: TensorReader
    tensors: tuple[str, ...]
    """A `[k, in]`, B `[out, k]`, E `[k, 1]`; k may be 0."""
    scale: float
    shape: tuple[int, int]
    parameter: str = "weight"

    def misfit(self, shape: tuple[int, ...]) -> str | None:
        return product_misfit(self.module, self.shape, shape)

    def load(self) -> PairUpdate:
        a, b, e = (whole(self.reader, name) for name in self.tensors)
        return PairUpdate.of(b * np.float32(self.scale), a * e)


def read(config: Mapping[str, Any], reader: TensorReader, tensors: Mapping[str, str]) -> list[Part]:
    """The parts of an AdaLoRA adapter; `tensors`: path in the model → name in the file. Others are left alone.

    Raises AdapterError for triplets that are incomplete or do not agree with the configuration.
    """
    modules = by_module(tensors, _NAMES)
    if not modules:
        return []
    ranks = _ranks(config)
    if missing := ranks.keys() - modules.keys():
        raise AdapterError(
            "adapter-incomplete",
            f"{len(missing)} modules of rank_pattern have no tensors: {', '.join(sorted(missing)[:3])}",
            why="adapter_model.safetensors and adapter_config.json are not from the same save",
            hint=SAVE_AGAIN,
        )
    return [_part(config, reader, module, found, ranks) for module, found in modules.items()]


def _part(
    config: Mapping[str, Any],
    reader: TensorReader,
    module: str,
    found: Mapping[str, str],
    ranks: Mapping[str, int],
) -> Triplet:
    demand(module, found, ("lora_A", "lora_B", "lora_E"))
    axes(module, reader, found, dict.fromkeys(found, 2))
    names = found["lora_A"], found["lora_B"], found["lora_E"]
    a, b, e = (reader.tensors[name].shape for name in names)
    first = integer(config, "init_r")
    rank = ranks.get(module, first)
    if not a[0] == b[1] == e[0] == rank or e[1] != 1:
        has = f"lora_A is {list(a)}, lora_B {list(b)}, lora_E {list(e)}"
        raise rank_error(module, has, f"rank {rank}", "init_r, or what rank_pattern keeps of it")
    alpha = number(config, "lora_alpha")
    if alpha <= 0 and rank != first:
        raise AdapterError(
            "adapter-setting",
            f"lora_alpha: {alpha:g} with a rank that was cut from {first} to {rank} is not supported",
            why="PEFT then scales by the rank: by another one after loading than in training",
            hint=f'where it was trained so, write "lora_alpha": {first}',
        )
    # Loading keeps the divisor of training: the rank before it was cut.
    scale = (alpha if alpha > 0 else first) / (first + 1e-5)
    return Triplet(module, reader, names, scale, (b[0], a[1]))


def _ranks(config: Mapping[str, Any]) -> dict[str, int]:
    """Module → the rank that is left of it, from `rank_pattern`: for each lora_E, which of its rows were kept."""
    pattern = config.get("rank_pattern") or {}
    first = integer(config, "init_r")
    sound = isinstance(pattern, dict) and all(
        isinstance(kept, list) and len(kept) == first and all(isinstance(row, bool) for row in kept)
        for kept in pattern.values()
    )
    if not sound:
        raise malformed("rank_pattern", pattern, f"an object of lists of {first} times true or false")
    return {re.sub(r"\.lora_E(\.default)?$", "", name): sum(kept) for name, kept in pattern.items()}
