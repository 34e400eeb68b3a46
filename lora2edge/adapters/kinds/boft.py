"""BOFT (arXiv 2311.06243): the inputs of a layer are turned by a product of butterfly factors, its outputs scaled."""

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
    integer,
    malformed,
    product_misfit,
    rank_error,
    shape_error,
    whole,
)
from lora2edge.adapters.kinds.oft import cayley, times_blocks
from lora2edge.adapters.parts import Part
from lora2edge.checkpoint import TensorReader

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lora2edge.contracts import FloatArray

KEYS = COMMON_KEYS | {
    "boft_block_num", "boft_block_size", "boft_dropout", "boft_n_butterfly_factor", "init_weights",
}  # fmt: skip
"""Settings that are handled here or have no effect after training."""

_NAMES = re.compile(r"(?P<module>.+)\.(?P<role>boft_[Rs])")


@dataclass(frozen=True, slots=True)
class Butterfly:
    """W' = diag(s) W Rᵀ, R = Bₙ … B₁, each B block-diagonal between a permutation and its inverse.

    The bias is not scaled: PEFT takes it off the output first, and adds it again.
    """

    module: str
    reader: TensorReader
    tensors: tuple[str, ...]
    """boft_R `[factors, blocks, H, H]`, of which the skew-symmetric part counts; boft_s `[out, 1]`."""
    shape: tuple[int, int]
    parameter: str = "weight"

    @property
    def factors(self) -> int:
        """PEFT computes with more than one on CUDA only."""
        return self.reader.tensors[self.tensors[0]].shape[0]

    def misfit(self, shape: tuple[int, ...]) -> str | None:
        return product_misfit(self.module, self.shape, shape)

    def load(self) -> ButterflyUpdate:
        matrices, scales = (whole(self.reader, name) for name in self.tensors)
        factors = []
        for index, blocks in enumerate(matrices):
            wide = blocks.astype(np.float64)
            turned = cayley(0.5 * (wide - wide.transpose(0, 2, 1))).astype(np.float32)
            order = _order(self.shape[1], len(blocks), blocks.shape[-1], index) if len(matrices) > 1 else None
            factors.append(_Factor(np.ascontiguousarray(turned.transpose(0, 2, 1)), order))
        return ButterflyUpdate(tuple(factors), scales)


@dataclass(frozen=True, slots=True)
class _Factor:
    blocks: FloatArray
    """`[blocks, H, H]`: what a row is multiplied with from the right."""
    order: tuple[NDArray[np.int64], NDArray[np.int64]] | None
    """`[in]` each: how a row's channels are put in the blocks' order, and back; None: they are in order."""


@dataclass(frozen=True, slots=True)
class ButterflyUpdate:
    factors: tuple[_Factor, ...]
    scales: FloatArray
    """`[out, 1]`."""

    def apply(self, rows: FloatArray, start: int, stop: int) -> FloatArray:
        for factor in self.factors:
            if factor.order is None:
                rows = times_blocks(rows, factor.blocks)
            else:
                there, back = factor.order
                rows = times_blocks(rows[:, there], factor.blocks)[:, back]
        rows *= self.scales[start:stop]
        return rows


def read(config: Mapping[str, Any], reader: TensorReader, tensors: Mapping[str, str]) -> list[Part]:
    """The parts of a BOFT adapter; `tensors`: path in the model → name in the file. Other tensors are left alone.

    Raises AdapterError for tensors that are incomplete or do not agree with the configuration.
    """
    return [_part(config, reader, module, found) for module, found in by_module(tensors, _NAMES).items()]


def _part(config: Mapping[str, Any], reader: TensorReader, module: str, found: Mapping[str, str]) -> Butterfly:
    demand(module, found, ("boft_R", "boft_s"))
    axes(module, reader, found, {"boft_R": 4, "boft_s": 2})
    rotation, scale = (reader.tensors[found[role]].shape for role in ("boft_R", "boft_s"))
    factors, blocks, size, other = rotation
    if scale[1] != 1 or size != other or 0 in rotation:
        raise shape_error(
            f"{module}: boft_R is {list(rotation)}, boft_s is {list(scale)}",
            "[factors, blocks, size, size] and [out, 1] are needed; convolutions are not supported",
        )
    _check_sizes(config, module, factors, blocks, size)
    return Butterfly(module, reader, (found["boft_R"], found["boft_s"]), (scale[0], blocks * size))


def _check_sizes(config: Mapping[str, Any], module: str, factors: int, blocks: int, size: int) -> None:
    said_size, said_blocks = (integer(config, key, least=0) for key in ("boft_block_size", "boft_block_num"))
    if (said_size == 0) == (said_blocks == 0):
        wanted = f"{'0' if said_blocks else 'a positive number'}, as boft_block_num is {said_blocks}"
        raise malformed("boft_block_size", said_size, wanted)
    if (said_size or size) != size or (said_blocks or blocks) != blocks:
        said = f"{said_blocks} blocks" if said_blocks else f"blocks of {said_size}"
        raise rank_error(module, f"boft_R has {blocks} blocks of {size}", said, "boft_block_size or boft_block_num")
    said_factors = integer(config, "boft_n_butterfly_factor", 1)
    # Without its CUDA extension PEFT trains one factor, whatever the configuration says and saves.
    if factors not in (1, said_factors):
        raise rank_error(module, f"boft_R has {factors} factors", str(said_factors), "boft_n_butterfly_factor")
    if factors > 1 and (size % 2 or factors > blocks.bit_length() or blocks % 2 ** (factors - 1)):
        raise shape_error(
            f"{module}: {factors} butterfly factors of {blocks} blocks of {size}",
            "the size must be even, and the number of blocks a multiple of 2 to the power of factors - 1",
        )


def _order(width: int, blocks: int, size: int, index: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """PEFT's permutation of a factor: in each run of size · 2^index channels, even half blocks before odd ones."""
    half = size // 2
    run = width // (blocks >> index)
    halves = np.arange(width).reshape(-1, run // half, half)
    back = np.concatenate((halves[:, 0::2], halves[:, 1::2]), axis=1).reshape(-1)
    return np.argsort(back), back
