"""LoKr (LyCORIS, arXiv 2309.14859): ΔW is a Kronecker product, each side dense or of low rank."""

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
    flag,
    product_misfit,
    rank_and_scale,
    rank_error,
    refuse_core,
    whole,
)
from lora2edge.adapters.parts import Part
from lora2edge.checkpoint import TensorReader
from lora2edge.errors import AdapterError

if TYPE_CHECKING:
    from lora2edge.contracts import FloatArray

KEYS = COMMON_KEYS | {
    "alpha", "alpha_pattern", "decompose_both", "decompose_factor", "init_weights", "module_dropout", "r",
    "rank_dropout", "rank_dropout_scale", "rank_pattern", "use_effective_conv2d",
}  # fmt: skip
"""Settings that are handled here or have no effect after training; `decompose_factor` is seen in the shapes."""

_NAMES = re.compile(r"(?P<module>.+)\.(?P<role>lokr_(w1|w1_a|w1_b|w2|w2_a|w2_b|t2))")
_RANK_KEY = "r, decompose_both, or the key of rank_pattern that matches the module"


@dataclass(frozen=True, slots=True)
class Kronecker:
    """ΔW = scale · w1 ⊗ w2."""

    module: str
    reader: TensorReader
    left: tuple[str, ...]
    """w1 `[a, c]`, or its factors `[a, r]` and `[r, c]`."""
    right: tuple[str, ...]
    """w2 `[b, d]`, or its factors `[b, r]` and `[r, d]`."""
    scale: float
    shape: tuple[int, int]
    """`[a · b, c · d]`."""
    parameter: str = "weight"

    @property
    def tensors(self) -> tuple[str, ...]:
        return (*self.left, *self.right)

    def misfit(self, shape: tuple[int, ...]) -> str | None:
        return product_misfit(self.module, self.shape, shape)

    def load(self) -> KroneckerUpdate:
        return KroneckerUpdate(self._side(self.left) * np.float32(self.scale), self._side(self.right))

    def _side(self, names: tuple[str, ...]) -> FloatArray:
        first, *rest = (whole(self.reader, name) for name in names)
        return first @ rest[0] if rest else first


@dataclass(frozen=True, slots=True)
class KroneckerUpdate:
    """The two sides, the scale in the left one."""

    left: FloatArray
    right: FloatArray

    def apply(self, rows: FloatArray, start: int, stop: int) -> FloatArray:
        outer, inner = np.divmod(np.arange(start, stop), len(self.right))
        rows += (self.left[outer][:, :, None] * self.right[inner][:, None, :]).reshape(rows.shape)
        return rows


def read(config: Mapping[str, Any], reader: TensorReader, tensors: Mapping[str, str]) -> list[Part]:
    """The parts of a LoKr adapter; `tensors`: path in the model → name in the file. Other tensors are left alone.

    Raises AdapterError for sides that are incomplete or do not agree with the configuration, and for an adapter of
    PEFT 0.13 or older that today's PEFT scales otherwise than the one that trained it.
    """
    return [_part(config, reader, module, found) for module, found in by_module(tensors, _NAMES).items()]


def _part(config: Mapping[str, Any], reader: TensorReader, module: str, found: Mapping[str, str]) -> Kronecker:
    refuse_core(module, found)
    left, right = (_roles(module, found, side) for side in ("lokr_w1", "lokr_w2"))
    axes(module, reader, found, dict.fromkeys((*left, *right), 2))
    rank, scale = rank_and_scale(config, module)
    _check_age(config, module, rank, scale)
    sizes = []
    for roles in (left, right):
        first, last = reader.tensors[found[roles[0]]].shape, reader.tensors[found[roles[-1]]].shape
        if len(roles) == 2 and not first[1] == last[0] == rank:
            raise rank_error(
                module, f"{' and '.join(roles)} have the ranks {first[1]} and {last[0]}", str(rank), _RANK_KEY
            )
        sizes.append((first[0], last[1]))
    (a, c), (b, d) = sizes
    dense = (not (flag(config, "decompose_both", False) and rank < max(a, c) / 2), rank >= max(b, d) / 2)
    if dense != (len(left) == 1, len(right) == 1):
        raise rank_error(
            module,
            f"the file holds {', '.join((*left, *right))} for sides {[a, c]} and {[b, d]}",
            f"rank {rank}",
            _RANK_KEY,
        )
    w1, w2 = (tuple(found[role] for role in roles) for roles in (left, right))
    return Kronecker(module, reader, w1, w2, scale, (a * b, c * d))


def _roles(module: str, found: Mapping[str, str], side: str) -> tuple[str, ...]:
    """The dense matrix of a side where it is there, else its two factors."""
    factors = (f"{side}_a", f"{side}_b")
    if side in found and any(role in found for role in factors):
        raise AdapterError(
            "adapter-ambiguous",
            f"{module} has both {side} and its factors",
            why="one of them is from another save",
            hint="save the adapter again",
        )
    if side in found:
        return (side,)
    demand(module, found, factors)
    return factors


def _check_age(config: Mapping[str, Any], module: str, rank: int, scale: float) -> None:
    if "rank_dropout_scale" not in config and scale != 1:
        raise AdapterError(
            "adapter-setting",
            f"{module}: alpha / r is {scale:g} in an adapter of PEFT 0.13 or older",
            why="rank_dropout_scale is not in adapter_config.json; those versions trained LoKr without alpha / r, "
            "and later ones multiply by it (peft pull request 2180)",
            hint=f'where it is so, write "alpha": {rank} for this rank, and "rank_dropout_scale": false',
        )
