"""Texts, as the user gives them and as a model takes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

Message = Mapping[str, str]
"""`{"role": "user", "content": "…"}`"""


@dataclass(frozen=True, slots=True)
class Item:
    """One line of the user's data."""

    messages: tuple[Message, ...]
    """Ends with the assistant's message, the reference response."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """Other short string fields of the line, e.g. `topic` and `lang`."""

    @property
    def prompt(self) -> tuple[Message, ...]:
        return self.messages[:-1]

    @property
    def response(self) -> str:
        return self.messages[-1]["content"]


@dataclass(frozen=True, slots=True)
class Sample:
    """One rendered and tokenized item: prompt, then response with its end marker."""

    ids: tuple[int, ...]
    prompt_length: int
    item: Item

    @property
    def positions(self) -> range:
        """The positions whose next token is a response token: what perplexity and KL are taken over."""
        return range(self.prompt_length - 1, len(self.ids) - 1)

    @property
    def targets(self) -> tuple[int, ...]:
        """The response tokens: what each of `positions` predicts."""
        return self.ids[self.prompt_length :]


@dataclass(frozen=True, slots=True)
class Encoded:
    """A text, or a pair of texts, as a classifier takes it."""

    ids: tuple[int, ...]
    types: tuple[int, ...] = ()
    """Segment ids (`token_type_ids`), one for each id; empty: all are 0."""


@dataclass(frozen=True, slots=True)
class LabelledItem:
    """One line of a classifier's data: a text (or a pair) of one class, or words of one class each."""

    gold: tuple[int | None, ...]
    """Class index of the text, or of each word; None: the word is not scored."""
    text: str = ""
    pair: str | None = None
    words: tuple[str, ...] = ()
    """Not empty where tokens are classified; then there is no text."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """Other short string fields of the line."""


@dataclass(frozen=True, slots=True)
class LabelledSample:
    """One encoded item of a classifier's data."""

    encoded: Encoded
    positions: tuple[int, ...]
    """Tokens whose logits are scored, the first one of each word; `(0,)` where the whole text is classified, whose
    logits are one row."""
    targets: tuple[int, ...]
    """The class index of each of `positions`."""
    item: LabelledItem

    @property
    def ids(self) -> tuple[int, ...]:
        return self.encoded.ids


AnySample = Sample | LabelledSample
"""Both have `ids`, and `targets` at `positions`."""
