"""What the kinds share: the reading of PEFT's settings, and tensors grouped by module."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from lora2edge.adapters.parts import Part
from lora2edge.checkpoint import TensorReader
from lora2edge.errors import AdapterError

if TYPE_CHECKING:
    from lora2edge.contracts import FloatArray

COMMON_KEYS = frozenset({
    "auto_mapping", "base_model_name_or_path", "exclude_modules", "fan_in_fan_out", "inference_mode",
    "layers_pattern", "layers_to_transform", "modules_to_save", "peft_type", "peft_version", "revision",
    "target_modules", "task_type",
})  # fmt: skip
"""Keys that every kind has. What they select is seen in the file, which has a tensor for each adapted module.

`bias` is not among them: it says which of the base's own biases were trained and saved, beside what a kind adds.
"""

RESTORE = "restore the adapter_config.json that was saved with these weights"
SAVE_AGAIN = "the save was cut short: save the adapter again"


def whole(reader: TensorReader, name: str) -> FloatArray:
    """All rows of a tensor of the adapter, float32."""
    shape = reader.tensors[name].shape
    return reader.rows(name, 0, shape[0] if shape else 1)


def by_module(tensors: Mapping[str, str], pattern: re.Pattern[str]) -> dict[str, dict[str, str]]:
    """Module → role → name in the file, of the paths that `pattern` (groups `module` and `role`) matches whole."""
    modules: dict[str, dict[str, str]] = {}
    for path, name in tensors.items():
        if found := pattern.fullmatch(path):
            modules.setdefault(found["module"], {})[found["role"]] = name
    return modules


def demand(module: str, found: Mapping[str, str], roles: Iterable[str]) -> None:
    """Raises AdapterError, code `adapter-incomplete`, where the module lacks a tensor."""
    missing = [role for role in roles if role not in found]
    if missing:
        raise AdapterError(
            "adapter-incomplete",
            f"{module} has no {' and no '.join(missing)}",
            why=f"the file holds {', '.join(found.values()) or 'none of its tensors'}",
            hint=SAVE_AGAIN,
        )


def axes(module: str, reader: TensorReader, found: Mapping[str, str], counts: Mapping[str, int]) -> None:
    """Raises AdapterError, code `adapter-shape`, where a tensor has another number of axes than `counts` says."""
    for role, count in counts.items():
        if role in found and len(shape := reader.tensors[found[role]].shape) != count:
            raise shape_error(
                f"{module}: {role} is {list(shape)}, {count} axes are needed",
                "convolutions are not supported; DeepSpeed and FSDP save shards where they are not gathered first",
            )


def refuse_core(module: str, found: Mapping[str, str]) -> None:
    """Raises AdapterError where a LyCORIS module has the core tensor of a convolution's kernel."""
    core = next((role for role in found if re.search(r"_t\d$", role)), None)
    if core:
        raise AdapterError(
            "adapter-setting",
            f"{module} is a convolution, which is not supported",
            why=f"{core} is the core tensor of its kernel (use_effective_conv2d)",
            hint="train with target_modules that are linear layers",
        )


def shape_error(what: str, why: str) -> AdapterError:
    return AdapterError("adapter-shape", what, why=why, hint="gather the weights, then save the adapter again")


def rank_error(module: str, has: str, said: str, key: str) -> AdapterError:
    return AdapterError(
        "adapter-rank",
        f"{module}: {has}, adapter_config.json says {said}",
        why=key,
        hint=RESTORE,
    )


def no_matrix(module: str, shape: tuple[int, ...]) -> str | None:
    """Why a parameter of `shape` is no linear layer's weight, or None."""
    return None if len(shape) == 2 else f"{module} is {list(shape)} in the base: only linear layers can be merged"


def product_misfit(module: str, has: tuple[int, ...], wanted: tuple[int, ...]) -> str | None:
    """The misfit of a change of shape `has`."""
    if has == wanted:
        return None
    return no_matrix(module, wanted) or f"{module}: the adapter has {list(has)}, the base {list(wanted)}"


def other_shape(part: Part, has: tuple[int, ...], wanted: tuple[int, ...]) -> str | None:
    """The misfit of a tensor that must have the base's shape."""
    if has == wanted:
        return None
    return f"{part.module}.{part.parameter} is {list(has)} in the adapter, {list(wanted)} in the base"


def rank_and_scale(config: Mapping[str, Any], module: str) -> tuple[int, float]:
    """LyCORIS kinds: the module's rank, and alpha / rank."""
    rank = int(pattern_value(config, "rank_pattern", module, integer(config, "r")))
    return rank, pattern_value(config, "alpha_pattern", module, number(config, "alpha")) / rank


def pattern_value(config: Mapping[str, Any], key: str, module: str, default: float) -> float:
    """PEFT's rule: the first pattern that matches the whole path, or its end after a dot, as a regex."""
    patterns = config.get(key) or {}
    if not isinstance(patterns, dict) or not all(_is_number(value) for value in patterns.values()):
        raise malformed(key, patterns, "an object of numbers")
    for pattern, value in patterns.items():
        if key == "rank_pattern" and not (isinstance(value, int) and value > 0):
            raise malformed(key, patterns, "an object of positive whole numbers")
        try:
            if _compiled(pattern).match(module):
                return float(value)
        except re.error as error:
            raise no_regex(key, pattern, error) from error
    return default


@functools.lru_cache(maxsize=4096)
def _compiled(pattern: str) -> re.Pattern[str]:
    """Each pattern is tried on each module, which can be more than `re` itself remembers."""
    return re.compile(rf"(.*\.)?({pattern})$")


def integer(
    config: Mapping[str, Any], key: str, default: int | None = None, *, least: int = 1, most: int = 2**63
) -> int:
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        upper = "" if most == 2**63 else f" to {most}"
        raise malformed(key, value, f"a whole number from {least}{upper}")
    return value


def number(config: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = config.get(key, default)
    if not _is_number(value):
        raise malformed(key, value, "a number")
    return float(value)


def flag(config: Mapping[str, Any], key: str, default: bool) -> bool:
    value = config.get(key, default)
    if not isinstance(value, bool):
        raise malformed(key, value, "true or false")
    return value


def malformed(key: str, value: Any, wanted: str) -> AdapterError:
    shown = repr(value) if len(repr(value)) < 80 else f"{repr(value)[:77]}..."
    return AdapterError(
        "bad-adapter-config", f"{key} is {shown}, expected {wanted}", why="in adapter_config.json", hint=RESTORE
    )


def no_regex(key: str, pattern: str, error: re.error) -> AdapterError:
    return AdapterError(
        "bad-adapter-config", f"{key} holds no regular expression", why=f"{pattern!r}: {error}", hint=RESTORE
    )


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond float's range
        return False
