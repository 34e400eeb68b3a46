"""OFT (arXiv 2306.07280, 2506.19847): the inputs of a layer are turned by a block-diagonal orthogonal matrix."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lora2edge.adapters.kinds.common import (
    COMMON_KEYS,
    axes,
    by_module,
    flag,
    integer,
    malformed,
    no_matrix,
    number,
    shape_error,
    whole,
)
from lora2edge.adapters.parts import Part
from lora2edge.checkpoint import TensorReader
from lora2edge.errors import AdapterError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lora2edge.contracts import FloatArray

KEYS = COMMON_KEYS | {
    "block_share", "coft", "eps", "init_weights", "module_dropout", "num_cayley_neumann_terms", "oft_block_size", "r",
    "use_cayley_neumann",
}  # fmt: skip
"""Settings that are handled here or have no effect after training."""

_NAMES = re.compile(r"(?P<module>.+)\.(?P<role>oft_(embedding_)?R)\.weight")
_OLD = re.compile(r"(?P<module>.+)\.(?P<role>oft_[rs])")
_MOST_TERMS = 1000
"""A series that long has converged, or never will."""
_AT_ONCE = 1 << 20
"""Elements of rotations computed together in float64."""


@dataclass(frozen=True, slots=True)
class Series:
    """How a skew-symmetric matrix Q becomes a rotation."""

    terms: int | None
    """Of the Neumann series of (I + Q)(I − Q)⁻¹; None: Cayley's (I − Q)(I + Q)⁻¹, exact."""
    limit: float | None
    """Constrained OFT: the largest Frobenius norm of Q, times √blocks. None: free."""


