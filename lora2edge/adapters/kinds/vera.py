"""VeRA (arXiv 2310.11454): all modules share two random matrices, each trains two vectors of its own."""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from lora2edge.adapters.kinds.common import (
    COMMON_KEYS,
    RESTORE,
    axes,
    by_module,
    demand,
    flag,
    integer,
    no_matrix,
    rank_error,
    shape_error,
    whole,
)
from lora2edge.adapters.parts import Part
from lora2edge.checkpoint import TensorReader
from lora2edge.errors import AdapterError, MissingExtraError

if TYPE_CHECKING:
    from lora2edge.contracts import FloatArray

KEYS = COMMON_KEYS | {"d_initial", "init_weights", "projection_prng_key", "r", "save_projection", "vera_dropout"}
"""Settings that are handled here or have no effect after training."""

_NAMES = re.compile(r"(?P<module>.+)\.(?P<role>vera_lambda_[bd])")
_SHARED = re.compile(r"(base_model\.)?vera_(?P<side>[AB])")


class Projection(Protocol):
    """The two random matrices."""

    @property
    def tensors(self) -> tuple[str, ...]: ...

    def misfit(self, module: str, shape: tuple[int, ...]) -> str | None:
        """Why they are too small for a weight of `shape`, or None."""
        ...

    def load(self, rows: int) -> tuple[FloatArray, FloatArray]:
        """A `[r, widest input]`, and the first `rows` of B `[widest output, r]`."""
        ...


@dataclass(frozen=True, slots=True)
class SharedPair:
    """ΔW = diag(b) B diag(d) A, of the corner of B and A that the module needs."""

    module: str
    reader: TensorReader
    b: str
    """`[out]`."""
    d: str
    """`[r]`."""
    projection: Projection
    parameter: str = "weight"

    @property
    def tensors(self) -> tuple[str, ...]:
        return (self.b, self.d, *self.projection.tensors)

    def misfit(self, shape: tuple[int, ...]) -> str | None:
        if problem := no_matrix(self.module, shape):
            return problem
        outputs = self.reader.tensors[self.b].shape[0]
        if outputs != shape[0]:
            return f"{self.module}: vera_lambda_b has {outputs} outputs, the base {shape[0]}"
        return self.projection.misfit(self.module, shape)

    def load(self) -> SharedPairUpdate:
        b, d = whole(self.reader, self.b), whole(self.reader, self.d)
        right, left = self.projection.load(len(b))
        return SharedPairUpdate(left * b[:, None], right * d[:, None])


@dataclass(frozen=True, slots=True)
class SharedPairUpdate:
    left: FloatArray
    """`[out, r]`."""
    right: FloatArray
    """`[r, widest input of the adapter]`: the first columns are the module's."""

    def apply(self, rows: FloatArray, start: int, stop: int) -> FloatArray:
        rows += self.left[start:stop] @ self.right[:, : rows.shape[1]]
        return rows


@dataclass(frozen=True, slots=True)
class Saved:
    """The matrices of the file."""

    reader: TensorReader
    a: str
    b: str

    @property
    def tensors(self) -> tuple[str, ...]:
        return (self.a, self.b)

    def misfit(self, module: str, shape: tuple[int, ...]) -> str | None:
        largest = [self.reader.tensors[self.b].shape[0], self.reader.tensors[self.a].shape[1]]
        if shape[0] <= largest[0] and shape[1] <= largest[1]:
            return None
        return f"{module}: vera_B and vera_A are for weights up to {largest}, the base has {list(shape)}"

    def load(self, rows: int) -> tuple[FloatArray, FloatArray]:
        return whole(self.reader, self.a), self.reader.rows(self.b, 0, rows)


