"""Architectures: config.json and tensor names of transformers → llama.cpp's metadata and tensors.

Each table says where every tensor of a layer goes and which shape it must have; a tensor without a place is an error,
and so is a place without a tensor. What llama.cpp's graph assumes silently (activation, attention scale, window
pattern) is compared with the config and refused where it differs. Read from llama.cpp 0.5 and 0.6, src/models.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lora2edge.backends.gguf.container import Metadata
from lora2edge.backends.gguf.mix import Shape, order_key
from lora2edge.backends.gguf.rope import Rope, local_theta, read_rope, rotary_fraction
from lora2edge.contracts import TensorInfo
from lora2edge.errors import CheckpointError, InputError, UnsupportedError, refuse

if TYPE_CHECKING:
    from lora2edge.contracts import FloatArray

Config = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Planned:
    """A tensor of the file to be written."""

    name: str
    """llama.cpp's, e.g. "blk.0.attn_q.weight"."""
    shape: tuple[int, ...]
    source: str | None = None
    """Tensor of the checkpoint; None where `values` has them."""
    heads: int = 0
    """llama.cpp's Llama rotates neighbouring rows, transformers the two halves of a head: rows are interleaved
    within each of so many heads. 0: rows stay."""
    offset: float = 0.0
    """Added to every element: Gemma's norms multiply by 1 + weight."""
    values: FloatArray | None = None


@dataclass(frozen=True, slots=True)
class ModelPlan:
    """Everything about the model but its tokenizer."""

    architecture: str
    """`general.architecture`."""
    metadata: Metadata
    tensors: tuple[Planned, ...]
    """In llama.cpp's order."""
    tied_copy: tuple[str, str] | None
    """A stored output head that the config ties to the embedding (both names): left out, and must be equal."""
    shape: Shape
    vocab_rows: int
    context_length: int
    notes: tuple[str, ...]


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


