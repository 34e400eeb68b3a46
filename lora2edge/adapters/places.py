"""Which stored tensor each part of an adapter changes, and whether embedding and output head stay tied."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from lora2edge.adapters.read import Adapter, LowRank, is_saved
from lora2edge.checkpoint import StoredCheckpoint, TensorReader, embedding_name, head_name
from lora2edge.contracts import TensorInfo
from lora2edge.errors import AdapterError

if TYPE_CHECKING:
    from lora2edge.contracts import FloatArray

_TASKS = {
    "CAUSAL_LM": "causal-lm",
    "SEQ_CLS": "sequence-classification",
    "TOKEN_CLS": "token-classification",
}
_CONV1D_MODELS = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer"}
"""Their linear layers are transformers' Conv1D, stored `[in, out]`.

PEFT goes by the layer's class and overrides fan_in_fan_out in the file, both ways.
"""
_CONV1D_MODULES = ("c_attn", "c_proj", "c_fc", "q_attn")
_HEAD_OF = {"gpt_neox": "embed_out.weight"}
_COMPARED_AT_ONCE = 1 << 20


@dataclass(frozen=True, slots=True)
class WholeTensor:
    """A tensor of the adapter that stands in for one of the base."""

    reader: TensorReader
    name: str


@dataclass(frozen=True, slots=True)
class Change:
    """How one tensor of the view is made: `whole` or else the base's `source`, plus the pair's ΔW."""

    adapter: Adapter
    source: str
    whole: WholeTensor | None = None
    pair: LowRank | None = None
    transposed: bool = False
    """Whether the stored weight is (BA)ᵀ: embeddings and Conv1D."""


@dataclass(frozen=True, slots=True)
class Placement:
    """The adapter, seen from the base."""

    changes: dict[str, Change]
    """By the view's tensor names."""
    untied_head: TensorInfo | None
    """A head that the base's files lack and the merged model needs."""
    tied: bool | None
    """What config.json must say from now on; None: as it was."""


def place_adapter(base: StoredCheckpoint, adapter: Adapter) -> Placement:
    """Finds the place of every part of `adapter` in `base`.

    Raises AdapterError where one has none, has another shape, or where PEFT itself is ambiguous.
    """
    _check_task(base, adapter)
    ends = _ends(base)
    _check_saved(base, adapter, ends)
    misfits: list[str] = []
    whole: dict[str, str] = {}
    for path, tensor in adapter.replaced.items():
        if name := _fit_whole(base, adapter, ends, path, tensor, misfits):
            whole[name] = tensor
    if ends.tied:
        _share(adapter, ends, whole)
    for path, tensor in adapter.saved.items():
        if name := _fit_whole(base, adapter, ends, path, tensor, misfits):
            whole[name] = tensor
    pairs: dict[str, LowRank] = {}
    for pair in adapter.pairs.values():
        if name := _fit_pair(base, adapter, ends, pair, misfits):
            pairs[name] = pair
    if misfits:
        raise _other_base(adapter, misfits)
    changes = {}
    for name in {**whole, **pairs}:
        source = ends.source(name)
        stand_in = WholeTensor(adapter.reader, whole[name]) if name in whole else None
        if stand_in and _equal(base, source, stand_in.reader, stand_in.name):
            stand_in = None
        if stand_in or name in pairs:
            transposed = name in pairs and _is_transposed(base, pairs[name])
            changes[name] = Change(adapter, source, stand_in, pairs.get(name), transposed)
    return _settle_tie(base, adapter, ends, changes)


@dataclass(frozen=True, slots=True)
class _Ends:
    """The two ends of the model: token embedding and output head."""

    embedding: str | None
    head: str
    """The head's own name, whether or not the files have it."""
    head_stored: bool
    tied: bool

    def source(self, name: str) -> str:
        """The stored tensor that `name` starts from."""
        return self.embedding if name == self.head and not self.head_stored and self.embedding else name


def _ends(base: StoredCheckpoint) -> _Ends:
    """Tied as transformers 5 has it: two stored copies are tied only where config.json says so and they are equal."""
    embedding, head = embedding_name(base.tensors), head_name(base.tensors)
    label = head or _HEAD_OF.get(str(base.config.get("model_type")), "lm_head.weight")
    if embedding is None or base.task != "causal-lm":
        return _Ends(embedding, label, head is not None, tied=False)
    if head is None:
        return _Ends(embedding, label, head_stored=False, tied=True)
    tied = base.config.get("tie_word_embeddings") is True and _equal(base, embedding, base, head)
    return _Ends(embedding, label, head_stored=True, tied=tied)


