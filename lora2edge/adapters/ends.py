"""The two ends of a model, token embedding and output head: which tensors hold one weight, and what unties them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from lora2edge.adapters.kinds.lora import LowRank
from lora2edge.adapters.kinds.tokens import TokenRows, TokensBelow
from lora2edge.adapters.parts import Part
from lora2edge.adapters.read import Adapter
from lora2edge.checkpoint import TensorReader, embedding_name, head_name, says_tied
from lora2edge.contracts import Base, Task, TensorInfo
from lora2edge.errors import AdapterError

if TYPE_CHECKING:
    from lora2edge.contracts import FloatArray

_HEAD_OF = {"gpt_neox": "embed_out.weight"}
_GENERATING = ("causal-lm", "seq2seq-lm")
_STACKS = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
"""Where token ids go into T5: modules of their own, which share the weight of a third one that nothing calls."""
_SCALED = {"t5"}
"""Models whose config.json says with `tie_word_embeddings` whether the head's inputs are scaled (transformers 5)."""
_COMPARED_AT_ONCE = 1 << 20


@dataclass(frozen=True, slots=True)
class WholeTensor:
    """A tensor of the adapter that stands in for one of the base."""

    reader: TensorReader
    name: str
    expert: int | None = None
    """Where the tensor is a stack of experts' matrices: which of them, and which of its rows."""
    first_row: int = 0
    row_count: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        shape = self.reader.tensors[self.name].shape
        return shape if self.expert is None else (self.row_count, *shape[2:])

    def rows(self, start: int, stop: int) -> FloatArray:
        if self.expert is None:
            return self.reader.rows(self.name, start, stop)
        rows = self.reader.rows(self.name, self.expert, self.expert + 1)[
            0, self.first_row : self.first_row + self.row_count
        ]
        return rows[start:stop].copy()


@dataclass(frozen=True, slots=True)
class Change:
    """How one tensor of the view is made: `whole` or else the base's `source`, updated by the part."""

    adapter: Adapter
    source: str | None
    """None: zeros, for a bias that the base does not have."""
    whole: WholeTensor | None = None
    part: Part | None = None
    transposed: bool = False
    """Whether the tensor is stored the other way round than PEFT's part has it: embeddings of LoRA, and Conv1D."""


@dataclass(frozen=True, slots=True)
class Placement:
    """The adapter, seen from the base."""

    changes: dict[str, Change]
    """By the view's tensor names."""
    added: tuple[TensorInfo, ...] = ()
    """Tensors that the base's files lack, or have in another shape: an untied head, biases, resized embeddings."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """What config.json must say from now on, beside what it said."""
    dropped: frozenset[str] = frozenset()
    """Tensors of the base that the view has no place for: the head of a language model that became a classifier."""
    task: Task | None = None
    """Where it is another one than the base's."""


@dataclass(frozen=True, slots=True)
class Ends:
    """The two ends of the model, by the names of their weights."""

    embedding: str | None
    """Where the files have the weight that tied modules share."""
    head: str
    """The head's own name, whether or not the files have it."""
    inputs: tuple[str, ...]
    """Where token ids go in: the embedding itself, or in an encoder-decoder one of each stack."""
    tied: tuple[str, ...]
    """The other names of the embedding's weight, not stored or stored as an equal copy."""
    unstored: frozenset[str]
    """Those of them that the files do not have."""
    follow: tuple[str, ...]
    """All that PEFT ties to the embedding's single tokens: it goes by class and config.json, whatever is stored."""
    is_output: bool = True
    """Whether the head gives logits of tokens; a classifier's does not, and is tied to nothing."""

    @property
    def names(self) -> frozenset[str]:
        return frozenset({*self.inputs, self.head, *((self.embedding,) if self.embedding else ())})

    @property
    def is_called(self) -> bool:
        """Whether the embedding is a module that computes; T5's only lends its weight."""
        return self.embedding in self.inputs

    def source(self, name: str) -> str:
        """The stored tensor that `name` starts from."""
        return self.embedding if name in self.unstored and self.embedding else name


