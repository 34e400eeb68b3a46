"""Rotary position embeddings: config.json of transformers 4 or 5 → frequencies, as transformers 5 computes them.

Each step is rounded to float32 as there: at a position p a frequency that is off by one unit in the last place turns
the head by p · 6e-8 of its angle.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lora2edge.checkpoint.values import count, rope_kind, rope_number
from lora2edge.errors import CheckpointError, UnsupportedError

if TYPE_CHECKING:
    from lora2edge.contracts import FloatArray

KINDS = ("default", "linear", "llama3", "yarn", "longrope")
_THETA = 10000.0


@dataclass(frozen=True, slots=True)
class Rope:
    """Angles of the rotated dimensions: position × frequency."""

    dimensions: int
    """Rotated in each head: its first ones, in two halves."""
    frequencies: tuple[float, ...]
    """`[dimensions / 2]`, float32 values."""
    scale: float = 1.0
    """Cosines and sines are multiplied by it."""
    long_frequencies: tuple[float, ...] = ()
    """LongRoPE: those of a sequence longer than `switch`, all of it; else empty."""
    switch: int = 0
    """Tokens, where there are long frequencies."""

    def rows(self, positions: int) -> int:
        """Rows of the tables for so many positions: the short frequencies' first, then the long ones'."""
        return self.switch + positions if self.long_frequencies else positions

    def cosines(self, start: int, stop: int) -> FloatArray:
        """Rows `start:stop` of the table of cosines, `[stop - start, dimensions / 2]` float32."""
        return self._table(np.cos, start, stop)

    def sines(self, start: int, stop: int) -> FloatArray:
        """Rows `start:stop` of the table of sines, `[stop - start, dimensions / 2]` float32."""
        return self._table(np.sin, start, stop)

    def _table(self, function: Any, start: int, stop: int) -> FloatArray:
        rows = np.arange(start, stop)
        if self.long_frequencies:
            is_long = (rows >= self.switch)[:, None]
            frequencies = np.where(is_long, _array(self.long_frequencies), _array(self.frequencies))
            positions = np.where(rows >= self.switch, rows - self.switch, rows)
        else:
            frequencies, positions = _array(self.frequencies)[None], rows
        angles = positions.astype(np.float32)[:, None] * frequencies
        values: FloatArray = function(angles.astype(np.float64)).astype(np.float32) * np.float32(self.scale)
        return values


def read_rope(config: Mapping[str, Any], params: Mapping[str, Any], dimensions: int, theta: float) -> Rope:
    """The rope of a kind of layers, whose parameters are `params`.

    `dimensions`: rotated per head; `theta`: the base where `params` is silent. Raises UnsupportedError `onnx-rope`,
    CheckpointError.
    """
    kind = rope_kind(params)
    if kind not in KINDS or params.get("mrope_section") is not None:
        what = kind if params.get("mrope_section") is None else "mrope"
        raise UnsupportedError(
            "onnx-rope",
            f"the rope is scaled in a way that is not written: {what!r}",
            why="known are " + ", ".join(KINDS),
        )
    base = theta if params.get("rope_theta") is None else rope_number(params, "rope_theta")
    powers = _powers(base, dimensions)
    plain = np.float32(1) / powers
    if kind == "default":
        return _rope(dimensions, plain)
    if kind == "linear":
        return _rope(dimensions, plain / np.float32(rope_number(params, "factor")))
    original = _original_context(config, params)
    if kind == "llama3":
        return _rope(dimensions, _llama3(params, plain, original))
    if kind == "yarn":
        return _yarn(config, params, dimensions, base, original)
    return _longrope(config, params, powers, original)


def rope_parameters(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Parameters that hold for every layer: transformers 5 writes rope_parameters, 4 rope_scaling, which wins.

    Raises UnsupportedError where they differ by the kind of layer.
    """
    params = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if any(isinstance(value, Mapping) for value in params.values()):
        raise UnsupportedError(
            "onnx-rope", "the rope differs by the kind of layer", why="this architecture has one rope for all layers"
        )
    return params


def theta_of(config: Mapping[str, Any], key: str = "rope_theta", default: float = _THETA) -> float:
    """Base of the frequencies where the rope's parameters are silent."""
    return default if config.get(key) is None else rope_number(config, key)


def _rope(dimensions: int, frequencies: FloatArray, scale: float = 1.0) -> Rope:
    return Rope(dimensions, _floats(frequencies), scale)


