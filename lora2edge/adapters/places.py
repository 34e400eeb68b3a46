"""Which stored tensor each part of an adapter changes, and whether embedding and output head stay tied."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from lora2edge.adapters.kinds.lora import AddedBias, ExpertStack, LowRank, TokenRows
from lora2edge.adapters.parts import Part
from lora2edge.adapters.read import Adapter, is_saved
from lora2edge.checkpoint import ExpertPlace, TensorReader, embedding_name, expert_place, head_name
from lora2edge.contracts import Base, TensorInfo
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
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_BIAS_SWITCHES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "llama": {"attention_bias": _ATTENTION, "mlp_bias": ("gate_proj", "up_proj", "down_proj")},
    "qwen3": {"attention_bias": _ATTENTION},
    "qwen3_moe": {"attention_bias": _ATTENTION},
    "gemma2": {"attention_bias": _ATTENTION},
    "gemma3_text": {"attention_bias": _ATTENTION},
}
"""model_type → setting of config.json → the layers that have a bias when it is true (transformers' model classes)."""
_UNTIED: Mapping[str, Any] = {"tie_word_embeddings": False}
_HEAD_OF = {"gpt_neox": "embed_out.weight"}
_COMPARED_AT_ONCE = 1 << 20


@dataclass(frozen=True, slots=True)
class WholeTensor:
    """A tensor of the adapter that stands in for one of the base."""

    reader: TensorReader
    name: str


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


def place_adapter(base: Base, adapter: Adapter) -> Placement:
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
    shapes = {name: adapter.reader.tensors[tensor].shape for name, tensor in whole.items()}
    vocabulary = _resized(base, ends, shapes)
    parts: dict[str, Part] = {}
    biases: dict[str, Part] = {}
    for path, part in adapter.parts.items():
        if isinstance(part, ExpertStack):
            parts.update(_fit_experts(base, part, parts, misfits))
        elif name := _fit_part(base, ends, path, part, shapes, misfits):
            parts[name] = part
        elif isinstance(part, AddedBias) and _locate(base, ends, f"{part.module}.weight"):
            biases[path] = part
    if misfits:
        raise _other_base(adapter, misfits)
    changes = {}
    for name in {**whole, **parts}:
        source = ends.source(name)
        stand_in = WholeTensor(adapter.reader, whole[name]) if name in whole else None
        if stand_in and _equal(base, source, stand_in.reader, stand_in.name):
            stand_in = None
        if stand_in or name in parts:
            transposed = name in parts and _is_transposed(base, parts[name])
            changes[name] = Change(adapter, source, stand_in, parts.get(name), transposed)
    placement = _settle_tie(base, adapter, ends, changes)
    if vocabulary is not None:
        placement = _resize(base, ends, placement, vocabulary)
    return _add_biases(base, adapter, biases, placement)


def _resized(base: Base, ends: _Ends, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """Rows of a vocabulary that was resized before training; None where it was not.

    Raises AdapterError where the adapter does not hold all rows of both ends: what PEFT fills in is random.
    """
    given = {name: shapes[name][0] for name in (ends.embedding, ends.head) if name and name in shapes}
    before = base.tensors[ends.embedding].shape[0] if ends.embedding else 0
    if not ends.embedding or not set(given.values()) - {before}:
        return None
    wanted = {ends.embedding, ends.head} if ends.head_stored or ends.tied else {ends.embedding}
    rows = max(given.values())
    if given == dict.fromkeys(wanted, rows):
        return rows
    raise AdapterError(
        "adapter-resized-vocabulary",
        f"the adapter has a vocabulary of {rows} rows, the base of {before}",
        why="it holds new rows for one of embedding and output head only; those of the other are not to be found",
        hint=f"resize the base with resize_token_embeddings({rows}), save it, and give it as --base",
    )


def _resize(base: Base, ends: _Ends, placement: Placement, rows: int) -> Placement:
    """Gives both ends their new number of rows."""
    infos = {info.name: info for info in placement.added}
    for name in (ends.embedding, ends.head):
        if name in placement.changes:
            info = infos.get(name) or base.tensors[name]
            infos[name] = replace(info, shape=(rows, *info.shape[1:]))
    return Placement(placement.changes, tuple(infos.values()), {**placement.config, "vocab_size": rows})


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


def _ends(base: Base) -> _Ends:
    """Tied as transformers 5 has it: two stored copies are tied only where config.json says so and they are equal."""
    embedding, head = embedding_name(base.tensors), head_name(base.tensors)
    label = head or _HEAD_OF.get(str(base.config.get("model_type")), "lm_head.weight")
    if embedding is None or base.task != "causal-lm":
        return _Ends(embedding, label, head is not None, tied=False)
    if head is None:
        return _Ends(embedding, label, head_stored=False, tied=True)
    tied = base.config.get("tie_word_embeddings") is True and _equal(base, embedding, base, head)
    return _Ends(embedding, label, head_stored=True, tied=tied)


def _fit_whole(base: Base, adapter: Adapter, ends: _Ends, path: str, tensor: str, misfits: list[str]) -> str | None:
    """The view's name for `path`; None, and a line in `misfits`, where it does not fit."""
    name = _locate(base, ends, path)
    if name is None:
        misfits.append(f"the base has no {path}")
        return None
    has, wanted = adapter.reader.tensors[tensor].shape, base.tensors[ends.source(name)].shape
    if has == wanted or (name in {ends.embedding, ends.head} and has[1:] == wanted[1:]):
        return name
    misfits.append(f"{path} is {list(has)} in the adapter, {list(wanted)} in the base")
    return None


def _fit_part(
    base: Base,
    ends: _Ends,
    path: str,
    part: Part,
    shapes: Mapping[str, tuple[int, ...]],
    misfits: list[str],
) -> str | None:
    """The view's name for the parameter at `path`; None where the base has none, or, with a misfit, another one."""
    name = _locate(base, ends, path)
    embedding = isinstance(part, LowRank) and part.embedding
    optional = isinstance(part, AddedBias) or getattr(part, "optional", False)
    if name is None and optional and _locate(base, ends, f"{part.module}.weight"):
        return None
    if name is None or (isinstance(part, LowRank) and embedding != (name == ends.embedding)):
        misfits.append(f"the base has no {'embedding' if embedding else 'linear layer'} {part.module}")
        return None
    shape = shapes.get(name) or base.tensors[ends.source(name)].shape
    misfit = part.misfit(shape[::-1] if _is_transposed(base, part) else shape)
    if misfit is None:
        return name
    misfits.append(misfit)
    return None


def _fit_experts(base: Base, stack: ExpertStack, taken: Mapping[str, Part], misfits: list[str]) -> dict[str, Part]:
    """The stack's share of each expert's matrix, by the base's tensor names; {} and a misfit where it has no place."""
    members: dict[str, dict[str, ExpertPlace]] = {}
    for name in base.tensors:
        place = expert_place(base.config, name)
        if place and place.parameter.rpartition(".")[0] == stack.module and name not in taken:
            members.setdefault(place.parameter, {})[name] = place
    why = f"the base has no experts {stack.module}"
    for places in members.values():
        experts = 1 + max(place.expert for place in places.values())
        rows, inputs = next(base.tensors[name].shape for name in places)
        parts = 1 + max(place.part for place in places.values())
        misfit = stack.misfit((experts, parts * rows, inputs))
        if misfit is None and len(places) == experts * parts:
            return {
                name: stack.pair(name.removesuffix(".weight"), place.expert, experts, place.part * rows, rows)
                for name, place in places.items()
            }
        why = misfit or f"{stack.module} lacks experts"
    misfits.append(why)
    return {}


def _add_biases(base: Base, adapter: Adapter, biases: Mapping[str, Part], placement: Placement) -> Placement:
    """Biases that the adapter adds and the base lacks: zeros beside them, where the architecture can hold them.

    Raises AdapterError where it cannot.
    """
    if not biases:
        return placement
    kind = str(base.config.get("model_type"))
    switches = _BIAS_SWITCHES.get(kind, {})
    config = dict(placement.config)
    changes = dict(placement.changes)
    added = list(placement.added)
    for switch, modules in switches.items():
        wanted = {path: part for path, part in biases.items() if part.module.rpartition(".")[2] in modules}
        if not wanted or base.config.get(switch):
            continue
        config[switch] = True
        for name, info in base.tensors.items():
            module, _, parameter = name.rpartition(".")
            if parameter == "weight" and module.rpartition(".")[2] in modules:
                bias = f"{module}.bias"
                part = wanted.get(bias)
                added.append(TensorInfo(bias, info.shape[:1], info.dtype, info.shard))
                changes[bias] = Change(adapter, None, None, part)
                misfit = part.misfit(info.shape[:1]) if part else None
                if misfit:
                    raise _other_base(adapter, [misfit])
    lost = sorted(biases.keys() - changes.keys())
    if lost:
        raise AdapterError(
            "adapter-bias",
            f"the adapter adds a bias to {lost[0]}, and a {kind} model has no place for it",
            why=f"{len(lost)} of its biases would be lost",
            hint="train with lora_bias=False",
        )
    return Placement(changes, tuple(added), config)


def _check_saved(base: Base, adapter: Adapter, ends: _Ends) -> None:
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


def _settle_tie(base: Base, adapter: Adapter, ends: _Ends, changes: dict[str, Change]) -> Placement:
    """Unties embedding and head exactly where the live model computes with two different weights."""
    if not ends.tied or ends.embedding is None:
        said_tied = ends.head_stored and base.config.get("tie_word_embeddings") is True
        return Placement(changes, config=_UNTIED if said_tied and base.task == "causal-lm" else {})
    embedding, head = changes.get(ends.embedding), changes.get(ends.head)
    if embedding and isinstance(embedding.part, TokenRows) and (head is None or head.part is embedding.part):
        head = embedding  # PEFT trains the rows of the one weight, for both ends
    if _same_change(embedding, head):
        changes.pop(ends.head, None)
        if embedding and ends.head_stored:
            changes[ends.head] = replace(embedding, source=ends.head)
        return Placement(changes)
    if adapter.config.get("ensure_weight_tying"):
        raise _ambiguous("ensure_weight_tying is set, and it changes embedding and head differently")
    if ends.head_stored:
        return Placement(changes, config=_UNTIED)
    changes.setdefault(ends.head, Change(adapter, ends.embedding))
    return Placement(changes, (replace(base.tensors[ends.embedding], name=ends.head),), _UNTIED)


def _same_change(one: Change | None, other: Change | None) -> bool:
    if one is None or other is None:
        return one is other
    reader = one.adapter.reader
    if one.whole is None or other.whole is None:
        if one.whole is not other.whole:
            return False
    elif not _equal(reader, one.whole.name, reader, other.whole.name):
        return False
    mine, theirs = one.part, other.part
    if isinstance(mine, TokenRows) and isinstance(theirs, TokenRows):
        return mine.indices == theirs.indices and _equal(reader, mine.tensor, reader, theirs.tensor)
    if not isinstance(mine, LowRank) or not isinstance(theirs, LowRank):
        return mine is theirs
    return (mine.rank, mine.scale, mine.magnitude) == (theirs.rank, theirs.scale, theirs.magnitude) and all(
        np.array_equal(_all_rows(reader, a), _all_rows(reader, b).T)
        for a, b in ((mine.a, theirs.b), (mine.b, theirs.a))
    )


def _locate(base: Base, ends: _Ends, path: str) -> str | None:
    """The stored name of a parameter path: the same, the one that transformers loads into it, or with a prefix like
    `transformer.` left out or added: checkpoints of a bare model lack the one that the model with its head has."""
    if path in base.tensors or (ends.tied and path == ends.head):
        return path
    shorter = path.partition(".")[2]
    if shorter in base.tensors:
        return shorter
    longer = [
        name
        for name in base.tensors
        if name.partition(".")[2] == path or (path in base.module_names(name) and not expert_place(base.config, name))
    ]
    return longer[0] if len(longer) == 1 else None


def _is_transposed(base: Base, part: Part) -> bool:
    conv1d = base.config.get("model_type") in _CONV1D_MODELS and part.module.endswith(_CONV1D_MODULES)
    return part.parameter == "weight" and (conv1d or (isinstance(part, LowRank) and part.embedding))


def _equal(one: Base | TensorReader, name: str, other: Base | TensorReader, other_name: str) -> bool:
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


def _check_task(base: Base, adapter: Adapter) -> None:
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
    parts = len(adapter.parts) + len(adapter.saved) + len(adapter.replaced)
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
