"""What several adapters make of one tensor."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lora2edge.adapters.arithmetic import add_weighted, drop_random, keep_largest, merge_elected, random_mask
from lora2edge.adapters.changes import load_update
from lora2edge.adapters.ends import Change
from lora2edge.adapters.kinds.common import whole
from lora2edge.adapters.kinds.lora import ExpertPair, LowRank, PairUpdate
from lora2edge.adapters.methods import FACTORED, SUM, TRUNCATED, Combination
from lora2edge.adapters.parts import Update
from lora2edge.contracts import Base
from lora2edge.errors import CheckpointError

if TYPE_CHECKING:
    from lora2edge.contracts import FloatArray

_WORKING_COPIES = 4
"""Of a tensor in float32, beside one for each adapter: the sum, both sides of its decomposition, LAPACK's own."""
_SVD_OPERATIONS = 50
"""Times rows · columns · the smaller: a decomposition, told in the time of matrix products (measured: 32 to 55)."""


@dataclass(frozen=True, slots=True)
class Member:
    """One adapter's change of a tensor."""

    index: int
    """Of the adapter."""
    weight: float
    change: Change


@dataclass(frozen=True, slots=True)
class Joint:
    """What several adapters make of one tensor: a Part whose rows are those of the tensor as it is stored."""

    base: Base
    name: str
    shape: tuple[int, ...]
    members: tuple[Member, ...]
    combination: Combination
    rank: int
    """What a truncated decomposition keeps."""

    @property
    def module(self) -> str:
        return self.name.rpartition(".")[0]

    @property
    def parameter(self) -> str:
        return self.name.rpartition(".")[2]

    @property
    def tensors(self) -> tuple[str, ...]:
        return tuple(name for member in self.members if member.change.part for name in member.change.part.tensors)

    def misfit(self, shape: tuple[int, ...]) -> str | None:
        return None if shape == self.shape else f"{self.name} is {list(shape)}, {list(self.shape)} is needed"

    @property
    def cost(self) -> tuple[int, float]:
        """Bytes of whole tensors in memory, and operations of their decomposition; (0, 0) where factors do."""
        parts = [member.change.part for member in self.members]
        pairs = all(
            isinstance(part, ExpertPair) or (isinstance(part, LowRank) and part.magnitude is None) for part in parts
        )
        method = self.combination.method
        if method not in TRUNCATED or len(self.shape) != 2 or (method == "svd" and pairs):
            return 0, 0.0
        size = math.prod(self.shape)
        return 4 * size * (len(parts) + _WORKING_COPIES), float(_SVD_OPERATIONS * size * min(self.shape))

    def load(self) -> Update:
        """For all but pairs under `sum` and `svd`, and factors, this takes whole tensors in memory."""
        method = self.combination.method
        weights = [member.weight for member in self.members]
        if method in FACTORED and len(self.shape) == 2:
            return self._combine_factors()
        updates = [self._update_of(member) for member in self.members]
        pairs = [update for update in updates if isinstance(update, PairUpdate) and update.is_sum]
        if method in {SUM, "svd"} and len(pairs) == len(updates):
            left = np.concatenate([pair.left * np.float32(w) for pair, w in zip(pairs, weights, strict=True)], 1)
            right = np.concatenate([pair.right for pair in pairs])
            return PairUpdate.of(left, right) if method == SUM else _truncate_product(left, right, self.rank)
        if method == SUM:
            return _Differences(tuple(zip(updates, weights, strict=True)))
        changes = [self._whole_change(update) for update in updates]
        total = self._combine(changes, weights, "")
        if not np.isfinite(total).all():
            raise CheckpointError(
                "base-nan",
                f"the change of {self.name} is not finite",
                why="the base holds NaN or infinity there, or an adapter's values are too large for float32",
                hint="download the base again; train again where the adapter diverged",
            )
        return _Addition(total) if total.ndim == 1 else _truncate(total, self.rank)

    def _update_of(self, member: Member) -> Update:
        assert member.change.part is not None
        return load_update(self.base, member.change, member.change.part, self.shape)

    def _whole_change(self, update: Update) -> FloatArray:
        """dW_i, all of it."""
        if isinstance(update, PairUpdate) and update.is_sum:
            return update.product(0, self.shape[0])
        source = self.members[0].change.source
        if source is None:
            return update.apply(np.zeros(self.shape, np.float32), 0, self.shape[0])
        rows = self.base.rows(source, 0, self.shape[0])
        changed = update.apply(rows.copy(), 0, self.shape[0])
        changed -= rows
        return changed

    def _combine_factors(self) -> PairUpdate:
        """PEFT's way: A and B each by itself, the weight and the scale shared between them by their root.

        A negative weight's sign goes to A alone.
        """
        parts = [member.change.part for member in self.members]
        lefts, rights, roots, signed = [], [], [], []
        for member, part in zip(self.members, parts, strict=True):
            assert isinstance(part, LowRank)
            rights.append(whole(part.reader, part.a))
            lefts.append(whole(part.reader, part.b))
            weight = member.weight * part.scale
            roots.append(math.sqrt(abs(weight)))
            signed.append(math.copysign(roots[-1], weight))
        left = self._combine(lefts, roots, ".lora_B")
        right = self._combine(rights, signed, ".lora_A")
        if self.members[0].change.transposed:
            left, right = np.ascontiguousarray(right.T), np.ascontiguousarray(left.T)
        return PairUpdate.of(left, right)

    def _combine(self, changes: list[FloatArray], weights: list[float], end: str) -> FloatArray:
        """The method's own arithmetic."""
        stem = self.combination.method.removesuffix("_svd")
        density = self.combination.density
        if density is not None:
            for at, member in enumerate(self.members):
                if stem.startswith("dare"):
                    seed = self.combination.seed or 0
                    mask = random_mask(changes[at].shape, density, seed, self.name + end, member.index)
                    changes[at] = drop_random(changes[at], density, mask)
                else:
                    changes[at] = keep_largest(changes[at], density)
        if stem.endswith("ties"):
            return merge_elected(changes, weights, self.combination.majority_sign or "total")
        return add_weighted(changes, weights)