@dataclass(frozen=True, slots=True)
class Rotation:
    """W' = W Rᵀ: inputs x become x R. For an embedding E' = E R: its outputs are turned."""

    module: str
    reader: TensorReader
    tensor: str
    """`[blocks, H (H − 1) / 2]`: the upper triangles of Q; one block where all share it."""
    embedding: bool
    blocks: int
    """PEFT's `r`; 0: by `size`."""
    size: int
    """PEFT's `oft_block_size`; 0: by `blocks`."""
    shared: bool
    series: Series
    parameter: str = "weight"

    @property
    def tensors(self) -> tuple[str, ...]:
        return (self.tensor,)

    def misfit(self, shape: tuple[int, ...]) -> str | None:
        if problem := no_matrix(self.module, shape):
            return problem
        blocks, size = _blocks(shape[1], self.blocks, self.size)
        wanted = (1 if self.shared else blocks, size * (size - 1) // 2)
        has = self.reader.tensors[self.tensor].shape
        if has == wanted:
            return None
        return f"{self.module}: oft_R is {list(has)}, for {shape[1]} channels of the base it must be {list(wanted)}"

    def load(self) -> RotationUpdate:
        vectors = whole(self.reader, self.tensor)
        rotations = _rotations(vectors, _size(vectors.shape[1]), self.series)
        return RotationUpdate(rotations if self.embedding else np.ascontiguousarray(rotations.transpose(0, 2, 1)))


@dataclass(frozen=True, slots=True)
class RotationUpdate:
    blocks: FloatArray
    """`[blocks, H, H]`, or `[1, H, H]` shared by all: what a row is multiplied with from the right."""

    def apply(self, rows: FloatArray, start: int, stop: int) -> FloatArray:
        return times_blocks(rows, self.blocks)


def read(config: Mapping[str, Any], reader: TensorReader, tensors: Mapping[str, str]) -> list[Part]:
    """The parts of an OFT adapter; `tensors`: path in the model → name in the file. Other tensors are left alone.

    Raises AdapterError for tensors that do not agree with the configuration, and for files of versions of PEFT
    whose OFT was another function.
    """
    if old := by_module(tensors, _OLD):
        module, found = next(iter(old.items()))
        raise AdapterError(
            "adapter-setting",
            f"{module} has {next(iter(found))}: an OFT adapter of PEFT 0.15 or older",
            why="OFT was another function then; today's PEFT passes over its tensors, and the model is the base",
            hint="merge it with the PEFT that trained it (merge_and_unload), and give the result as the base",
        )
    modules = by_module(tensors, _NAMES)
    if not modules:
        return []
    series = _series(config)
    blocks, size = integer(config, "r", least=0), integer(config, "oft_block_size", least=0)
    if (blocks == 0) == (size == 0):
        raise malformed("oft_block_size", size, f"{'0' if blocks else 'a positive number'}, as r is {blocks}")
    shared = flag(config, "block_share", False)
    parts: list[Part] = []
    for module, found in modules.items():
        axes(module, reader, found, dict.fromkeys(found, 2))
        if len(found) > 1:
            raise shape_error(f"{module} has both oft_R and oft_embedding_R", "it is a linear layer or an embedding")
        role, name = next(iter(found.items()))
        shape = reader.tensors[name].shape
        if shape[0] == 0 or _size(shape[1]) * (_size(shape[1]) - 1) // 2 != shape[1]:
            raise shape_error(f"{module}: {role} is {list(shape)}", "its columns are the upper triangle of a matrix")
        parts.append(Rotation(module, reader, name, role == "oft_embedding_R", blocks, size, shared, series))
    return parts


def times_blocks(rows: FloatArray, blocks: FloatArray) -> FloatArray:
    """`rows` `[n, D · H]` times the block-diagonal matrix of `blocks` `[D, H, H]`, or of D times the one block."""
    size = blocks.shape[-1]
    if len(blocks) == 1:
        product: FloatArray = rows.reshape(-1, size) @ blocks[0]
        return product.reshape(rows.shape)
    split = rows.reshape(len(rows), -1, size).transpose(1, 0, 2)
    turned: FloatArray = np.matmul(split, blocks)
    return turned.transpose(1, 0, 2).reshape(rows.shape)


def cayley(skew: NDArray[np.float64]) -> NDArray[np.float64]:
    """(I − Q)(I + Q)⁻¹ for each Q of `skew` `[n, H, H]`: orthogonal."""
    identity = np.eye(skew.shape[-1])
    # The factors commute: solved from the left it is the same matrix.
    return np.linalg.solve(identity + skew, identity - skew).astype(np.float64, copy=False)


def _series(config: Mapping[str, Any]) -> Series:
    limit = number(config, "eps", 6e-5) if flag(config, "coft", False) else None
    terms = integer(config, "num_cayley_neumann_terms", 5, most=_MOST_TERMS)
    if not flag(config, "use_cayley_neumann", True):
        return Series(None, limit)
    version = config.get("peft_version")
    numbers = re.match(r"(\d+)\.(\d+)", version) if isinstance(version, str) else None
    known = (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)
    if known < (0, 18) or (known == (0, 18) and "dev" in str(version)):
        raise AdapterError(
            "adapter-setting",
            "the OFT adapter was trained with PEFT 0.17 or older, with use_cayley_neumann",
            why=f"peft_version is {version!r}; PEFT 0.18 changed the last term of that series, so that the adapter "
            "loaded there is not the one that was trained",
            hint="merge it with the PEFT that trained it (merge_and_unload), and give the result as the base",
        )
    return Series(terms, limit)


def _rotations(vectors: FloatArray, size: int, series: Series) -> FloatArray:
    """`[n, H, H]` float32, computed in float64, a few blocks at a time."""
    count = len(vectors)
    rotations = np.empty((count, size, size), np.float32)
    upper = np.triu_indices(size, 1)
    limit = None if series.limit is None else series.limit / math.sqrt(count)
    step = max(1, _AT_ONCE // (size * size))
    for start in range(0, count, step):
        part = vectors[start : start + step].astype(np.float64)
        skew = np.zeros((len(part), size, size))
        skew[:, upper[0], upper[1]] = part
        skew -= skew.transpose(0, 2, 1)
        if limit is not None:
            norms = np.sqrt(np.square(skew).sum((1, 2), keepdims=True))
            skew *= np.where(norms <= limit, 1, limit / np.maximum(norms, np.finfo(np.float64).tiny))
        rotations[start : start + step] = cayley(skew) if series.terms is None else _neumann(skew, series.terms)
    return rotations


def _neumann(skew: NDArray[np.float64], terms: int) -> NDArray[np.float64]:
    """PEFT's series since 0.18: I + 2 Q + 2 Q² + … + Qⁿ⁻¹ with n `terms`, the last one once.

    With 3 terms it is that of 4.
    """
    total = np.eye(skew.shape[-1]) + np.zeros_like(skew)
    if terms == 1:
        return total
    total += 2 * skew
    if terms == 2:
        return total
    power = skew @ skew
    total += 2 * power
    for _ in range(3, terms - 1):
        power = power @ skew
        total += 2 * power
    return total + power @ skew


def _blocks(width: int, blocks: int, size: int) -> tuple[int, int]:
    """PEFT's number and size of blocks for `width` channels, one of the two given."""
    if blocks:
        blocks = _nearest_divisor(width, blocks)
        return blocks, width // blocks
    size = _nearest_divisor(width, size)
    return width // size, size


def _nearest_divisor(width: int, wanted: int) -> int:
    """PEFT's rule: the divisor of `width` nearest to `wanted`, the lower of two."""
    if wanted >= width:
        return width
    higher = next(n for n in range(wanted, width + 1) if width % n == 0)
    lower = next(n for n in range(wanted, 0, -1) if width % n == 0)
    return lower if wanted - lower <= higher - wanted else higher


def _size(elements: int) -> int:
    """H where `elements` = H (H − 1) / 2."""
    return (1 + math.isqrt(1 + 8 * elements)) // 2
