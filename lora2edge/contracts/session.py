"""Opened artifacts, and the baseline: one contract for quality and speed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from lora2edge.contracts.texts import Encoded, Message

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    FloatArray = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class SessionOptions:
    """How a session is opened, JSON-ready with `asdict`."""

    device: str
    """"cpu" or "cuda"."""
    threads: int
    slots: int
    """Requests that are served together."""
    max_length: int
    """Tokens of prompt and response together, per slot."""
    trust_remote_code: bool = False
    """Whether code that comes with a checkpoint may be run."""


@dataclass(frozen=True, slots=True)
class SessionFacts:
    """What a session runs on: printed beside every figure that it gives."""

    backend: str
    device: str
    dtype: str
    slots: int
    """Requests that are decoded together."""
    threads: int
    max_length: int
    """Tokens of prompt and response together, per slot."""
    batching: str
    """How concurrent requests are served, in words."""
    build: str
    """The kernels' build, e.g. "xllamacpp 2026.10.11549 prebuilt (AVX2)"."""
    versions: Mapping[str, str] = field(default_factory=dict)
    reference: str = ""
    """Of a baseline: what it is, where PEFT cannot compute the combination of adapters live."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen. Greedy is what measurements use."""

    temperature: float = 0.0


GREEDY = Sampling()


class Session(Protocol):
    """An opened artifact, or the baseline."""

    @property
    def facts(self) -> SessionFacts: ...

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of the rendered conversation, with the generation prompt: the runtime's own tokenizer."""
        ...

    def logits(self, batch: Sequence[Sequence[int]], keep: Sequence[Sequence[int]]) -> Iterator[FloatArray]:
        """For each sequence of `batch`, in order: `[len(keep[i]), V]` float32, logits at the kept positions."""
        ...

    def generate(
        self, ids: Sequence[int], *, max_new: int, stop: Sequence[int], sampling: Sampling = GREEDY
    ) -> Iterator[int]:
        """New token ids, one by one, without the stop token. Thread-safe: queues beyond the slots.

        Closing the iterator cancels the request. An empty `stop` generates `max_new` tokens, whatever they are.
        """
        ...

    def close(self) -> None: ...


class Classifier(Protocol):
    """An opened artifact, or the baseline, where the task is a classification."""

    @property
    def facts(self) -> SessionFacts: ...
    @property
    def labels(self) -> Sequence[str]:
        """Names of the classes, in the order of the logits."""
        ...

    def encode(self, text: str, pair: str | None = None) -> Encoded:
        """Token ids with the special tokens that the model was trained with: the runtime's own tokenizer."""
        ...

    def classify(self, batch: Sequence[Encoded]) -> list[FloatArray]:
        """For each text, in order, float32 logits: `[labels]`, or `[tokens, labels]` where tokens are classified.

        The batch runs at once, padded on the right; which texts are in it changes a logit by rounding only.
        """
        ...

    def close(self) -> None: ...