@dataclass(frozen=True, slots=True)
class Drawn:
    """The matrices drawn again from the key, as PEFT does where they were not saved.

    Their shape is that of the largest modules, which the base alone knows: every part's `misfit` tells it here, and
    comes before any part's `load`.
    """

    rank: int
    key: int
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Module → the base's `[out, in]`."""

    @property
    def tensors(self) -> tuple[str, ...]:
        return ()

    def misfit(self, module: str, shape: tuple[int, ...]) -> str | None:
        self.shapes[module] = shape
        return None

    def load(self, rows: int) -> tuple[FloatArray, FloatArray]:
        import torch

        outputs, inputs = (max(shape[axis] for shape in self.shapes.values()) for axis in (0, 1))
        generator = torch.Generator(device="cpu").manual_seed(self.key)
        drawn = []
        for shape in ((self.rank, inputs), (outputs, self.rank)):
            bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(shape[1]))  # in PEFT's order: the last bit depends on it
            matrix = torch.empty(shape, dtype=torch.float32)
            drawn.append(np.asarray(matrix.uniform_(-bound, bound, generator=generator).numpy(), np.float32))
        a, b = drawn
        return a, b[:rows]


def read(config: Mapping[str, Any], reader: TensorReader, tensors: Mapping[str, str]) -> list[Part]:
    """The parts of a VeRA adapter; `tensors`: path in the model → name in the file. Other tensors are left alone.

    The shared matrices have the paths `base_model.vera_A` and `base_model.vera_B`: PEFT saves them beside the model.
    Raises AdapterError for tensors that are incomplete or do not agree with the configuration, MissingExtraError
    where they must be drawn again and PyTorch is not installed.
    """
    modules = by_module(tensors, _NAMES)
    shared = {match["side"]: name for path, name in tensors.items() if (match := _SHARED.fullmatch(path))}
    if not modules and not shared:
        return []
    rank = integer(config, "r")
    projection = _projection(config, reader, rank, shared)
    parts: list[Part] = []
    for module, found in modules.items():
        demand(module, found, ("vera_lambda_b", "vera_lambda_d"))
        axes(module, reader, found, dict.fromkeys(found, 1))
        b, d = found["vera_lambda_b"], found["vera_lambda_d"]
        if reader.tensors[d].shape[0] != rank:
            raise rank_error(module, f"vera_lambda_d has rank {reader.tensors[d].shape[0]}", str(rank), "r")
        parts.append(SharedPair(module, reader, b, d, projection))
    if not parts:
        raise AdapterError(
            "adapter-incomplete",
            "the file holds VeRA's shared matrices, and the vectors of no module",
            why="vera_lambda_b and vera_lambda_d are missing",
            hint="save the adapter again",
        )
    return parts


def _projection(config: Mapping[str, Any], reader: TensorReader, rank: int, shared: Mapping[str, str]) -> Projection:
    if not flag(config, "save_projection", True):
        return _drawn(config, rank, shared)
    roles = {f"vera_{side}": name for side, name in shared.items()}
    demand("the adapter (save_projection is true)", roles, ("vera_A", "vera_B"))
    axes("the adapter", reader, roles, dict.fromkeys(roles, 2))
    a, b = (reader.tensors[roles[role]].shape for role in ("vera_A", "vera_B"))
    if not a[0] == b[1] == rank:
        raise rank_error("the adapter", f"vera_A has rank {a[0]}, vera_B {b[1]}", str(rank), "r")
    if 0 in (*a, *b):
        raise shape_error(f"vera_A is {list(a)}, vera_B is {list(b)}", "neither may be empty")
    return Saved(reader, roles["vera_A"], roles["vera_B"])


def _drawn(config: Mapping[str, Any], rank: int, shared: Mapping[str, str]) -> Projection:
    if shared:
        raise AdapterError(
            "adapter-setting",
            f"save_projection is false, and the file holds {', '.join(shared.values())}",
            why="PEFT passes over them and draws others from projection_prng_key",
            hint=f'{RESTORE}, or write "save_projection": true where the file is right',
        )
    key = integer(config, "projection_prng_key", least=-(2**63), most=2**64 - 1)
    if importlib.util.find_spec("torch") is None:
        raise MissingExtraError(
            "missing-extra",
            "torch is not installed",
            why="the adapter was saved without its random matrices (save_projection is false): PyTorch's generator "
            "draws them again",
            hint="pip install 'lora2edge[torch]'",
        )
    return Drawn(rank, key)
