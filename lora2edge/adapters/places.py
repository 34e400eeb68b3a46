"""Which stored tensor each part of an adapter changes, and whether embedding and output head stay tied."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from lora2edge.adapters.ends import (
    Change,
    Ends,
    Placement,
    WholeTensor,
    ambiguous,
    check_called,
    equal,
    find_ends,
    same_rows,
    settle_tie,
    share,
)
from lora2edge.adapters.heads import NewHead, find_new_head
from lora2edge.adapters.kinds.common import SAVE_AGAIN
from lora2edge.adapters.kinds.lora import AddedBias, ExpertStack, LowRank
from lora2edge.adapters.kinds.starts import OLORA
from lora2edge.adapters.parts import Part
from lora2edge.adapters.read import Adapter
from lora2edge.adapters.settings import RESIDUAL_HINT
from lora2edge.adapters.targets import check_complete, check_saved
from lora2edge.checkpoint import ExpertPlace, expert_place
from lora2edge.contracts import Base, Task, TensorInfo
from lora2edge.errors import AdapterError

_TASKS: Mapping[str, Task] = {
    "CAUSAL_LM": "causal-lm",
    "SEQ_2_SEQ_LM": "seq2seq-lm",
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


def place_adapter(base: Base, adapter: Adapter) -> Placement:
    """Finds the place of every part of `adapter` in `base`.

    Raises AdapterError where one has none, has another shape, or where PEFT itself is ambiguous.
    """
    task, new = _find_task(base, adapter)
    ends = find_ends(base, task)
    check_called(adapter, ends)
    misfits: list[str] = []
    whole: dict[str, str] = {}
    for path, tensor in adapter.replaced.items():
        if name := _fit_whole(base, adapter, ends, path, tensor, misfits):
            whole[name] = tensor
    share(adapter, ends, whole)
    stacked: dict[str, WholeTensor] = {}
    for path, tensor in adapter.saved.items():
        if new and path in new.names:
            continue
        if members := _experts_of(base, path):
            stacked.update(_fit_stack(base, adapter, path, tensor, members, misfits))
        elif name := _fit_whole(base, adapter, ends, path, tensor, misfits):
            whole[name] = tensor
    dropped: frozenset[str] = new.dropped if new else frozenset()
    misfits.extend(_other_copies(base, adapter, ends))
    check_saved(base, adapter, ends, {*whole, *stacked}, dropped)
    _check_biases(base, adapter, ends, whole)
    shapes = {name: adapter.reader.tensors[tensor].shape for name, tensor in whole.items()}
    vocabulary = _resized(base, ends, shapes)
    parts: dict[str, Part] = {}
    biases: dict[str, Part] = {}
    placed: dict[str, str] = {}
    for path, part in adapter.parts.items():
        if isinstance(part, ExpertStack):
            experts = _fit_experts(base, part, parts, misfits)
            parts.update(experts)
            placed.update(zip(experts, experts, strict=True))
        elif name := _fit_part(base, ends, path, part, shapes, misfits):
            parts[name] = part
            placed[path] = name
        elif isinstance(part, AddedBias) and _locate(base, ends, f"{part.module}.weight"):
            biases[path] = part
    misfits.extend(f"a classifier has no {name}" for name in sorted(dropped & {*whole, *parts}))
    if misfits:
        raise _other_base(base, adapter, misfits)
    check_complete(base, adapter, ends, placed, dropped)
    parts = {name: _without_start(base, ends, name, part, whole) for name, part in parts.items()}
    changes = {}
    stand_ins = {**{name: WholeTensor(adapter.reader, tensor) for name, tensor in whole.items()}, **stacked}
    for name in {**stand_ins, **parts}:
        source = ends.source(name)
        stand_in = stand_ins.get(name)
        is_known = stand_in is not None and stand_in.shape == base.tensors[source].shape
        if stand_in and is_known and same_rows(stand_in.shape, partial(base.rows, source), stand_in.rows):
            stand_in = None
        if stand_in or name in parts:
            transposed = name in parts and _is_transposed(base, parts[name])
            changes[name] = Change(adapter, source, stand_in, parts.get(name), transposed)
    placement = settle_tie(base, adapter, ends, changes)
    if vocabulary is not None:
        placement = _resize(base, ends, placement, vocabulary)
    placement = _add_biases(base, adapter, biases, placement)
    return _change_head(base, adapter, new, placement) if new else placement


def _change_head(base: Base, adapter: Adapter, new: NewHead, placement: Placement) -> Placement:
    """Puts the classifier in the place of the language model's head."""
    tensors = {name: adapter.reader.tensors[adapter.saved[name]] for name in new.names}
    like = list(base.tensors.values())[-1]
    added = tuple(TensorInfo(name, info.shape, like.dtype, like.shard) for name, info in tensors.items())
    heads = {name: Change(adapter, None, WholeTensor(adapter.reader, adapter.saved[name])) for name in new.names}
    return Placement(
        {**placement.changes, **heads},
        (*placement.added, *added),
        {**placement.config, **new.config},
        dropped=new.dropped,
        task=new.task,
    )


