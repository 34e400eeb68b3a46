"""The architectures that are known: where each tensor of a layer goes in GGUF, and what llama.cpp takes for granted.

What its graph for an architecture assumes silently (activation, attention scale, window pattern) is compared with the
config and refused where it differs. Read from llama.cpp 0.5 and 0.6, src/models.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lora2edge.backends.gguf.container import Metadata
from lora2edge.backends.gguf.mix import Shape
from lora2edge.backends.gguf.rope import local_theta
from lora2edge.checkpoint.values import count, decoder_class, need
from lora2edge.errors import InputError, UnsupportedError

Config = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Architecture:
    """How one family of transformers maps to llama.cpp. Shapes are words: h hidden, f intermediate, q and k all
    query and key heads, d one head, p the packed query, key and value heads, g twice f, v vocabulary."""

    name: str
    layer: Mapping[str, tuple[str, str]]
    """Tensor of a layer → (llama.cpp's name, shape)."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What transformers assumes where config.json is silent."""
    biases: Mapping[str, Mapping[str, tuple[str, str]]] = field(default_factory=dict)
    """Config flag → the tensors that it adds; "" = always there."""
    activations: frozenset[str] = frozenset({"silu", "swish"})
    ropes: frozenset[str] = frozenset({"linear", "yarn"})
    permuted: bool = False
    norm_offset: float = 0.0
    free_head_dim: bool = True
    """Whether heads may be wider or narrower than hidden / heads."""
    extra: Callable[[Config, Shape], tuple[Metadata, list[InputError]]] | None = None
    """Further metadata and refusals."""


_Q, _K, _V = "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"
_QKV_BIASES = {
    f"{_Q}.bias": ("attn_q.bias", "q"),
    f"{_K}.bias": ("attn_k.bias", "k"),
    f"{_V}.bias": ("attn_v.bias", "k"),
}
_ATTENTION = {
    f"{_Q}.weight": ("attn_q.weight", "q h"),
    f"{_K}.weight": ("attn_k.weight", "k h"),
    f"{_V}.weight": ("attn_v.weight", "k h"),
    "self_attn.o_proj.weight": ("attn_output.weight", "h q"),
}
_MLP = {
    "mlp.gate_proj.weight": ("ffn_gate.weight", "f h"),
    "mlp.up_proj.weight": ("ffn_up.weight", "f h"),
    "mlp.down_proj.weight": ("ffn_down.weight", "h f"),
}
_NORMS = {
    "input_layernorm.weight": ("attn_norm.weight", "h"),
    "post_attention_layernorm.weight": ("ffn_norm.weight", "h"),
}
_HEAD_NORMS = {
    "self_attn.q_norm.weight": ("attn_q_norm.weight", "d"),
    "self_attn.k_norm.weight": ("attn_k_norm.weight", "d"),
}
_GEMMA_NORMS = {
    "input_layernorm.weight": ("attn_norm.weight", "h"),
    "post_attention_layernorm.weight": ("post_attention_norm.weight", "h"),
    "pre_feedforward_layernorm.weight": ("ffn_norm.weight", "h"),
    "post_feedforward_layernorm.weight": ("post_ffw_norm.weight", "h"),
}
_GEMMA_DEFAULTS = {
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-6,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}


def find_architecture(config: Config) -> Architecture:
    """The table for `config`'s architecture. Raises UnsupportedError `gguf-architecture`."""
    name = decoder_class(config)
    if name in ARCHITECTURES:
        return ARCHITECTURES[name]
    close = difflib.get_close_matches(name, ARCHITECTURES, n=1)
    raise UnsupportedError(
        "gguf-architecture",
        f"GGUF has no place for {name} here",
        why="its tensors would have to be mapped, and its graph checked against llama.cpp's",
        hint="known: " + ", ".join(ARCHITECTURES) + (f" (nearest: {close[0]})" if close else ""),
    )


def _layer_kinds(config: Config, layers: int, period: int) -> list[InputError]:
    """llama.cpp slides the window in all but every `period`-th layer."""
    expected = ["full_attention" if i % period == period - 1 else "sliding_attention" for i in range(layers)]
    found = config.get("layer_types")
    if found is None and int(config.get("sliding_window_pattern") or period) != period:
        found = f"sliding_window_pattern {config['sliding_window_pattern']}"
    if found is None or list(found) == expected:
        return []
    return [
        UnsupportedError(
            "gguf-config",
            "the pattern of sliding-window layers is not the architecture's own",
            why=f"llama.cpp has full attention in every layer number {period}",
        )
    ]


def _attention_scale(config: Config, expected: float, name: str) -> list[InputError]:
    found = float(need(config, "query_pre_attn_scalar"))
    if found == expected:
        return []
    return [
        UnsupportedError(
            "gguf-config", f"query_pre_attn_scalar is {found:g}", why=f"llama.cpp's {name} takes {expected:g}"
        )
    ]


def _gemma_scale(config: Config, shape: Shape, largest: int) -> float:
    """llama.cpp takes the head's width, and hidden / heads for the 27B models, which it tells by their depth."""
    return float(config["hidden_size"] // shape.heads if shape.layers == largest else config["head_dim"])


def _gemma2(config: Config, shape: Shape) -> tuple[Metadata, list[InputError]]:
    errors = _layer_kinds(config, shape.layers, 2)
    errors += _attention_scale(config, _gemma_scale(config, shape, 46), "gemma2")
    if not config.get("tie_word_embeddings"):
        errors.append(UnsupportedError("gguf-config", "the output head is not tied", why="llama.cpp's gemma2 has none"))
    caps = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    metadata: Metadata = {"attention.sliding_window": ("u32", count(config, "sliding_window"))}
    for key, default in caps.items():
        value = config.get(key, default)
        if not value:
            errors.append(UnsupportedError("gguf-config", f"{key} is off", why="llama.cpp's gemma2 always has it"))
        else:
            metadata[key] = ("f32", float(value))
    return metadata, errors


def _gemma3(config: Config, shape: Shape) -> tuple[Metadata, list[InputError]]:
    errors = _layer_kinds(config, shape.layers, 6)
    errors += _attention_scale(config, _gemma_scale(config, shape, 62), "gemma3")
    if config.get("attn_logit_softcapping"):
        errors.append(
            UnsupportedError("gguf-config", "attention logits are capped", why="llama.cpp's gemma3 has no cap")
        )
    if config.get("use_bidirectional_attention"):
        errors.append(UnsupportedError("gguf-config", "attention is bidirectional", why="llama.cpp's gemma3 is causal"))
    metadata: Metadata = {"attention.sliding_window": ("u32", count(config, "sliding_window"))}
    try:
        metadata["rope.freq_base_swa"] = ("f32", local_theta(config, 10000.0))
    except InputError as error:
        errors.append(error)
    if config.get("final_logit_softcapping"):
        metadata["final_logit_softcapping"] = ("f32", float(config["final_logit_softcapping"]))
    return metadata, errors


def _phi3(config: Config, shape: Shape) -> tuple[Metadata, list[InputError]]:
    positions = count(config, "max_position_embeddings")
    # llama.cpp has no window for Phi-3 and warns where it finds one.
    metadata: Metadata = {"attention.sliding_window": ("u32", 0)}
    if not (config.get("rope_parameters") or config.get("rope_scaling") or {}).get("long_factor"):
        metadata["rope.scaling.original_context_length"] = ("u32", positions)
    return metadata, []


_LLAMA = Architecture(
    "llama",
    {**_NORMS, **_ATTENTION, **_MLP},
    biases={
        "attention_bias": {**_QKV_BIASES, "self_attn.o_proj.bias": ("attn_output.bias", "h")},
        "mlp_bias": {
            "mlp.gate_proj.bias": ("ffn_gate.bias", "f"),
            "mlp.up_proj.bias": ("ffn_up.bias", "f"),
            "mlp.down_proj.bias": ("ffn_down.bias", "h"),
        },
    },
    ropes=frozenset({"linear", "yarn", "llama3"}),
    permuted=True,
)
ARCHITECTURES: Mapping[str, Architecture] = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": Architecture(
        "llama",
        _LLAMA.layer,
        defaults={"sliding_window": 4096, "num_key_value_heads": 8},
        ropes=frozenset({"linear", "yarn", "llama3"}),
        permuted=True,
    ),
    "Qwen2ForCausalLM": Architecture(
        "qwen2", {**_NORMS, **_ATTENTION, **_MLP}, biases={"": _QKV_BIASES}, free_head_dim=False
    ),
    "Qwen3ForCausalLM": Architecture("qwen3", {**_NORMS, **_ATTENTION, **_HEAD_NORMS, **_MLP}),
    "Gemma2ForCausalLM": Architecture(
        "gemma2",
        {**_GEMMA_NORMS, **_ATTENTION, **_MLP},
        defaults={**_GEMMA_DEFAULTS, "max_position_embeddings": 8192},
        activations=frozenset({"gelu_pytorch_tanh"}),
        ropes=frozenset({"linear"}),
        norm_offset=1.0,
        extra=_gemma2,
    ),
    "Gemma3ForCausalLM": Architecture(
        "gemma3",
        {**_GEMMA_NORMS, **_ATTENTION, **_HEAD_NORMS, **_MLP},
        defaults={**_GEMMA_DEFAULTS, "max_position_embeddings": 131072, "rope_theta": 1e6},
        activations=frozenset({"gelu_pytorch_tanh"}),
        ropes=frozenset({"linear"}),
        norm_offset=1.0,
        extra=_gemma3,
    ),
    "Phi3ForCausalLM": Architecture(
        "phi3",
        {
            **_NORMS,
            "self_attn.qkv_proj.weight": ("attn_qkv.weight", "p h"),
            "self_attn.o_proj.weight": ("attn_output.weight", "h q"),
            "mlp.gate_up_proj.weight": ("ffn_up.weight", "g h"),
            "mlp.down_proj.weight": ("ffn_down.weight", "h f"),
        },
        ropes=frozenset({"longrope"}),
        free_head_dim=False,
        extra=_phi3,
    ),
}
"""Class of transformers → how it maps."""