def _fit_whole(
    base: StoredCheckpoint, adapter: Adapter, ends: _Ends, path: str, tensor: str, misfits: list[str]
) -> str | None:
    """The view's name for `path`; None, and a line in `misfits`, where it does not fit."""
    name = _locate(base, ends, path)
    if name is None:
        misfits.append(f"the base has no {path}")
        return None
    has, wanted = adapter.reader.tensors[tensor].shape, base.tensors[ends.source(name)].shape
    if has == wanted:
        return name
    if name in {ends.embedding, ends.head} and has[1:] == wanted[1:]:
        raise AdapterError(
            "adapter-resized-vocabulary",
            f"{path} has {has[0]} rows in the adapter, {wanted[0]} in the base",
            why="the vocabulary was resized before training",
            hint=f"resize the base with resize_token_embeddings({has[0]}), save it, and give it as --base",
        )
    misfits.append(f"{path} is {list(has)} in the adapter, {list(wanted)} in the base")
    return None


def _fit_pair(base: StoredCheckpoint, adapter: Adapter, ends: _Ends, pair: LowRank, misfits: list[str]) -> str | None:
    name = _locate(base, ends, f"{pair.module}.weight")
    if name is None or pair.embedding != (name == ends.embedding):
        misfits.append(f"the base has no {'embedding' if pair.embedding else 'linear layer'} {pair.module}")
        return None
    wanted = base.tensors[ends.source(name)].shape
    a, b = adapter.reader.tensors[pair.a].shape, adapter.reader.tensors[pair.b].shape
    product = (a[1], b[0]) if _is_transposed(base, pair) else (b[0], a[1])
    if product == wanted:
        return name
    misfits.append(
        f"{pair.module}: lora_A {list(a)} and lora_B {list(b)} make {list(product)}, the base has {list(wanted)}"
    )
    return None


def _check_saved(base: StoredCheckpoint, adapter: Adapter, ends: _Ends) -> None:
    """PEFT passes over an entry that the model has no module for: for classifiers it lists two names of the head."""
    for entry in adapter.config.get("modules_to_save") or []:
        known = any(is_saved(path, [entry]) for path in (*base.tensors, ends.head))
        if known and not any(is_saved(path, [entry]) for path in (*adapter.saved, *adapter.replaced)):
            raise AdapterError(
                "adapter-incomplete",
                f"modules_to_save names {entry!r}, the file holds no weight of it",
                why="adapter_model.safetensors and adapter_config.json are not from the same save",
                hint="save the adapter again",
            )


def _share(adapter: Adapter, ends: _Ends, whole: dict[str, str]) -> None:
    """A copy of the base's weight that PEFT saved along is loaded into the one tied weight, whichever end it names."""
    both = [name for name in (ends.embedding, ends.head) if name]
    given = [whole[name] for name in both if name in whole]
    if len(given) == 2 and not _equal(adapter.reader, given[0], adapter.reader, given[1]):
        raise _ambiguous("it holds two different weights for the one that embedding and head share")
    if given:
        whole.update(dict.fromkeys(both, given[0]))


def _settle_tie(base: StoredCheckpoint, adapter: Adapter, ends: _Ends, changes: dict[str, Change]) -> Placement:
    """Unties embedding and head exactly where the live model computes with two different weights."""
    if not ends.tied or ends.embedding is None:
        said_tied = ends.head_stored and base.config.get("tie_word_embeddings") is True
        return Placement(changes, None, tied=False if said_tied and base.task == "causal-lm" else None)
    embedding, head = changes.get(ends.embedding), changes.get(ends.head)
    if _same_change(embedding, head):
        changes.pop(ends.head, None)
        if embedding and ends.head_stored:
            changes[ends.head] = replace(embedding, source=ends.head)
        return Placement(changes, None, None)
    if adapter.config.get("ensure_weight_tying"):
        raise _ambiguous("ensure_weight_tying is set, and it changes embedding and head differently")
    if ends.head_stored:
        return Placement(changes, None, tied=False)
    changes.setdefault(ends.head, Change(adapter, ends.embedding))
    return Placement(changes, replace(base.tensors[ends.embedding], name=ends.head), tied=False)