def plan_model(config: Config, tensors: Mapping[str, TensorInfo], context_length: int | None = None) -> ModelPlan:
    """What the file will hold. Reads no weight; raises every refusal at once.

    `context_length` replaces the one that follows from the config.
    """
    architecture = find_architecture(config)
    config = {**architecture.defaults, **config}
    errors: list[InputError] = []
    shape = _shape(config)
    head_dim = int(config.get("head_dim") or _need(config, "hidden_size") // shape.heads)
    sizes = _sizes(config, shape, head_dim)
    errors += _assumptions(config, architecture, head_dim, sizes["h"] // shape.heads)
    context, notes = _context(config, architecture, context_length)
    rotated = int(head_dim * rotary_fraction(config))
    theta = float(architecture.defaults.get("rope_theta", 10000.0))
    rope = Rope({})
    try:
        rope = read_rope(
            config, architecture.ropes, rotated, theta=theta, context=_need(config, "max_position_embeddings")
        )
    except InputError as error:
        errors.append(error)
    extra: Metadata = {}
    if architecture.extra:
        extra, refused = architecture.extra(config, shape)
        errors += refused
    planned, tied_copy, unplaced = _place(architecture, config, tensors, shape, sizes)
    errors += unplaced
    refuse(errors)
    prefix = architecture.name
    metadata: Metadata = {
        "general.architecture": ("str", prefix),
        "general.type": ("str", "model"),
        f"{prefix}.block_count": ("u32", shape.layers),
        f"{prefix}.context_length": ("u32", context),
        f"{prefix}.embedding_length": ("u32", sizes["h"]),
        f"{prefix}.feed_forward_length": ("u32", sizes["f"]),
        f"{prefix}.attention.head_count": ("u32", shape.heads),
        f"{prefix}.attention.head_count_kv": ("u32", shape.kv_heads),
        f"{prefix}.attention.layer_norm_rms_epsilon": ("f32", float(_need(config, "rms_norm_eps"))),
        f"{prefix}.attention.key_length": ("u32", head_dim),
        f"{prefix}.attention.value_length": ("u32", head_dim),
        f"{prefix}.vocab_size": ("u32", sizes["v"]),
        f"{prefix}.rope.dimension_count": ("u32", rotated),
        **{f"{prefix}.{key}": value for key, value in {**rope.metadata, **extra}.items()},
    }
    planned += [Planned(name, values.shape, values=values) for name, values in rope.factors.items()]
    planned.sort(key=lambda tensor: order_key(tensor.name))
    return ModelPlan(
        architecture=prefix,
        metadata=metadata,
        tensors=tuple(planned),
        tied_copy=tied_copy,
        shape=shape,
        vocab_rows=sizes["v"],
        context_length=context,
        notes=(*notes, *rope.notes),
    )


def find_architecture(config: Config) -> Architecture:
    """The table for `config`'s architecture. Raises UnsupportedError `gguf-architecture`."""
    named = config.get("architectures") or [_CLASS_OF_TYPE.get(str(config.get("model_type")), "")]
    name = str(named[0]) or f"model_type {config.get('model_type')!r}"
    if name in ARCHITECTURES:
        return ARCHITECTURES[name]
    close = difflib.get_close_matches(name, ARCHITECTURES, n=1)
    raise UnsupportedError(
        "gguf-architecture",
        f"GGUF has no place for {name} here",
        why="its tensors would have to be mapped, and its graph checked against llama.cpp's",
        hint="known: " + ", ".join(ARCHITECTURES) + (f" (nearest: {close[0]})" if close else ""),
    )


def _need(config: Config, key: str) -> Any:
    value = config.get(key)
    if value is None:
        raise CheckpointError("config-key", f"config.json has no {key}", why="llama.cpp must be told")
    return value


def _shape(config: Config) -> Shape:
    layers, heads = (int(_need(config, key)) for key in ("num_hidden_layers", "num_attention_heads"))
    kv_heads = int(config.get("num_key_value_heads") or heads)
    if layers < 1 or heads < 1 or kv_heads < 1 or heads % kv_heads:
        raise CheckpointError(
            "config-key",
            f"config.json has {layers} layers, {heads} attention heads and {kv_heads} key-value heads",
            why="each must be positive, and the first kind of heads a multiple of the second",
        )
    return Shape(layers, heads, kv_heads, is_llama=find_architecture(config).name == "llama")


def _sizes(config: Config, shape: Shape, head_dim: int) -> dict[str, int]:
    """The words of the tables' shapes."""
    hidden, inner, vocab = (int(_need(config, key)) for key in ("hidden_size", "intermediate_size", "vocab_size"))
    queries, keys = shape.heads * head_dim, shape.kv_heads * head_dim
    return {
        "h": hidden,
        "f": inner,
        "g": 2 * inner,
        "q": queries,
        "k": keys,
        "p": queries + 2 * keys,
        "d": head_dim,
        "v": vocab,
    }


def _assumptions(config: Config, architecture: Architecture, head_dim: int, plain_head_dim: int) -> list[InputError]:
    """What llama.cpp's graphs take for granted."""
    errors: list[InputError] = []

    def refused(what: str, why: str) -> None:
        errors.append(UnsupportedError("gguf-config", what, why=why))

    activation = config.get("hidden_activation") or config.get("hidden_act")
    if activation is not None and activation not in architecture.activations:
        known = " or ".join(sorted(architecture.activations))
        refused(f"the activation is {activation}", f"llama.cpp's {architecture.name} graph has {known}")
    for flag in ("attention_bias", "mlp_bias"):
        if config.get(flag) and flag not in architecture.biases:
            refused(f"config.json sets {flag}", f"llama.cpp's {architecture.name} has no such biases")
    if not architecture.free_head_dim and head_dim != plain_head_dim:
        refused(
            f"head_dim is {head_dim}, hidden_size / num_attention_heads is {plain_head_dim}",
            f"llama.cpp's {architecture.name} takes the second",
        )
    fraction = rotary_fraction(config)
    if fraction != 1.0 and architecture.name != "phi3":
        refused(f"{fraction:g} of each head is rotated", f"llama.cpp's {architecture.name} rotates all of it")
    return errors


def _context(config: Config, architecture: Architecture, wanted: int | None) -> tuple[int, tuple[str, ...]]:
    """The context length to state, and what there is to say about it.

    llama.cpp attends to everything where Mistral, Qwen2 or Phi-3 slide a window: equal up to the window's length.
    """
    positions = int(_need(config, "max_position_embeddings"))
    window = config.get("sliding_window")
    if architecture.name.startswith("gemma") or config.get("use_sliding_window") is False:
        window = None
    if "use_sliding_window" not in config and architecture.name.startswith("qwen"):
        window = None  # transformers' own default
    if "sliding_attention" not in config.get("layer_types", ["sliding_attention"]):
        window = None
    limit = min(positions, int(window)) if window else positions
    if wanted is not None:
        over = wanted > limit
        note = f"context length {wanted} was asked for; answers beyond {limit} tokens differ from the baseline's"
        return wanted, ((note,) if over else ())
    if limit < positions:
        return limit, (
            f"context length {limit}, not {positions}: the model slides a window of {limit} tokens, llama.cpp "
            "attends to everything; up to the window both are equal",
        )
    return positions, ()


def _place(
    architecture: Architecture, config: Config, tensors: Mapping[str, TensorInfo], shape: Shape, sizes: dict[str, int]
) -> tuple[list[Planned], tuple[str, str] | None, list[InputError]]:
    """Each tensor of the checkpoint in its place."""
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    places = {embedding: ("token_embd.weight", "v h"), "model.norm.weight": ("output_norm.weight", "h")}
    tied = bool(config.get("tie_word_embeddings", False))
    if not tied:
        places[head] = ("output.weight", "v h")
    layer = dict(architecture.layer)
    for flag, biases in architecture.biases.items():
        if not flag or config.get(flag):
            layer |= biases
    for index in range(shape.layers):
        for name, (place, words) in layer.items():
            places[f"model.layers.{index}.{name}"] = (f"blk.{index}.{place}", words)
    errors: list[InputError] = []
    planned: list[Planned] = []
    for name, (place, words) in places.items():
        found = tensors.get(name)
        expected = tuple(sizes[word] for word in words.split())
        if found is None:
            continue
        if found.shape != expected:
            errors.append(
                CheckpointError(
                    "gguf-shape",
                    f"{name} is {list(found.shape)}",
                    why=f"{list(expected)} follows from config.json",
                )
            )
        heads = {"attn_q": shape.heads, "attn_k": shape.kv_heads}.get(place.split(".")[-2], 0)
        planned.append(
            Planned(
                place,
                expected,
                source=name,
                heads=heads if architecture.permuted else 0,
                offset=architecture.norm_offset if name.endswith("norm.weight") else 0.0,
            )
        )
    errors += _accounts(architecture, places, tensors, head if tied else None)
    return planned, ((head, embedding) if tied and head in tensors else None), errors


def _accounts(
    architecture: Architecture, places: Mapping[str, Any], tensors: Mapping[str, TensorInfo], left_out: str | None
) -> list[InputError]:
    """A refusal for tensors without a place, and one for places without a tensor."""
    # Old checkpoints store the rotary frequencies, which follow from the config.
    unknown = [
        name for name in tensors if name not in places and name != left_out and not name.endswith("rotary_emb.inv_freq")
    ]
    missing = [name for name in places if name not in tensors]
    errors: list[InputError] = []
    if unknown:
        errors.append(
            UnsupportedError(
                "gguf-tensor",
                f"{len(unknown)} tensors have no place in llama.cpp's {architecture.name}: {_some(unknown)}",
                why="leaving them out would give another model",
            )
        )
    if missing:
        errors.append(
            CheckpointError(
                "gguf-tensor-missing",
                f"{len(missing)} tensors are missing: {_some(missing)}",
                why="config.json and the architecture need them",
            )
        )
    return errors


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


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
    found = float(_need(config, "query_pre_attn_scalar"))
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
    metadata: Metadata = {"attention.sliding_window": ("u32", int(_need(config, "sliding_window")))}
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
    metadata: Metadata = {"attention.sliding_window": ("u32", int(_need(config, "sliding_window")))}
    try:
        metadata["rope.freq_base_swa"] = ("f32", local_theta(config, 10000.0))
    except InputError as error:
        errors.append(error)
    if config.get("final_logit_softcapping"):
        metadata["final_logit_softcapping"] = ("f32", float(config["final_logit_softcapping"]))
    return metadata, errors


def _phi3(config: Config, shape: Shape) -> tuple[Metadata, list[InputError]]:
    positions = int(_need(config, "max_position_embeddings"))
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
_CLASS_OF_TYPE = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
}


def layer_of(name: str) -> int | None:
    """Layer number in a tensor's name, GGUF or checkpoint; None outside the layers."""
    found = re.search(r"(?:^|\.)(?:blk|layers)\.(\d+)\.", name)
    return int(found[1]) if found else None