def _resized(base: Base, ends: Ends, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """Rows of a vocabulary that was resized before training; None where it was not.

    Raises AdapterError where the adapter does not hold all rows of both ends: what PEFT fills in is random.
    """
    given = {name: shapes[name][0] for name in ends.names if name in shapes}
    before = base.tensors[ends.embedding].shape[0] if ends.embedding else 0
    if not ends.embedding or not set(given.values()) - {before}:
        return None
    wanted = {ends.embedding} if ends.head in ends.unstored and not ends.tied else {ends.embedding, ends.head}
    rows = max(given.values())
    if given == dict.fromkeys(wanted, rows) and ends.is_called:
        return rows
    raise AdapterError(
        "adapter-resized-vocabulary",
        f"the adapter has a vocabulary of {rows} rows, the base of {before}",
        why="it holds new rows for one of embedding and output head only; those of the other are not to be found",
        hint=f"resize the base with resize_token_embeddings({rows}), save it, and give it as --base",
    )


def _resize(base: Base, ends: Ends, placement: Placement, rows: int) -> Placement:
    """Gives both ends their new number of rows."""
    infos = {info.name: info for info in placement.added}
    for name in (ends.embedding, ends.head):
        if name in placement.changes:
            info = infos.get(name) or base.tensors[name]
            infos[name] = replace(info, shape=(rows, *info.shape[1:]))
    return Placement(placement.changes, tuple(infos.values()), {**placement.config, "vocab_size": rows})


def _fit_whole(base: Base, adapter: Adapter, ends: Ends, path: str, tensor: str, misfits: list[str]) -> str | None:
    """The view's name for `path`; None, and a line in `misfits`, where it does not fit."""
    name = _locate(base, ends, path)
    if name is None:
        misfits.append(f"the base has no {path}")
        return None
    has, wanted = adapter.reader.tensors[tensor].shape, base.tensors[ends.source(name)].shape
    if has == wanted or (name in ends.names and has[1:] == wanted[1:]):
        return name
    misfits.append(f"{path} is {list(has)} in the adapter, {list(wanted)} in the base")
    return None


def _fit_part(
    base: Base,
    ends: Ends,
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
    if name is None or (isinstance(part, LowRank) and embedding != (name in ends.inputs)):
        misfits.append(f"the base has no {'embedding' if embedding else 'linear layer'} {part.module}")
        return None
    shape = shapes.get(name) or base.tensors[ends.source(name)].shape
    misfit = part.misfit(shape[::-1] if _is_transposed(base, part) else shape)
    if misfit is None:
        return name
    misfits.append(misfit)
    return None


def _check_biases(base: Base, adapter: Adapter, ends: Ends, whole: Mapping[str, str]) -> None:
    """Where the base's biases were trained, PEFT saves all of them, or those of the layers that it adapts."""
    setting = adapter.config.get("bias") or "none"
    if setting == "none":
        return
    adapted = {_locate(base, ends, f"{part.module}.bias") for part in adapter.parts.values()}
    lost = [
        name
        for name, info in base.tensors.items()
        if name.endswith(".bias")
        and len(info.shape) == 1  # old checkpoints have attention masks of that name
        and (setting == "all" or name in adapted)
        and name not in whole
    ]
    if lost:
        raise AdapterError(
            "adapter-incomplete",
            f"the adapter says bias: {setting}, and lacks {len(lost)} of the base's biases: {', '.join(lost[:3])}",
            why="adapter_model.safetensors and adapter_config.json are not from the same save",
            hint=SAVE_AGAIN,
        )


def _without_start(base: Base, ends: Ends, name: str, part: Part, whole: Mapping[str, str]) -> Part:
    """The part as it is, or a plain one where PEFT saved the weight along that was left when training started.

    Raises AdapterError where what PEFT takes off the weight is not that of the one layer.
    """
    if not isinstance(part, LowRank) or part.start is None:
        return part
    if name in whole:
        return replace(part, start=None)
    if name in ends.tied:
        raise ambiguous(f"the start {part.start!r} of {part.module} changed the weight of the embedding as well")
    why = ""
    if base.is_quantized:
        why = "the base is quantized: PEFT would have to quantize what is left of the weight again"
    elif part.start == OLORA and _is_transposed(base, part):
        why = "PEFT computes OLoRA on the weight as it is stored, which is the other way round in a Conv1D"
    if why:
        raise AdapterError(
            "adapter-residual-base",
            f"the start {part.start!r} of {part.module} cannot be computed again",
            why=why,
            hint=RESIDUAL_HINT,
        )
    return part


def _other_copies(base: Base, adapter: Adapter, ends: Ends) -> list[str]:
    """A line for each weight that was saved again and is another one: which of them the live model has is not told."""
    lines = []
    for tensor, path in adapter.copies.items():
        if ".original_module." in tensor:
            name = _locate(base, ends, path)
            same = name is not None and equal(base, ends.source(name), adapter.reader, tensor)
        else:
            same = path in adapter.saved and equal(adapter.reader, adapter.saved[path], adapter.reader, tensor)
        if not same:
            lines.append(f"{tensor} is not the weight that it is a copy of")
    return lines


def _experts_of(base: Base, path: str) -> dict[str, ExpertPlace]:
    """The matrices that transformers stacks in the parameter at `path`, by the base's tensor names."""
    if ".experts." not in path:
        return {}
    places = {name: expert_place(base.config, name) for name in base.tensors}
    return {name: place for name, place in places.items() if place and place.parameter == path}


def _fit_stack(
    base: Base, adapter: Adapter, path: str, tensor: str, members: Mapping[str, ExpertPlace], misfits: list[str]
) -> dict[str, WholeTensor]:
    """Each expert's share of a stack that modules_to_save trained whole; {} and a misfit where it does not fit."""
    rows, inputs = next(base.tensors[name].shape for name in members)
    experts, parts = (1 + max(each) for each in zip(*((p.expert, p.part) for p in members.values()), strict=True))
    has, wanted = adapter.reader.tensors[tensor].shape, (experts, parts * rows, inputs)
    if has == wanted and len(members) == experts * parts:
        return {
            name: WholeTensor(adapter.reader, tensor, place.expert, place.part * rows, rows)
            for name, place in members.items()
        }
    misfits.append(f"{path} is {list(has)} in the adapter, {list(wanted)} in the base")
    return {}


def _fit_experts(base: Base, stack: ExpertStack, taken: Mapping[str, Part], misfits: list[str]) -> dict[str, Part]:
    """The stack's share of each expert's matrix, by the base's tensor names; {} and a misfit where it has no place."""
    members: dict[str, dict[str, ExpertPlace]] = {}
    for name in base.tensors:
        place = expert_place(base.config, name)
        if place and place.parameter.rpartition(".")[0] == stack.module and name not in taken:
            members.setdefault(place.parameter, {})[name] = place
    why = f"the base has no experts {stack.module}"
    for parameter, places in members.items():
        one = stack.of(parameter.rpartition(".")[2])
        experts = 1 + max(place.expert for place in places.values())
        rows, inputs = next(base.tensors[name].shape for name in places)
        parts = 1 + max(place.part for place in places.values())
        misfit = one.misfit((experts, parts * rows, inputs))
        if misfit is None and len(places) == experts * parts:
            return {
                name: one.pair(name.removesuffix(".weight"), place.expert, experts, place.part * rows, rows)
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
                    raise _other_base(base, adapter, [misfit])
    lost = sorted(biases.keys() - changes.keys())
    if lost:
        raise AdapterError(
            "adapter-bias",
            f"the adapter adds a bias to {lost[0]}, and a {kind} model has no place for it",
            why=f"{len(lost)} of its biases would be lost",
            hint="train with lora_bias=False",
        )
    return Placement(changes, tuple(added), config)


def _locate(base: Base, ends: Ends, path: str) -> str | None:
    """The stored name of a parameter path: the same, the one that transformers loads into it, or with a prefix like
    `transformer.` left out or added: checkpoints of a bare model lack the one that the model with its head has."""
    if path in base.tensors or path in ends.unstored:
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


def _find_task(base: Base, adapter: Adapter) -> tuple[Task, NewHead | None]:
    """What the merged model is for, and the head that makes it another one than the base. Raises AdapterError."""
    kind = adapter.config.get("task_type")
    task = _TASKS.get(kind) if kind else base.task
    if task == base.task:
        return base.task, None
    if task and (new := find_new_head(base, adapter, task)):
        return task, new
    name = adapter.base_model_name_or_path
    raise AdapterError(
        "adapter-other-task",
        f"the adapter was trained for {kind}, the base is a {base.task} model",
        why="task_type in adapter_config.json, architectures in config.json",
        hint=f"--base {name}" if name and not _is_given(base, name) else "give the base that it was trained on",
    )


def _is_given(base: Base, name: str) -> bool:
    """Whether the base is the folder or hub id that the adapter names: to name it again would be no help."""
    folder = base.path.resolve()
    try:
        named = Path(name).resolve()
    except (OSError, RuntimeError, ValueError):  # a loop of links, or no name of a file
        return False
    return named == folder or f"models--{name.replace('/', '--')}" in folder.parts


def _other_base(base: Base, adapter: Adapter, misfits: list[str]) -> AdapterError:
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
    if name and _is_given(base, name):
        hint = "the base is the one that the adapter names: it was changed since, or adapter_config.json was edited"
    else:
        hint = f"the adapter names its base: --base {name}" if name else "give the base that it was trained on"
    return AdapterError(
        "adapter-other-base",
        f"{len(misfits)} of the adapter's {parts} parts do not fit this base",
        why="; ".join(misfits[:3]) + more,
        hint=hint,
    )
