"""Rotary position embeddings: config.json of transformers 4 or 5 → llama.cpp's metadata and factor tensors.

llama.cpp applies no scaling that it is not told of, and ignores what its graph for an architecture does not read:
a kind of scaling that cannot be held exactly is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from lora2edge.backends.gguf.container import Metadata
from lora2edge.checkpoint.values import rope_kind, rope_number
from lora2edge.errors import CheckpointError, UnsupportedError

if TYPE_CHECKING:
    from lora2edge.contracts import FloatArray

# llama.cpp's graphs for these architectures read no other values.
_YARN_BETAS = {"beta_fast": 32.0, "beta_slow": 1.0}


@dataclass(frozen=True, slots=True)
class Rope:
    """What llama.cpp must be told."""

    metadata: Metadata
    """Keys without the architecture's prefix."""
    factors: Mapping[str, FloatArray] = field(default_factory=dict)
    """Tensor name → divisors of the frequencies, `[rotary dimensions / 2]` float32."""
    notes: tuple[str, ...] = ()


def read_rope(config: Mapping[str, Any], known: frozenset[str], dimensions: int, *, theta: float, context: int) -> Rope:
    """Rotary parameters of the (full) attention layers.

    `known`: the kinds that llama.cpp holds for the architecture; `dimensions`: rotated per head; `theta`: the
    architecture's default base; `context`: positions of the model. Raises UnsupportedError, CheckpointError.
    """
    params = _parameters(config)
    metadata: Metadata = {"rope.freq_base": ("f32", float(params.get("rope_theta", config.get("rope_theta", theta))))}
    kind = _kind(params)
    if kind == "default":
        return Rope(metadata)
    if kind not in known:
        raise UnsupportedError(
            "gguf-rope",
            f"rope scaling {kind!r} cannot be held for this architecture",
            why="llama.cpp would ignore it, and answer wrongly; known here: " + ", ".join(sorted(known)),
        )
    if "mrope_section" in params:
        raise UnsupportedError(
            "gguf-rope", "the rope has sections (mrope)", why="that is a vision model's; llama.cpp would ignore it"
        )
    if kind == "linear":
        metadata["rope.scaling.type"] = ("str", "linear")
        metadata["rope.scaling.factor"] = ("f32", rope_number(params, "factor"))
        return Rope(metadata)
    if kind == "yarn":
        return Rope({**metadata, **_yarn(params, context)})
    if kind == "llama3":
        return Rope(metadata, {"rope_freqs.weight": _llama3(params, metadata["rope.freq_base"][1], dimensions)})
    return _longrope(config, params, metadata, dimensions, context)


def local_theta(config: Mapping[str, Any], default: float) -> float:
    """Base of the sliding-window layers (Gemma 3). Raises UnsupportedError where these are scaled."""
    nested = (config.get("rope_parameters") or {}).get("sliding_attention") or {}
    if _kind(nested) != "default":
        raise UnsupportedError("gguf-rope", "the sliding-window layers have a scaled rope", why="llama.cpp has none")
    return float(nested.get("rope_theta", config.get("rope_local_base_freq", default)))


def rotary_fraction(config: Mapping[str, Any]) -> float:
    """Share of a head's dimensions that is rotated."""
    found = _parameters(config).get("partial_rotary_factor", config.get("partial_rotary_factor"))
    return 1.0 if found is None else float(found)


def _parameters(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """transformers 5 writes rope_parameters (nested per layer kind for Gemma 3), transformers 4 rope_scaling."""
    params = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(params, Mapping):
        raise CheckpointError("config-key", "rope_parameters of config.json is no mapping", why=f"it is {params!r}")
    nested = params.get("full_attention")
    return nested if isinstance(nested, Mapping) else params


def _kind(params: Mapping[str, Any]) -> str:
    kind = rope_kind(params)
    return "longrope" if kind == "su" else kind


def _yarn(params: Mapping[str, Any], context: int) -> Metadata:
    """YaRN (arXiv 2309.00071). llama.cpp scales attention by 1 + 0.1 ln(factor) itself."""
    for key, expected in _YARN_BETAS.items():
        if float(params.get(key) or expected) != expected:
            raise UnsupportedError(
                "gguf-rope", f"YaRN with {key} {params[key]}", why=f"llama.cpp uses {expected} for this architecture"
            )
    if params.get("mscale") or params.get("mscale_all_dim") or params.get("truncate") is False:
        raise UnsupportedError(
            "gguf-rope",
            "YaRN with mscale, mscale_all_dim or truncate: false",
            why="llama.cpp's graph for this architecture does not read them",
        )
    factor = rope_number(params, "factor")
    original = int(params.get("original_max_position_embeddings") or context)
    metadata: Metadata = {
        "rope.scaling.type": ("str", "yarn"),
        "rope.scaling.factor": ("f32", factor),
        "rope.scaling.original_context_length": ("u32", original),
    }
    own = 1.0 + 0.1 * math.log(factor) if factor > 1 else 1.0
    wanted = float(params.get("attention_factor") or own)
    if wanted != own:
        metadata["rope.scaling.attn_factor"] = ("f32", wanted / own)
    return metadata


def _llama3(params: Mapping[str, Any], theta: float, dimensions: int) -> FloatArray:
    """Divisors of Llama 3.1: long waves by `factor`, short ones not, a ramp between."""
    factor, low, high = (rope_number(params, key) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    original = rope_number(params, "original_max_position_embeddings")
    wave = 2 * math.pi * theta ** (np.arange(0, dimensions, 2, dtype=np.float64) / dimensions)
    smooth = (original / wave - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    result = np.where(wave < original / high, 1.0, np.where(wave > original / low, factor, between))
    return result.astype(np.float32)


def _longrope(
    config: Mapping[str, Any], params: Mapping[str, Any], metadata: Metadata, dimensions: int, context: int
) -> Rope:
    """LongRoPE (arXiv 2402.13753): two sets of divisors, chosen by the context that a session is opened with."""
    original = params.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
    original = int(original or context)
    factors: dict[str, FloatArray] = {}
    for key in ("long_factor", "short_factor"):
        values = params.get(key)
        if not isinstance(values, list) or len(values) != dimensions // 2:
            count = len(values) if isinstance(values, list) else 0
            raise CheckpointError(
                "config-key",
                f"the rope's {key} has {count} values",
                why=f"{dimensions // 2} were expected, half of the {dimensions} rotated dimensions",
            )
        factors[f"rope_factors_{key.removesuffix('_factor')}.weight"] = np.array(values, np.float32)
    if params.get("short_mscale") or params.get("long_mscale"):
        raise UnsupportedError("gguf-rope", "LongRoPE with its own mscale", why="llama.cpp has one factor for both")
    scale = context / original
    own = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
    extended: Metadata = {
        **metadata,
        "rope.scaling.original_context_length": ("u32", original),
        "rope.scaling.attn_factor": ("f32", float(params.get("attention_factor") or own)),
    }
    note = (
        f"LongRoPE: llama.cpp uses the long factors for every prompt of a session opened with more than {original} "
        "tokens of context, where transformers chooses by the prompt's length"
    )
    return Rope(extended, factors, (note,))
