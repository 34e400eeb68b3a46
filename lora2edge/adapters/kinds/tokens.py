"""Single tokens of an embedding, trained whole, and what else was trained on top of them where both ends are one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lora2edge.adapters.kinds.common import other_shape, whole
from lora2edge.adapters.parts import Part, Update
from lora2edge.checkpoint import TensorReader

if TYPE_CHECKING:
    from lora2edge.contracts import FloatArray


@dataclass(frozen=True, slots=True)
class TokenRows:
    """`trainable_token_indices`: some rows of an embedding, trained whole."""

    module: str
    reader: TensorReader
    tensor: str
    indices: tuple[int, ...]

    @property
    def parameter(self) -> str:
        return "weight"

    @property
    def tensors(self) -> tuple[str, ...]:
        return (self.tensor,)

    def misfit(self, shape: tuple[int, ...]) -> str | None:
        beyond = [index for index in self.indices if index >= shape[0]]
        if beyond:
            return f"{self.module} has {shape[0]} rows, token {beyond[0]} was trained"
        return other_shape(self, self.reader.tensors[self.tensor].shape, (len(self.indices), *shape[1:]))

    def load(self) -> Update:
        return _Replacement(np.asarray(self.indices), whole(self.reader, self.tensor))


@dataclass(frozen=True, slots=True)
class TokensBelow:
    """A tied output head with a LoRA pair of its own: live, that lies over the head with the trained tokens in it."""

    tokens: TokenRows
    upper: Part

    @property
    def module(self) -> str:
        return self.upper.module

    @property
    def parameter(self) -> str:
        return self.upper.parameter

    @property
    def tensors(self) -> tuple[str, ...]:
        return *self.tokens.tensors, *self.upper.tensors

    def misfit(self, shape: tuple[int, ...]) -> str | None:
        return self.tokens.misfit(shape) or self.upper.misfit(shape)

    def load(self) -> Update:
        return _Both(self.tokens.load(), self.upper.load())


@dataclass(frozen=True, slots=True)
class _Replacement:
    indices: Any
    """`[n]` int64."""
    values: FloatArray
    """`[n, H]`."""

    def apply(self, rows: FloatArray, start: int, stop: int) -> FloatArray:
        inside = (start <= self.indices) & (self.indices < stop)
        rows[self.indices[inside] - start] = self.values[inside]
        return rows


@dataclass(frozen=True, slots=True)
class _Both:
    first: Update
    then: Update

    def apply(self, rows: FloatArray, start: int, stop: int) -> FloatArray:
        return self.then.apply(self.first.apply(rows, start, stop), start, stop)
