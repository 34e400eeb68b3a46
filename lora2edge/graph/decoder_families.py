"""The families of decoders that are known: their tensors, and what transformers 5 takes where config.json is silent.

Read from transformers 5.23; a setting that its code for a family ignores is ignored or refused here, never applied.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lora2edge.checkpoint.values import count, decoder_class, need, rope_kind
from lora2edge.errors import CheckpointError, InputError, UnsupportedError
from lora2edge.graph.rope import Rope, read_rope, rope_parameters, theta_of

Config = Mapping[str, Any]
_FULL, _SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True, slots=True)
class Family:
    """One model_type. Shapes are words: h hidden, f intermediate, q and k all query and key heads, d one head,
    p the packed query, key and value heads, g twice f."""

    name: str
    tensors: Mapping[str, str]
    """Tensor of a layer → shape."""
    layer_kinds: Callable[[Config, int], tuple[str, ...]]
    """Config and number of layers → the attention of each."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    biases: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Config flag → the tensors that it adds."""
    ropes: Callable[[Config, int], Mapping[str, Rope]] = field(
        default=lambda config, head_dim: _one_rope(config, head_dim)
    )
    """Config and head's width → kind of attention → its rope."""
    activation_key: str = "hidden_act"
    is_gemma: bool = False
    """Norms multiply by 1 + weight, embeddings by √hidden; attention's scale and soft caps are settings."""
    is_fused: bool = False
    """Whether query, key and value are one tensor, and gate and up."""
    recomputes: bool = False
    """Whether transformers' generation fills the cache again where LongRoPE changes its factors."""

    def layer_tensors(self, config: Config) -> Mapping[str, str]:
        """Those that a layer has, biases that the config switches on included."""
        added = (names for flag, names in self.biases.items() if config.get(flag))
        return {**self.tensors, **{name: words for names in added for name, words in names.items()}}

    def refusals(self, config: Config) -> list[InputError]:
        """Settings that have no place in the graph."""
        found: list[InputError] = []
        if config.get("use_bidirectional_attention") or config.get("is_causal") is False:
            found.append(UnsupportedError("onnx-config", "attention is bidirectional", why="the graph is causal"))
        if self.name == "gemma3_text" and config.get("attn_logit_softcapping"):
            found.append(
                UnsupportedError(
                    "onnx-config",
                    "attn_logit_softcapping is set",
                    why="transformers' Gemma 3 ignores it, other runtimes do not",
                    hint="set it to null in config.json",
                )
            )
        return found


def find_family(config: Config) -> Family:
    """The family of `config`'s architecture. Raises UnsupportedError `onnx-architecture`, CheckpointError."""
    name = decoder_class(config)
    if name in FAMILIES:
        return FAMILIES[name]
    close = difflib.get_close_matches(name, FAMILIES, n=1)
    raise UnsupportedError(
        "onnx-architecture",
        f"there is no graph for {name}",
        why="it would have to be written, and compared with transformers",
        hint="known: " + ", ".join(FAMILIES) + (f" (nearest: {close[0]})" if close else ""),
    )


def _never(config: Config, layers: int) -> tuple[str, ...]:
    """transformers' Llama knows no window."""
    return (_FULL,) * layers


def _always(config: Config, layers: int) -> tuple[str, ...]:
    """Mistral and Phi-3 slide one window in all layers, or none."""
    kind = _SLIDING if config.get("sliding_window") is not None else _FULL
    found = config.get("layer_types")
    if found is not None and set(found) != {kind}:
        raise UnsupportedError(
            "onnx-config",
            "layer_types differ from layer to layer, or from sliding_window",
            why="transformers ignores them in this architecture",
            hint="remove layer_types from config.json",
        )
    return (kind,) * layers


def _listed(config: Config, layers: int) -> tuple[str, ...] | None:
    """`layer_types`, where the config has them."""
    found = config.get("layer_types")
    if found is None:
        return None
    if len(found) != layers or not set(found) <= {_FULL, _SLIDING}:
        raise UnsupportedError(
            "onnx-config",
            f"config.json gives {len(found)} layer_types ({', '.join(sorted(set(found)))}) for {layers} layers",
            why=f"{_FULL} and {_SLIDING} are known",
        )
    return tuple(found)


