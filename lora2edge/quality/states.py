"""What is kept of a session in PyTorch that is closed before the next one opens: one model in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from lora2edge.contracts import AnySample, Progress, Sample
from lora2edge.quality.divergence import Divergence, compare
from lora2edge.quality.reference import OutputHead, TorchSession, inputs_of

if TYPE_CHECKING:
    from lora2edge.contracts import FloatArray

T = TypeVar("T", bound=AnySample)


class Answers(Protocol):
    """What a closed session answered."""

    def logits(self) -> Iterator[FloatArray]:
        """`[n, V]` float32 for the scored positions of each sample, in order; as often as it is asked for."""
        ...


@dataclass(frozen=True, slots=True)
class Runner:
    """How samples are run through a session, which is closed then: of a language model, or of a classifier."""

    take: Callable[[Any, Sequence[Any], Progress], Answers]
    take_live: Callable[[Any, Sequence[Any], Progress], tuple[Answers, Divergence]]
    """The live model's answers, and how far they are from those of the base alone."""
    logit_bound: float | None = None
    """What the merge proof allows as `MergeProof.logit_error`; None: nothing is measured."""


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


def take_live_states(session: TorchSession, samples: Sequence[Sample], progress: Progress) -> tuple[States, Divergence]:
    """The live model's states, and how far they are from those of the base alone; closes the session."""
    try:
        live = States(session.hidden(*inputs_of(samples), progress.advance), session.head)
        with session.adapter_off():
            base = session.hidden(*inputs_of(samples), progress.advance)
        return live, compare(live.logits(), _without_adapter(session, base), samples)
    finally:
        session.close()


def _without_adapter(session: TorchSession, hidden: Sequence[FloatArray]) -> Iterator[FloatArray]:
    """The adapter is switched off for each call alone: the live logits come from the same output layer."""
    for states in hidden:
        with session.adapter_off():
            logits = session.head(states)
        yield logits


LANGUAGE = Runner(take_states, take_live_states)


def first_samples(samples: Sequence[T], positions: int) -> list[T]:
    """The first samples that have that many scored positions together."""
    chosen: list[T] = []
    found = 0
    for sample in samples:
        if found >= positions:
            break
        chosen.append(sample)
        found += len(sample.positions)
    return chosen