def find_ends(base: Base, task: Task) -> Ends:
    """Tied as transformers 5 has it: two stored copies where config.json or its class says so and they are equal."""
    embedding, head = embedding_name(base.tensors), head_name(base.tensors)
    label = head or _HEAD_OF.get(str(base.config.get("model_type")), "lm_head.weight")
    if embedding is None or task not in _GENERATING:
        return Ends(
            embedding, label, (embedding,) if embedding else (), (), frozenset(), (), is_output=task in _GENERATING
        )
    inputs: tuple[str, ...] = (embedding,)
    others: tuple[str, ...] = (label,)
    said = says_tied(base.config) is True
    if task == "seq2seq-lm":  # T5: always tied, whatever config.json says
        inputs, others, said = _STACKS, (*_STACKS, label), True
    unstored = frozenset(name for name in others if name not in base.tensors)
    tied = tuple(name for name in others if name in unstored or (said and equal(base, embedding, base, name)))
    return Ends(embedding, label, inputs, tied, unstored, others if said else tied)


def share(adapter: Adapter, ends: Ends, whole: dict[str, str]) -> None:
    """A copy of the base's weight that PEFT saved along is loaded into the one tied weight, whichever end it names."""
    if not ends.tied or ends.embedding is None:
        return
    names = (ends.embedding, *ends.tied)
    given = [whole[name] for name in names if name in whole]
    if not all(equal(adapter.reader, given[0], adapter.reader, other) for other in given[1:]):
        raise ambiguous("it holds different weights for the one that embedding and head share")
    if given:
        whole.update(dict.fromkeys(names, given[0]))


def check_called(adapter: Adapter, ends: Ends) -> None:
    """Refuses what was trained on a module that lends its weight and computes nothing. Raises AdapterError."""
    if ends.is_called or ends.embedding is None:
        return
    part = adapter.parts.get(ends.embedding)
    if ends.embedding in adapter.saved or (part is not None and not isinstance(part, TokenRows)):
        raise AdapterError(
            "adapter-without-effect",
            f"the adapter changes {ends.embedding}, and the live model does not compute with what was trained there",
            why="PEFT puts it on a module that is never called: encoder, decoder and head keep the base's weight",
            hint=f"train on embed_tokens and lm_head; or remove {ends.embedding.removesuffix('.weight')!r} from "
            "adapter_config.json, and its tensors from the file: the live model stays as it is",
        )


def settle_tie(base: Base, adapter: Adapter, ends: Ends, changes: dict[str, Change]) -> Placement:
    """Unties embedding and output head exactly where the live model computes with different weights."""
    _spread_tokens(ends, changes)
    root = ends.embedding
    if not ends.tied or root is None:
        said_tied = ends.head not in ends.unstored and says_tied(base.config) is True
        return Placement(changes, config=_untied(base) if said_tied and ends.is_output else {})
    uses = (root, *ends.tied) if ends.is_called else ends.tied
    first = changes.get(uses[0])
    if all(_same_change(first, changes.get(other)) for other in uses[1:]):
        for name in (root, *ends.tied):
            changes.pop(name, None)
            if first and name not in ends.unstored:
                changes[name] = replace(first, source=name)
        return Placement(changes)
    if adapter.config.get("ensure_weight_tying") and not all(_same_pair(first, changes.get(name)) for name in uses[1:]):
        raise ambiguous("ensure_weight_tying is set, and it changes embedding and head differently")
    if not ends.is_called:
        changes.pop(root, None)
    new = [name for name in ends.tied if name in ends.unstored and (name in changes or root in changes)]
    for name in new:
        changes.setdefault(name, Change(adapter, root))
    added = tuple(replace(base.tensors[root], name=name) for name in new)
    own_head = ends.is_called or ends.head in changes
    return Placement(changes, added, _untied(base) if own_head else {})


def equal(one: Base | TensorReader, name: str, other: Base | TensorReader, other_name: str) -> bool:
    """Whether two tensors hold the same values, read slab by slab up to the first difference."""
    shape = one.tensors[name].shape
    return shape == other.tensors[other_name].shape and same_rows(
        shape, partial(one.rows, name), partial(other.rows, other_name)
    )


