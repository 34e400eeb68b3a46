"""Which modules an adapter was trained on, told from names by PEFT's own rule: a file that lacks one lost it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Set
from typing import Any

from lora2edge.adapters.ends import Ends
from lora2edge.adapters.kinds.common import SAVE_AGAIN
from lora2edge.adapters.read import Adapter, is_saved
from lora2edge.checkpoint import expert_place
from lora2edge.checkpoint.untrusted import compile_pattern
from lora2edge.contracts import Base
from lora2edge.errors import AdapterError

_FIRST_INDEX = r".*?\.[^.]*"
_LAYER = re.compile(r"(?:^|\.)(?:layers?|h|block)\.(\d+)\.")
_BESIDE = ("mtp.",)
"""Layers that predict further tokens: stored with the model, and not a part of it in transformers."""
_WITHOUT_POOLER = ("roberta", "xlm-roberta", "camembert")
"""Their classifiers take the first token's state; a pooler that is stored is left out, as for classifying tokens."""


def check_complete(
    base: Base, adapter: Adapter, ends: Ends, placed: Mapping[str, str], dropped: frozenset[str]
) -> None:
    """Raises AdapterError where the base has modules that the adapter was trained on and that its file lacks.

    PEFT starts such a module afresh with a warning, so that its part of the fine-tune is lost. `placed`: what was
    found, parameter path → the base's tensor; `dropped`: what of the base the model has no place for. Where the two
    names of a parameter differ otherwise than by the prefix that checkpoints of a bare model lack, or where the
    configuration says nothing, nothing can be told.
    """
    prefix = _prefix(base, placed)
    if prefix is None:
        return
    changed = set(placed.values())
    try:
        lost = [
            path
            for name, path in _parameters(base, ends, prefix)
            if name not in changed and name not in dropped and _was_trained(adapter.config, path)
        ]
    except (re.error, ValueError):  # PEFT could not train with it either, or it would take too long to try
        return
    if lost:
        modules = [path.removesuffix(".weight") for path in lost]
        raise AdapterError(
            "adapter-incomplete",
            f"the file lacks {len(lost)} of the modules that the adapter was trained on: {', '.join(modules[:3])}",
            why=f"adapter_config.json names them and the base has them; it has {len(changed)} others. PEFT would start "
            "them afresh, with a warning",
            hint=f"{SAVE_AGAIN}; where they were left out on purpose, name them in exclude_modules",
        )


def check_saved(base: Base, adapter: Adapter, ends: Ends, whole: Set[str], dropped: frozenset[str]) -> None:
    """Raises AdapterError where the file lacks a weight or bias that modules_to_save names. `whole`: what it has.

    PEFT passes over an entry that the model has no module for: for classifiers it lists two names of the head.
    """
    for entry in adapter.config.get("modules_to_save") or []:
        named = [path for path in base.tensors if is_saved(path, [entry]) and path not in dropped]
        known = [path for path in named if _is_trainable(base, path)]
        if any(is_saved(path, [entry]) for path in (*adapter.saved, *adapter.replaced)):
            lost = [path for path in known if path not in whole]
        else:
            lost = known or [name for name in ends.unstored if is_saved(name, [entry])]
        if lost:
            more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
            raise AdapterError(
                "adapter-incomplete",
                f"modules_to_save names {entry!r}, and the file lacks {', '.join(lost[:3])}{more}",
                why="adapter_model.safetensors and adapter_config.json are not from the same save",
                hint=SAVE_AGAIN,
            )


def is_target(config: Mapping[str, Any], module: str) -> bool:
    """Whether PEFT puts an adapter on the module (`check_target_module_exists`), for what a module may be put on.

    Raises re.error for entries that are no patterns, ValueError for one that would take too long to match.
    """
    excluded = config.get("exclude_modules")
    if isinstance(excluded, str):
        if excluded and compile_pattern(excluded).fullmatch(module):
            return False
    elif _ends_with(module, excluded):
        return False
    saved = config.get("modules_to_save") or ()
    if any(compile_pattern(rf"(^|.*\.){entry}($|\..*)").match(module) for entry in saved):
        return False
    targets = config.get("target_modules")
    if isinstance(targets, str):
        return targets != "all-linear" and compile_pattern(targets).fullmatch(module) is not None
    if not targets or not _ends_with(module, targets):
        return False
    return module in targets or _is_chosen_layer(config, module)


def _is_chosen_layer(config: Mapping[str, Any], module: str) -> bool:
    layers = config.get("layers_to_transform")
    if layers is None or layers == []:
        return True
    patterns = config.get("layers_pattern") or ()
    patterns = [patterns] if isinstance(patterns, str) else patterns
    for start in [rf"(?:^|.*?\.){pattern}" for pattern in patterns] or [_FIRST_INDEX]:
        if found := compile_pattern(rf"{start}\.(?P<index>\d+)\.").match(module):
            return int(found["index"]) in (layers if isinstance(layers, list) else [layers])
    return False


def _was_trained(config: Mapping[str, Any], path: str) -> bool:
    """`path` of a weight; one without `.weight` is that of a parameter that holds experts."""
    module = path.removesuffix(".weight")
    if module == path:
        return _ends_with(path, config.get("target_parameters"))
    return is_target(config, module)


def _ends_with(module: str, entries: Iterable[str] | None) -> bool:
    return any(f".{module}".endswith(f".{entry}") for entry in entries or ())


def _parameters(base: Base, ends: Ends, prefix: str) -> Iterable[tuple[str, str]]:
    """The base's tensor and the model's path of every parameter that an adapter may be put on."""
    for name in (*base.tensors, *ends.unstored):
        axes = len(base.tensors[ends.source(name)].shape)
        if axes != 2 or not name.endswith(".weight") or not _is_trainable(base, name):
            continue
        place = expert_place(base.config, name)
        path = name if name in ends.unstored else place.parameter if place else base.module_names(name)[0]
        yield name, path if path.startswith(prefix) or name in ends.unstored else f"{prefix}{path}"


def _is_trainable(base: Base, name: str) -> bool:
    """Whether the tensor is a parameter of the model that transformers builds: not a mask, nor of a layer beside it."""
    layers = base.config.get("num_hidden_layers")
    found = _LAYER.search(name)
    if name.startswith(_BESIDE) or (found and isinstance(layers, int) and int(found[1]) >= layers):
        return False
    no_pooler = base.task == "token-classification" or base.config.get("model_type") in _WITHOUT_POOLER
    if no_pooler and ".pooler." in name:
        return False
    axes = len(base.tensors[name].shape) if name in base.tensors else 2
    return name.endswith(".weight") or (name.endswith(".bias") and axes == 1)


def _prefix(base: Base, placed: Mapping[str, str]) -> str | None:
    """What paths in the model have before the base's names; None where it is not one thing for all."""
    prefixes = set()
    for path, name in placed.items():
        known = base.module_names(name)[0] if name in base.tensors else name
        if expert_place(base.config, name) is None and path.endswith(known):
            prefixes.add(path.removesuffix(known))
        elif expert_place(base.config, name) is None:
            return None
    wide = prefixes - {""} or {""}
    return wide.pop() if len(wide) == 1 else None