def _qwen(config: Config, layers: int) -> tuple[str, ...]:
    """The window slides from layer number max_window_layers on, where it is used at all."""
    slides = config.get("use_sliding_window") is True and config.get("sliding_window") is not None
    kinds = _listed(config, layers)
    if kinds is None:
        first = need(config, "max_window_layers") if slides else layers
        if type(first) is not int:
            raise CheckpointError(
                "config-key", f"max_window_layers is {first!r} in config.json", why="a number is needed"
            )
        return tuple(_SLIDING if index >= first else _FULL for index in range(layers))
    if _SLIDING in kinds and not slides:
        raise CheckpointError(
            "config-key",
            "layer_types has sliding_attention, and no window is used",
            why="it needs use_sliding_window: true and sliding_window",
        )
    return kinds


def _gemma2(config: Config, layers: int) -> tuple[str, ...]:
    """The window slides in every other layer."""
    return _listed(config, layers) or _every(2, layers)


def _gemma3(config: Config, layers: int) -> tuple[str, ...]:
    """The window slides in all but every sixth layer; older files give the number."""
    period = 6 if config.get("sliding_window_pattern") is None else count(config, "sliding_window_pattern")
    return _listed(config, layers) or _every(period, layers)


def _every(period: int, layers: int) -> tuple[str, ...]:
    return tuple(_FULL if index % period == period - 1 else _SLIDING for index in range(layers))


def _one_rope(config: Config, head_dim: int) -> Mapping[str, Rope]:
    """One rope for all layers, which turns whole heads."""
    params = rope_parameters(config)
    for values in (config, params):
        fraction = values.get("partial_rotary_factor")
        if fraction is not None and fraction != 1:
            raise UnsupportedError(
                "onnx-rope",
                f"partial_rotary_factor is {fraction}",
                why="transformers rotates whole heads in this architecture",
            )
    rope = read_rope(config, params, head_dim, theta_of(config))
    return {_FULL: rope, _SLIDING: rope}


def _phi3_rope(config: Config, head_dim: int) -> Mapping[str, Rope]:
    """Phi-3 may rotate a part of each head, and calls LongRoPE also su or yarn."""
    params = dict(rope_parameters(config))
    kind = rope_kind(params)
    if kind in ("su", "yarn"):
        kind = "longrope"
    if kind not in ("default", "longrope"):
        raise UnsupportedError(
            "onnx-rope", f"the rope is scaled by {kind!r}", why="transformers' Phi-3 knows default and longrope"
        )
    fraction = params.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    dimensions = int(head_dim * (1.0 if fraction is None else float(fraction)))
    if dimensions % 2 or not 0 < dimensions <= head_dim:
        raise UnsupportedError(
            "onnx-rope", f"{dimensions} of {head_dim} dimensions are rotated", why="an even number is needed"
        )
    rope = read_rope(config, {**params, "rope_type": kind}, dimensions, theta_of(config))
    return {_FULL: rope, _SLIDING: rope}


def _gemma3_ropes(config: Config, head_dim: int) -> Mapping[str, Rope]:
    """Two ropes: transformers 5 nests them by kind of layer; before, rope_scaling was that of full attention."""
    nested = config.get("rope_parameters") or {}
    if nested and not {_FULL, _SLIDING} & set(nested):
        raise UnsupportedError(
            "onnx-rope",
            "rope_parameters are not given by kind of layer",
            why="transformers' Gemma 3 ignores them then",
            hint="write them as {full_attention: {…}, sliding_attention: {…}}, or as rope_theta and rope_scaling",
        )
    scaling = config.get("rope_scaling") or {}
    if scaling.get("type") and not scaling.get("rope_type"):
        raise UnsupportedError(
            "onnx-rope",
            "rope_scaling of config.json has a type, and no rope_type",
            why="transformers 4 scaled the rope by it, transformers 5 ignores it in Gemma 3",
            hint="rename type to rope_type in rope_scaling",
        )
    full = {**(nested.get(_FULL) or {}), **scaling}
    sliding = nested.get(_SLIDING) or {}
    return {
        _FULL: read_rope(config, full, head_dim, theta_of(config, default=1e6)),
        _SLIDING: read_rope(config, sliding, head_dim, theta_of(config, "rope_local_base_freq")),
    }