@dataclass(frozen=True, slots=True)
class _Differences:
    """W + Σ w_i (update_i(W) - W)."""

    members: tuple[tuple[Update, float], ...]

    def apply(self, rows: FloatArray, start: int, stop: int) -> FloatArray:
        total = rows.copy()
        for update, weight in self.members:
            changed = update.apply(rows.copy(), start, stop)
            changed -= rows
            changed *= np.float32(weight)
            total += changed
        return total


@dataclass(frozen=True, slots=True)
class _Addition:
    values: FloatArray

    def apply(self, rows: FloatArray, start: int, stop: int) -> FloatArray:
        rows += self.values[start:stop]
        return rows


def _truncate_product(left: FloatArray, right: FloatArray, rank: int) -> PairUpdate:
    """The best approximation of left · right of that rank: a decomposition of the two triangles of QR, in float64."""
    q_left, r_left = np.linalg.qr(left.astype(np.float64))
    q_right, r_right = np.linalg.qr(right.T.astype(np.float64))
    u, sizes, v = np.linalg.svd(r_left @ r_right.T, full_matrices=False)
    new_left = (q_left @ u[:, :rank]) * sizes[:rank]
    return PairUpdate.of(new_left.astype(np.float32), (v[:rank] @ q_right.T).astype(np.float32))


def _truncate(change: FloatArray, rank: int) -> PairUpdate:
    """The best approximation of that rank, in float32 as PEFT computes it."""
    u, sizes, v = np.linalg.svd(change, full_matrices=False)
    return PairUpdate.of(np.ascontiguousarray(u[:, :rank] * sizes[:rank]), np.ascontiguousarray(v[:rank]))
