"""How the tokens of a calibration set lie in the files of the pass: the shared prefix, then sample by sample."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from lora2edge.calibration.layers import Batch
from lora2edge.contracts import Sample

_BATCH_TOKENS = 1024
"""Padded tokens of one forward pass; larger activations go back to the system after each layer, which costs more."""


@dataclass(frozen=True)
class Layout:
    """The order in which tokens are run. Rows of a file are in this order: no padding, the prefix once."""

    ids: tuple[tuple[int, ...], ...]
    """Of each sample, in the samples' order."""
    prefix: int
    """Tokens that all samples begin with, and that are run once."""

    @staticmethod
    def of(samples: Sequence[Sample], *, shares_prefix: bool) -> Layout:
        """`shares_prefix`: whether what all samples begin with may be run once."""
        ids = tuple(sample.ids for sample in samples)
        return Layout(ids, _shared_prefix(ids) if shares_prefix else 0)

    @property
    def rows(self) -> int:
        """Of a file."""
        return self.prefix + sum(len(ids) - self.prefix for ids in self.ids)

    @cached_property
    def first(self) -> Batch | None:
        """The prefix, which counts for every sample; None where there is none."""
        return Batch([self.ids[0][: self.prefix]], len(self.ids)) if self.prefix else None

    @cached_property
    def groups(self) -> list[list[int]]:
        """Samples of similar length that are run together, at most `_BATCH_TOKENS` tokens when padded."""
        groups: list[list[int]] = [[]]
        for index in sorted(range(len(self.ids)), key=lambda index: len(self.ids[index])):
            if groups[-1] and (len(groups[-1]) + 1) * len(self.ids[index]) > _BATCH_TOKENS:
                groups.append([])
            groups[-1].append(index)
        return groups

    def batches(self) -> Iterator[Batch]:
        """What is run behind the prefix."""
        for group in self.groups:
            yield Batch([self.ids[index][self.prefix :] for index in group])

    def all_batches(self) -> Iterator[Batch]:
        """All that is run: the prefix, where there is one, and what is behind it."""
        if self.first:
            yield self.first
        yield from self.batches()

    def places(self) -> list[range]:
        """Which rows of a file each sample's own tokens, those behind the prefix, are."""
        found: dict[int, range] = {}
        start = self.prefix
        for index in itertools.chain.from_iterable(self.groups):
            stop = start + len(self.ids[index]) - self.prefix
            found[index], start = range(start, stop), stop
        return [found[index] for index in range(len(self.ids))]


def _shared_prefix(ids: Sequence[tuple[int, ...]]) -> int:
    """How many tokens all begin with, so that they are run once; each keeps a token of its own."""
    rows = [row[:-1] for row in ids]
    first, last = min(rows, default=()), max(rows, default=())  # in the order of a dictionary
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False)))
