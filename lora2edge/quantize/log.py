"""What was done to each tensor, where its inputs or weights were not sound as well: for the manifest."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lora2edge.quantize.factor import Factor
from lora2edge.quantize.grid import Grid

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


@dataclass(frozen=True, slots=True)
class Rounded:
    """One tensor's entry."""

    tensor: str
    method: str
    """`gptq` or `nearest`."""
    damping: float | None
    """Of H, as a share of its mean diagonal."""
    raised: bool
    """Whether the factorization needed more damping than was asked for."""
    scarce: bool
    """Whether there were fewer tokens than input channels."""
    tokens: int
    dropped_tokens: int
    """Tokens with an input that was not finite."""
    dead_channels: int
    """Input channels that were always zero."""
    zero_groups: int
    """Groups of weights whose step is 0."""
    fallback: str | None
    """Why the tensor was rounded to nearest."""


class RoundingLog:
    """An entry for each tensor that was rounded."""

    def __init__(self) -> None:
        self._entries: dict[str, Rounded] = {}

    def add(self, tensor: str, grid: Grid, factor: Factor) -> None:
        """Some rows of `tensor` were rounded on `grid`."""
        before = self._entries.get(tensor)
        self._entries[tensor] = Rounded(
            tensor=tensor,
            method="nearest" if factor.fallback else "gptq",
            damping=None if factor.fallback else factor.damping,
            raised=factor.raised,
            scarce=factor.scarce,
            tokens=factor.tokens,
            dropped_tokens=factor.dropped_tokens,
            dead_channels=len(factor.dead),
            zero_groups=int(np.count_nonzero(grid.step == 0)) + (before.zero_groups if before else 0),
            fallback=factor.fallback,
        )

    def extend(self, entries: Iterable[Rounded]) -> None:
        """What another log has."""
        self._entries.update((entry.tensor, entry) for entry in entries)

    @property
    def entries(self) -> Sequence[Rounded]:
        """By the tensors' names."""
        return [entry for _, entry in sorted(self._entries.items())]

    def to_json(self) -> dict[str, Any]:
        """Counts, and the entries of the tensors where something was not as usual."""
        entries = self.entries
        unusual = [entry for entry in entries if self._is_unusual(entry)]
        return {
            "tensors": len(entries),
            "by_method": dict(sorted(Counter(entry.method for entry in entries).items())),
            "unusual": [asdict(entry) for entry in unusual],
        }

    def notes(self) -> list[str]:
        """What the user should know: a line for each kind of fault, with its count."""
        entries = self.entries
        lines = []
        for reason, count in sorted(Counter(entry.fallback for entry in entries if entry.fallback).items()):
            lines.append(f"{count} of {len(entries)} tensors were rounded to nearest, without GPTQ: {reason}")
        raised = [entry for entry in entries if entry.damping is not None and entry.raised]
        if raised:
            most = max(entry.damping or 0 for entry in raised)
            lines.append(f"{len(raised)} tensors needed more damping than was asked for, up to {most:g}")
        scarce = sum(entry.scarce and entry.fallback is None for entry in entries)
        if scarce:
            lines.append(
                f"{scarce} of {len(entries)} tensors have as many input channels as there were calibration "
                "tokens, or more: with more text they would be rounded better"
            )
        dropped = [entry for entry in entries if entry.dropped_tokens]
        if dropped:
            most_dropped = max(entry.dropped_tokens for entry in dropped)
            lines.append(
                f"the inputs of {len(dropped)} tensors were NaN or infinite for up to {most_dropped} calibration "
                "tokens, which were left out"
            )
        dead = [entry for entry in entries if entry.dead_channels]
        if dead:
            channels = sum(entry.dead_channels for entry in dead)
            lines.append(f"{channels} input channels of {len(dead)} tensors were always zero: rounded to nearest there")
        return lines

    @staticmethod
    def _is_unusual(entry: Rounded) -> bool:
        sound = entry.fallback is None and not entry.raised and not entry.scarce
        return not sound or bool(entry.dropped_tokens or entry.dead_channels or entry.zero_groups)
