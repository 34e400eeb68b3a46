"""What is kept of a session in PyTorch that is closed before the next one opens: one model in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora2edge.contracts import Progress, Sample
from lora2edge.quality.reference import OutputHead, TorchSession, inputs_of

if TYPE_CHECKING:
    from lora2edge.contracts import FloatArray


@dataclass(frozen=True, slots=True)
class States:
    """Last hidden states at the scored positions, and the output layer."""

    hidden: list[FloatArray]
    """`[n, H]` float32 of each sample."""
    head: OutputHead

    def logits(self) -> Iterator[FloatArray]:
        """`[n, V]` float32 of each sample, made one by one."""
        return (self.head(states) for states in self.hidden)


def take_states(session: TorchSession, samples: Sequence[Sample], progress: Progress) -> States:
    """Runs `samples` through the session, and closes it."""
    try:
        return States(session.hidden(*inputs_of(samples), progress.advance), session.head)
    finally:
        session.close()


def first_samples(samples: Sequence[Sample], positions: int) -> list[Sample]:
    """The first samples that have that many scored positions together."""
    chosen: list[Sample] = []
    found = 0
    for sample in samples:
        if found >= positions:
            break
        chosen.append(sample)
        found += len(sample.positions)
    return chosen