def same_rows(
    shape: tuple[int, ...], one: Callable[[int, int], FloatArray], other: Callable[[int, int], FloatArray]
) -> bool:
    """The same of what two functions of start and stop give."""
    rows = shape[0] if shape else 1
    step = max(1, _COMPARED_AT_ONCE * rows // max(math.prod(shape), 1))
    return all(
        np.array_equal(one(at, min(at + step, rows)), other(at, min(at + step, rows))) for at in range(0, rows, step)
    )


def ambiguous(why: str) -> AdapterError:
    return AdapterError(
        "adapter-tie-ambiguous",
        "the adapter does not say what becomes of the tied embedding and output head",
        why=why,
        hint="train again with a current PEFT, where ensure_weight_tying covers both",
    )


def _spread_tokens(ends: Ends, changes: dict[str, Change]) -> None:
    """PEFT trains single tokens of the one weight, for every module that it takes to be tied to it."""
    change = changes.get(ends.embedding) if ends.embedding else None
    if change is None or not isinstance(change.part, TokenRows):
        return
    for name in ends.follow:
        own = changes.get(name)
        if own is None or (ends.is_called and own.part is None and own.whole == change.whole):
            changes[name] = replace(change, source=ends.source(name))
        elif not ends.is_called or not isinstance(own.part, TokenRows):
            changes[name] = replace(own, part=_over_tokens(ends, name, change, own))


def _over_tokens(ends: Ends, name: str, below: Change, own: Change) -> TokensBelow:
    """Raises AdapterError for what is not simply added to the weight that the trained tokens are a part of."""
    tokens, part = below.part, own.part
    if isinstance(tokens, TokenRows) and isinstance(part, LowRank) and ends.is_called:
        is_plain = part.magnitude is None and part.start is None
        if is_plain and not own.transposed and own.whole == below.whole:
            return TokensBelow(tokens, part)
    raise ambiguous(f"{ends.embedding} has trained tokens, and {name} is changed as well")


def _untied(base: Base) -> dict[str, Any]:
    """What config.json says of a head of its own."""
    config: dict[str, Any] = {"tie_word_embeddings": False}
    if base.config.get("model_type") in _SCALED:
        scaled = base.config.get("scale_decoder_outputs")
        untied = base.config.get("tie_word_embeddings") is False
        config["scale_decoder_outputs"] = scaled if isinstance(scaled, bool) else not untied
    return config


def _same_pair(one: Change | None, other: Change | None) -> bool:
    """Whether both are the one pair that PEFT shares; each end has a scale of its own, and DoRA's lengths."""
    if one is None or other is None or not isinstance(one.part, LowRank) or not isinstance(other.part, LowRank):
        return False
    return _same_whole(one, other) and _same_factors(one.part, other.part, one.adapter.reader)


def _same_change(one: Change | None, other: Change | None) -> bool:
    if one is None or other is None:
        return one is other
    reader = one.adapter.reader
    if not _same_whole(one, other):
        return False
    mine, theirs = one.part, other.part
    if isinstance(mine, TokenRows) and isinstance(theirs, TokenRows):
        return mine.indices == theirs.indices and equal(reader, mine.tensor, reader, theirs.tensor)
    if not isinstance(mine, LowRank) or not isinstance(theirs, LowRank):
        return mine is theirs
    if (mine.rank, mine.scale, mine.magnitude) != (theirs.rank, theirs.scale, theirs.magnitude):
        return False
    return _same_factors(mine, theirs, reader)


def _same_whole(one: Change, other: Change) -> bool:
    if one.whole is None or other.whole is None:
        return one.whole is other.whole
    return one.whole.shape == other.whole.shape and same_rows(one.whole.shape, one.whole.rows, other.whole.rows)


def _same_factors(mine: LowRank, theirs: LowRank, reader: TensorReader) -> bool:
    if mine.embedding == theirs.embedding:
        return equal(reader, mine.a, reader, theirs.a) and equal(reader, mine.b, reader, theirs.b)
    return all(
        np.array_equal(_all_rows(reader, a), _all_rows(reader, b).T)
        for a, b in ((mine.a, theirs.b), (mine.b, theirs.a))
    )


def _all_rows(reader: TensorReader, name: str) -> FloatArray:
    return reader.rows(name, 0, reader.tensors[name].shape[0])