def _array(values: Sequence[float]) -> FloatArray:
    return np.array(values, np.float32)


def _floats(values: FloatArray) -> tuple[float, ...]:
    return tuple(float(value) for value in values.astype(np.float32))


def _powers(base: float, dimensions: int) -> FloatArray:
    """Wavelengths / 2π, `[dimensions / 2]`, from float32 exponents."""
    exponents = np.arange(0, dimensions, 2, dtype=np.float32) / np.float32(dimensions)
    return np.power(np.float64(np.float32(base)), exponents.astype(np.float64)).astype(np.float32)


def _original_context(config: Mapping[str, Any], params: Mapping[str, Any]) -> int:
    """Positions before they were extended. Outside the rope's parameters it wins, as in transformers."""
    for values in (config, params):
        if values.get("original_max_position_embeddings") is not None:
            return int(rope_number(values, "original_max_position_embeddings"))
    return count(config, "max_position_embeddings")


def _factor(config: Mapping[str, Any], params: Mapping[str, Any], original: int) -> float:
    if params.get("factor") is not None:
        return rope_number(params, "factor")
    return count(config, "max_position_embeddings") / original


def _llama3(params: Mapping[str, Any], plain: FloatArray, original: int) -> FloatArray:
    """Llama 3.1: long waves by `factor`, short ones not, a ramp between."""
    factor, low, high = (rope_number(params, key) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    if high <= low:
        raise CheckpointError(
            "config-key",
            f"the rope's high_freq_factor is {high:g}, its low_freq_factor {low:g}",
            why="the first must be larger",
        )
    wave = np.float32(2 * math.pi) / plain
    scaled = np.where(wave > original / low, plain / np.float32(factor), plain)
    smooth = (np.float32(original) / wave - np.float32(low)) / np.float32(high - low)
    between = (1 - smooth) * scaled / np.float32(factor) + smooth * scaled
    is_between = ~(wave < original / high) & ~(wave > original / low)
    return np.where(is_between, between, scaled).astype(np.float32)


def _yarn(config: Mapping[str, Any], params: Mapping[str, Any], dimensions: int, base: float, original: int) -> Rope:
    """YaRN (arXiv 2309.00071)."""
    factor = _factor(config, params, original)

    def magnitude(weight: float = 1.0) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if params.get("attention_factor") is not None:
        scale = rope_number(params, "attention_factor")
    elif params.get("mscale") and params.get("mscale_all_dim"):
        scale = magnitude(rope_number(params, "mscale")) / magnitude(rope_number(params, "mscale_all_dim"))
    else:
        scale = magnitude()

    def dimension(turns: float) -> float:
        """The dimension that makes so many turns over the original context."""
        return dimensions * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

    fast, slow = (
        rope_number(params, key) if params.get(key) else default
        for key, default in (("beta_fast", 32.0), ("beta_slow", 1.0))
    )
    low, high = dimension(fast), dimension(slow)
    if params.get("truncate") is not False:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dimensions - 1)
    high += 0.001 if low == high else 0
    # torch rounds a wrapped Python number to float32 first.
    places = np.arange(dimensions // 2, dtype=np.float32)
    ramp = np.clip((places - np.float32(low)) / np.float32(high - low), 0, 1)
    powers = _powers(base, dimensions)
    kept = np.float32(1) - ramp
    frequencies = 1 / (np.float32(factor) * powers) * (1 - kept) + 1 / powers * kept
    return _rope(dimensions, frequencies.astype(np.float32), scale)


def _longrope(config: Mapping[str, Any], params: Mapping[str, Any], powers: FloatArray, original: int) -> Rope:
    """LongRoPE (arXiv 2402.13753): two sets of divisors; the sequence's length chooses."""
    sets: list[tuple[float, ...]] = []
    for key in ("short_factor", "long_factor"):
        values = params.get(key)
        if not isinstance(values, list) or len(values) != len(powers) or not all(value > 0 for value in values):
            found = len(values) if isinstance(values, list) else 0
            raise CheckpointError(
                "config-key",
                f"the rope's {key} has {found} values",
                why=f"{len(powers)} above 0 were expected, half of the {2 * len(powers)} rotated dimensions",
            )
        sets.append(_floats(np.float32(1) / (_array(values) * powers)))
    factor = _factor(config, params, original)
    if params.get("attention_factor") is not None:
        scale = rope_number(params, "attention_factor")
    else:
        scale = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return Rope(2 * len(powers), sets[0], scale, sets[1], original)