def _same_change(one: Change | None, other: Change | None) -> bool:
    if one is None or other is None:
        return one is other
    reader = one.adapter.reader
    if one.whole is None or other.whole is None:
        if one.whole is not other.whole:
            return False
    elif not _equal(reader, one.whole.name, reader, other.whole.name):
        return False
    if one.pair is None or other.pair is None:
        return one.pair is other.pair
    return (one.pair.rank, one.pair.scale) == (other.pair.rank, other.pair.scale) and all(
        np.array_equal(_all_rows(reader, mine), _all_rows(reader, theirs).T)
        for mine, theirs in ((one.pair.a, other.pair.b), (one.pair.b, other.pair.a))
    )


def _locate(base: StoredCheckpoint, ends: _Ends, path: str) -> str | None:
    """The stored name of a parameter path: the same, or with a prefix like `transformer.` left out or added.

    Checkpoints of a bare model lack the prefix that the model with its head has.
    """
    if path in base.tensors or (ends.tied and path == ends.head):
        return path
    shorter = path.partition(".")[2]
    if shorter in base.tensors:
        return shorter
    longer = [name for name in base.tensors if name.partition(".")[2] == path]
    return longer[0] if len(longer) == 1 else None


def _is_transposed(base: StoredCheckpoint, pair: LowRank) -> bool:
    conv1d = base.config.get("model_type") in _CONV1D_MODELS and pair.module.endswith(_CONV1D_MODULES)
    return pair.embedding or conv1d


def _equal(
    one: StoredCheckpoint | TensorReader, name: str, other: StoredCheckpoint | TensorReader, other_name: str
) -> bool:
    """Whether two tensors hold the same values, read slab by slab up to the first difference."""
    shape = one.tensors[name].shape
    if shape != other.tensors[other_name].shape:
        return False
    rows = shape[0] if shape else 1
    step = max(1, _COMPARED_AT_ONCE * rows // max(one.tensors[name].size, 1))
    return all(
        np.array_equal(one.rows(name, at, min(at + step, rows)), other.rows(other_name, at, min(at + step, rows)))
        for at in range(0, rows, step)
    )


def _all_rows(reader: TensorReader, name: str) -> FloatArray:
    return reader.rows(name, 0, reader.tensors[name].shape[0])


def _check_task(base: StoredCheckpoint, adapter: Adapter) -> None:
    kind = adapter.config.get("task_type")
    if kind is None or _TASKS.get(kind) == base.task:
        return
    name = adapter.base_model_name_or_path
    raise AdapterError(
        "adapter-other-task",
        f"the adapter was trained for {kind}, the base is a {base.task} model",
        why="task_type in adapter_config.json, architectures in config.json",
        hint=f"--base {name}" if name else "give the base that it was trained on",
    )


def _other_base(adapter: Adapter, misfits: list[str]) -> AdapterError:
    """One error for all that does not fit. Where most of it fits, the base is right and the adapter is broken."""
    parts = len(adapter.pairs) + len(adapter.saved) + len(adapter.replaced)
    if 2 * len(misfits) < parts:
        return AdapterError(
            "adapter-shape",
            f"{len(misfits)} of the adapter's {parts} parts do not fit the base, the others do",
            why="; ".join(misfits[:3]),
            hint="fetch or save the adapter again; if the base was changed since, give the one it was trained on",
        )
    more = f"; and {len(misfits) - 3} more" if len(misfits) > 3 else ""
    name = adapter.base_model_name_or_path
    return AdapterError(
        "adapter-other-base",
        f"{len(misfits)} of the adapter's {parts} parts do not fit this base",
        why="; ".join(misfits[:3]) + more,
        hint=f"the adapter names its base: --base {name}" if name else "give the base that it was trained on",
    )


def _ambiguous(why: str) -> AdapterError:
    return AdapterError(
        "adapter-tie-ambiguous",
        "the adapter does not say what becomes of the tied embedding and output head",
        why=why,
        hint="train again with a current PEFT, where ensure_weight_tying covers both",
    )
