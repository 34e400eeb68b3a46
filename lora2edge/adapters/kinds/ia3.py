"""IA³ (arXiv 2205.05638): trained factors on the outputs of a layer, or on its inputs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora2edge.adapters.kinds.common import (
    COMMON_KEYS,
    by_module,
    malformed,
    no_matrix,
    no_regex,
    shape_error,
    whole,
)
from lora2edge.adapters.parts import Part
from lora2edge.checkpoint import TensorReader
from lora2edge.errors import AdapterError

if TYPE_CHECKING:
    from lora2edge.contracts import FloatArray

KEYS = COMMON_KEYS | {"feedforward_modules", "init_ia3_weights"}
"""Settings that are handled here or have no effect after training."""

_NAMES = re.compile(r"(?P<module>.+)\.(?P<role>ia3_l)")


@dataclass(frozen=True, slots=True)
class Scale:
    """W' = diag(l) W, or W diag(l) where `inputs`."""

    module: str
    reader: TensorReader
    tensor: str
    """`[out, 1]`, or `[1, in]` where `inputs`."""
    inputs: bool
    parameter: str = "weight"

    @property
    def tensors(self) -> tuple[str, ...]:
        return (self.tensor,)

    def misfit(self, shape: tuple[int, ...]) -> str | None:
        return no_matrix(self.module, shape) or _miscount(self, shape[1 if self.inputs else 0])

    def load(self) -> ScaleUpdate:
        return ScaleUpdate(whole(self.reader, self.tensor), self.inputs)


@dataclass(frozen=True, slots=True)
class BiasScale:
    """b' = l ∘ b: PEFT scales the output of the layer, bias and all."""

    module: str
    reader: TensorReader
    tensor: str
    """`[out, 1]`."""
    parameter: str = "bias"
    optional: bool = True
    """Nothing is to be done where the base has no such parameter."""

    @property
    def tensors(self) -> tuple[str, ...]:
        return (self.tensor,)

    def misfit(self, shape: tuple[int, ...]) -> str | None:
        return _miscount(self, shape[0]) if len(shape) == 1 else f"{self.module}.bias is {list(shape)} in the base"

    def load(self) -> ScaleUpdate:
        return ScaleUpdate(whole(self.reader, self.tensor).reshape(-1), inputs=False)


@dataclass(frozen=True, slots=True)
class ScaleUpdate:
    factors: FloatArray
    """`[out, 1]`, `[1, in]`, or `[out]` for a bias."""
    inputs: bool

    def apply(self, rows: FloatArray, start: int, stop: int) -> FloatArray:
        rows *= self.factors if self.inputs else self.factors[start:stop]
        return rows


def read(config: Mapping[str, Any], reader: TensorReader, tensors: Mapping[str, str]) -> list[Part]:
    """The parts of an IA³ adapter; `tensors`: path in the model → name in the file. Other tensors are left alone.

    A module whose outputs are scaled gives two parts, the second for the bias that the base may have.
    Raises AdapterError where a tensor's shape does not agree with `feedforward_modules`.
    """
    parts: list[Part] = []
    for module, found in by_module(tensors, _NAMES).items():
        name = found["ia3_l"]
        inputs = _scales_inputs(config, module, reader.tensors[name].shape)
        parts.append(Scale(module, reader, name, inputs))
        if not inputs:
            parts.append(BiasScale(module, reader, name))
    return parts


def _scales_inputs(config: Mapping[str, Any], module: str, shape: tuple[int, ...]) -> bool:
    """As the file has it, which is as PEFT loads it: `[1, in]` or `[out, 1]`."""
    said = _is_feedforward(config, module)
    if len(shape) != 2 or 1 not in shape:
        raise shape_error(
            f"{module}: ia3_l is {list(shape)}",
            "[out, 1] or [1, in] is needed; convolutions are not supported",
        )
    if shape[0] != shape[1] and said is not None and said != (shape[0] == 1):
        raise AdapterError(
            "adapter-shape",
            f"{module}: ia3_l is {list(shape)}, which scales its {'inputs' if shape[0] == 1 else 'outputs'}",
            why=f"by feedforward_modules in adapter_config.json it is {'one' if said else 'none'} of those whose "
            "inputs are scaled",
            hint="restore the adapter_config.json that was saved with these weights",
        )
    return shape[0] == 1 if shape[0] != shape[1] else bool(said)


def _is_feedforward(config: Mapping[str, Any], module: str) -> bool | None:
    """PEFT's rule: the whole path matches the regex, or it ends with one of the names. None: the file does not say."""
    names = config.get("feedforward_modules")
    if names is None:
        return None
    if isinstance(names, str):
        try:
            return bool(re.fullmatch(names, module))
        except re.error as error:
            raise no_regex("feedforward_modules", names, error) from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise malformed("feedforward_modules", names, "a list of module names, or a regular expression")
    return any(module.endswith(name) for name in names)


def _miscount(part: Scale | BiasScale, wanted: int) -> str | None:
    shape = part.reader.tensors[part.tensor].shape
    has = shape[0] * shape[1]
    if has == wanted:
        return None
    side = "inputs" if isinstance(part, Scale) and part.inputs else "outputs"
    return f"{part.module}: ia3_l has {has} factors, the base {wanted} {side}"
