"""How one tensor of a merged view is made: where it starts, and what is done to it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lora2edge.adapters.ends import Change
from lora2edge.adapters.kinds.lora import LowRank
from lora2edge.adapters.parts import Part, Update
from lora2edge.contracts import Base

if TYPE_CHECKING:
    from lora2edge.contracts import FloatArray

_SLAB_ELEMENTS = 1 << 20


def read_unadapted(base: Base, change: Change, shape: tuple[int, ...], start: int, stop: int) -> FloatArray:
    """What the part changes: the base's rows, zeros, or those that the adapter saved whole.

    `shape` is that of the view's tensor.
    """
    if change.whole is not None:
        return change.whole.rows(start, stop)
    if change.source is None:
        return np.zeros((stop - start, *shape[1:]), np.float32)
    return base.rows(change.source, start, stop)


def load_update(base: Base, change: Change, part: Part, shape: tuple[int, ...]) -> Update:
    """The part with its tensors in memory, for rows as they are stored, whichever way round that is."""
    started = isinstance(part, LowRank) and part.start is not None
    if not change.transposed and not started:
        return part.load()

    def slabs() -> Iterator[tuple[int, int, FloatArray]]:
        step = max(1, _SLAB_ELEMENTS // shape[1])
        for start in range(0, shape[0], step):
            stop = min(start + step, shape[0])
            yield start, stop, read_unadapted(base, change, shape, start, stop)

    if isinstance(part, LowRank):
        return part.load_for(slabs, transposed=change.transposed)
    weight = np.concatenate([rows for _, _, rows in slabs()])
    return _Whole(np.ascontiguousarray(part.load().apply(weight.T.copy(), 0, weight.shape[1]).T))


@dataclass(frozen=True, slots=True)
class _Whole:
    """A merged tensor, whole: for parts whose rows are the columns of the stored weight."""

    values: FloatArray

    def apply(self, rows: FloatArray, start: int, stop: int) -> FloatArray:
        return self.values[start:stop].copy()
