"""LoHa (FedPara, arXiv 2108.06098): ΔW is the elementwise product of two low-rank products."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lora2edge.adapters.kinds.common import (
    COMMON_KEYS,
    axes,
    by_module,
    demand,
    product_misfit,
    rank_and_scale,
    rank_error,
    refuse_core,
    shape_error,
    whole,
)
from lora2edge.adapters.parts import Part
from lora2edge.checkpoint import TensorReader

if TYPE_CHECKING:
    from lora2edge.contracts import FloatArray

KEYS = COMMON_KEYS | {
    "alpha", "alpha_pattern", "init_weights", "module_dropout", "r", "rank_dropout", "rank_pattern",
    "use_effective_conv2d",
}  # fmt: skip
"""Settings that are handled here or have no effect after training; `use_effective_conv2d` is for convolutions."""

_NAMES = re.compile(r"(?P<module>.+)\.(?P<role>hada_(w1_a|w1_b|w2_a|w2_b|t1|t2))")
_FACTORS = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")


@dataclass(frozen=True, slots=True)
class Hadamard:
    """ΔW = scale · (w1_a w1_b) ∘ (w2_a w2_b)."""

    module: str
    reader: TensorReader
    tensors: tuple[str, ...]
    """w1_a `[out, r]`, w1_b `[r, in]`, w2_a, w2_b."""
    scale: float
    shape: tuple[int, int]
    parameter: str = "weight"

    def misfit(self, shape: tuple[int, ...]) -> str | None:
        return product_misfit(self.module, self.shape, shape)

    def load(self) -> HadamardUpdate:
        w1_a, w1_b, w2_a, w2_b = (whole(self.reader, name) for name in self.tensors)
        return HadamardUpdate(w1_a * np.float32(self.scale), w1_b, w2_a, w2_b)


@dataclass(frozen=True, slots=True)
class HadamardUpdate:
    """The four factors, the scale in the first."""

    w1_a: FloatArray
    w1_b: FloatArray
    w2_a: FloatArray
    w2_b: FloatArray

    def apply(self, rows: FloatArray, start: int, stop: int) -> FloatArray:
        change = self.w1_a[start:stop] @ self.w1_b
        change *= self.w2_a[start:stop] @ self.w2_b
        rows += change
        return rows


def read(config: Mapping[str, Any], reader: TensorReader, tensors: Mapping[str, str]) -> list[Part]:
    """The parts of a LoHa adapter; `tensors`: path in the model → name in the file. Other tensors are left alone.

    Raises AdapterError for factors that are incomplete or do not agree with the configuration.
    """
    return [_part(config, reader, module, found) for module, found in by_module(tensors, _NAMES).items()]


def _part(config: Mapping[str, Any], reader: TensorReader, module: str, found: Mapping[str, str]) -> Hadamard:
    refuse_core(module, found)
    demand(module, found, _FACTORS)
    axes(module, reader, found, dict.fromkeys(_FACTORS, 2))
    rank, scale = rank_and_scale(config, module)
    w1_a, w1_b, w2_a, w2_b = (reader.tensors[found[role]].shape for role in _FACTORS)
    if not w1_a[1] == w1_b[0] == w2_a[1] == w2_b[0] == rank:
        has = f"the factors have the ranks {w1_a[1]}, {w1_b[0]}, {w2_a[1]} and {w2_b[0]}"
        raise rank_error(module, has, str(rank), "r, or the key of rank_pattern that matches the module")
    if (w1_a[0], w1_b[1]) != (w2_a[0], w2_b[1]):
        raise shape_error(
            f"{module}: the two products are {[w1_a[0], w1_b[1]]} and {[w2_a[0], w2_b[1]]}",
            "they are multiplied element by element",
        )
    return Hadamard(module, reader, tuple(found[role] for role in _FACTORS), scale, (w1_a[0], w1_b[1]))