_NORMS = {"input_layernorm.weight": "h", "post_attention_layernorm.weight": "h"}
_GEMMA_NORMS = {**_NORMS, "pre_feedforward_layernorm.weight": "h", "post_feedforward_layernorm.weight": "h"}
_HEAD_NORMS = {"self_attn.q_norm.weight": "d", "self_attn.k_norm.weight": "d"}
_LINEAR = {
    "self_attn.q_proj.weight": "q h",
    "self_attn.k_proj.weight": "k h",
    "self_attn.v_proj.weight": "k h",
    "self_attn.o_proj.weight": "h q",
    "mlp.gate_proj.weight": "f h",
    "mlp.up_proj.weight": "f h",
    "mlp.down_proj.weight": "h f",
}
_QKV_BIASES = {"self_attn.q_proj.bias": "q", "self_attn.k_proj.bias": "k", "self_attn.v_proj.bias": "k"}
_ATTENTION_BIASES = {"attention_bias": {**_QKV_BIASES, "self_attn.o_proj.bias": "h"}}
_MLP_BIASES = {"mlp.gate_proj.bias": "f", "mlp.up_proj.bias": "f", "mlp.down_proj.bias": "h"}
_SILU = {"hidden_act": "silu"}
_QWEN_DEFAULTS = {
    **_SILU,
    "num_key_value_heads": 32,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
_GEMMA_DEFAULTS = {
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-6,
    "sliding_window": 4096,
    "hidden_activation": "gelu_pytorch_tanh",
}

FAMILIES: Mapping[str, Family] = {
    "LlamaForCausalLM": Family(
        "llama",
        {**_NORMS, **_LINEAR},
        _never,
        defaults=_SILU,
        biases={**_ATTENTION_BIASES, "mlp_bias": _MLP_BIASES},
    ),
    "MistralForCausalLM": Family(
        "mistral",
        {**_NORMS, **_LINEAR},
        _always,
        defaults={**_SILU, "sliding_window": 4096, "num_key_value_heads": 8},
    ),
    "Qwen2ForCausalLM": Family("qwen2", {**_NORMS, **_LINEAR, **_QKV_BIASES}, _qwen, defaults=_QWEN_DEFAULTS),
    "Qwen3ForCausalLM": Family(
        "qwen3",
        {**_NORMS, **_LINEAR, **_HEAD_NORMS},
        _qwen,
        defaults={**_QWEN_DEFAULTS, "head_dim": 128},
        biases=_ATTENTION_BIASES,
    ),
    "Gemma2ForCausalLM": Family(
        "gemma2",
        {**_GEMMA_NORMS, **_LINEAR},
        _gemma2,
        defaults={
            **_GEMMA_DEFAULTS,
            "max_position_embeddings": 8192,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        biases=_ATTENTION_BIASES,
        activation_key="hidden_activation",
        is_gemma=True,
    ),
    "Gemma3ForCausalLM": Family(
        "gemma3_text",
        {**_GEMMA_NORMS, **_LINEAR, **_HEAD_NORMS},
        _gemma3,
        defaults={**_GEMMA_DEFAULTS, "max_position_embeddings": 131072},
        biases=_ATTENTION_BIASES,
        ropes=_gemma3_ropes,
        activation_key="hidden_activation",
        is_gemma=True,
    ),
    "Phi3ForCausalLM": Family(
        "phi3",
        {
            **_NORMS,
            "self_attn.qkv_proj.weight": "p h",
            "self_attn.o_proj.weight": "h q",
            "mlp.gate_up_proj.weight": "g h",
            "mlp.down_proj.weight": "h f",
        },
        _always,
        defaults={**_SILU, "original_max_position_embeddings": 4096},
        ropes=_phi3_rope,
        is_fused=True,
        recomputes=True,
    ),
}
"""Class of transformers → family."""
