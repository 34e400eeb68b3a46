"""A decoder as plain data, from its config and tensor headers: what a graph of it is written from, in any dialect.

No weight is read. A tensor without a place is an error, and so is a place without a tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from lora2edge.checkpoint.tying import says_tied
from lora2edge.checkpoint.values import count, first_names, need
from lora2edge.errors import CheckpointError, InputError, UnsupportedError, refuse
from lora2edge.graph.decoder_families import Family, find_family
from lora2edge.graph.rope import Rope

if TYPE_CHECKING:
    from lora2edge.contracts import TensorInfo

Role = Literal["qkv", "o", "gate", "up", "gate_up", "down", "head", "embedding"]
Activation = Literal["silu", "gelu", "gelu_tanh"]

_ACTIVATIONS: Mapping[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
_EMBEDDING, _HEAD, _NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


@dataclass(frozen=True, slots=True)
class Linear:
    """Rows `start:start + rows` of a tensor `[…, columns]`, multiplied with."""

    tensor: str
    start: int
    rows: int
    columns: int
    bias: str | None = None
    """`[…]`: the same rows of it are added."""


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer: tensors' names, and how it attends."""

    input_norm: str
    query: Linear
    key: Linear
    value: Linear
    query_norm: str | None
    """Of each head, before it is rotated; so is `key_norm`."""
    key_norm: str | None
    output: Linear
    attention_norm: str | None
    """Of what attention gives, before the residual is added; so is `feedforward_norm`."""
    middle_norm: str
    """Before the feed-forward part."""
    gate: Linear
    up: Linear
    down: Linear
    feedforward_norm: str | None
    window: int | None
    """Tokens that are attended to, the own one included; None: all before."""
    rope: Rope


@dataclass(frozen=True, slots=True)
class MatrixTensor:
    """A tensor of the checkpoint that is multiplied with, or looked up in."""

    name: str
    rows: int
    columns: int
    layer: int | None
    role: Role
    """Of a tied embedding: "head"."""


@dataclass(frozen=True, slots=True)
class Decoder:
    """A causal language model."""

    architecture: str
    """transformers' model_type, e.g. "qwen2"."""
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_rows: int
    """Of the embedding, which may have been resized."""
    context_length: int
    """Positions; `dataclasses.replace` makes it another."""
    embedding: str
    embedding_scale: float | None
    head: Linear
    """Of the embedding itself where both are tied."""
    tied_copy: tuple[str, str] | None
    """A stored output head that the config ties to the embedding (both names): left out, and must be equal."""
    norm: str
    epsilon: float
    norm_shift: float
    """Added to every norm's weights."""
    activation: Activation
    attention_scale: float
    attention_softcap: float | None
    logit_softcap: float | None
    layers: tuple[Layer, ...]
    matrices: tuple[MatrixTensor, ...]
    """In the order of the graph."""
    switch_length: int | None = None
    """LongRoPE: all of a prompt of more than so many tokens is turned by the long factors, so its first call must
    reach beyond them."""
    recompute_length: int | None = None
    """LongRoPE of Phi-3: a sequence that grows beyond so many tokens turns its earlier ones anew. transformers'
    generation gives the whole sequence again at that point, and so must the caller; on the old cache, keys keep
    their short frequencies (as in transformers, where its forward is called on such a cache)."""
    notes: tuple[str, ...] = field(default=())

    @property
    def is_tied(self) -> bool:
        """Whether embedding and output head are one tensor."""
        return self.head.tensor == self.embedding


def describe_decoder(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> Decoder:
    """The model that `config` and the tensors' headers describe.

    Raises all refusals at once: UnsupportedError `onnx-architecture`, `onnx-rope`, `onnx-config`, `onnx-tensor`;
    CheckpointError `config-key`, `onnx-shape`, `onnx-tensor-missing`.
    """
    family = find_family(config)
    config = {**family.defaults, **config}
    layers, hidden, inner = (count(config, key) for key in ("num_hidden_layers", "hidden_size", "intermediate_size"))
    heads, kv_heads, head_dim = _heads(config, hidden, layers, len(tensors))
    errors: list[InputError] = list(family.refusals(config))
    activation = config.get(family.activation_key)
    if activation not in _ACTIVATIONS:
        known = ", ".join(_ACTIVATIONS)
        errors.append(UnsupportedError("onnx-config", f"the activation is {activation}", why=f"known are {known}"))
    ropes: Mapping[str, Rope] = {}
    windows: tuple[int | None, ...] = ()
    kinds: tuple[str, ...] = ()
    try:
        kinds = family.layer_kinds(config, layers)
        windows = tuple(count(config, "sliding_window") if kind == "sliding_attention" else None for kind in kinds)
    except InputError as error:
        errors.append(error)
    try:
        ropes = family.ropes(config, head_dim)
    except InputError as error:
        errors.append(error)
    embedding = tensors.get(_EMBEDDING)
    vocab = embedding.shape[0] if embedding and embedding.shape else count(config, "vocab_size")
    tied = says_tied(config) is True
    sizes = {
        "h": hidden,
        "f": inner,
        "g": 2 * inner,
        "q": heads * head_dim,
        "k": kv_heads * head_dim,
        "p": (heads + 2 * kv_heads) * head_dim,
        "d": head_dim,
        "v": vocab,
    }
    errors += _unplaced(_places(family, config, layers, tied), sizes, tensors, _HEAD if tied else None)
    refuse(errors)
    described = tuple(
        _layer(family, config, f"model.layers.{index}.", sizes, window, ropes[kind])
        for index, (kind, window) in enumerate(zip(kinds, windows, strict=True))
    )
    head = Linear(_EMBEDDING if tied else _HEAD, 0, vocab, hidden)
    scalar = config.get("query_pre_attn_scalar") if family.is_gemma else None
    softcap, logit_softcap = (config.get(key) for key in ("attn_logit_softcapping", "final_logit_softcapping"))
    switch = max(layer.rope.switch for layer in described) or None
    return Decoder(
        architecture=family.name,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_rows=vocab,
        context_length=count(config, "max_position_embeddings"),
        embedding=_EMBEDDING,
        embedding_scale=hidden**0.5 if family.is_gemma else None,
        head=head,
        tied_copy=(_HEAD, _EMBEDDING) if tied and _HEAD in tensors else None,
        norm=_NORM,
        epsilon=float(need(config, "rms_norm_eps")),
        norm_shift=1.0 if family.is_gemma else 0.0,
        activation=_ACTIVATIONS[str(activation)],
        attention_scale=float(scalar or head_dim) ** -0.5,
        attention_softcap=abs(float(softcap)) if family.is_gemma and softcap else None,
        logit_softcap=abs(float(logit_softcap)) if family.is_gemma and logit_softcap else None,
        layers=described,
        matrices=_matrices(described, head, vocab, hidden, tied),
        switch_length=switch,
        recompute_length=switch if family.recomputes else None,
        notes=_notes(switch, family),
    )


def _heads(config: Mapping[str, Any], hidden: int, layers: int, tensors: int) -> tuple[int, int, int]:
    """Query heads, key-value heads, and the width of one."""
    heads = count(config, "num_attention_heads")
    kv_heads = heads if config.get("num_key_value_heads") is None else count(config, "num_key_value_heads")
    if heads % kv_heads or layers > tensors:
        raise CheckpointError(
            "config-key",
            f"config.json has {layers} layers, {heads} attention heads and {kv_heads} key-value heads",
            why=f"heads must be a multiple of key-value heads, and there are {tensors} tensors",
        )
    head_dim = hidden // heads if config.get("head_dim") is None else count(config, "head_dim")
    return heads, kv_heads, head_dim


def _layer(
    family: Family, config: Mapping[str, Any], prefix: str, sizes: Mapping[str, int], window: int | None, rope: Rope
) -> Layer:
    """The layer whose tensors begin with `prefix`."""
    hidden, inner, queries, keys = (sizes[word] for word in "hfqk")
    attention, feedforward = f"{prefix}self_attn.", f"{prefix}mlp."
    names = family.layer_tensors(config)

    def linear(name: str, rows: int, columns: int, start: int = 0) -> Linear:
        bias = f"{name.removeprefix(prefix)}.bias"
        return Linear(f"{name}.weight", start, rows, columns, f"{name}.bias" if bias in names else None)

    def optional(name: str) -> str | None:
        return f"{prefix}{name}" if name in names else None

    if family.is_fused:
        fused, gates = f"{attention}qkv_proj", f"{feedforward}gate_up_proj"
        query = linear(fused, queries, hidden)
        key, value = (linear(fused, keys, hidden, start) for start in (queries, queries + keys))
        gate, up = (linear(gates, inner, hidden, start) for start in (0, inner))
    else:
        query = linear(f"{attention}q_proj", queries, hidden)
        key, value = (linear(f"{attention}{name}_proj", keys, hidden) for name in "kv")
        gate, up = (linear(f"{feedforward}{name}_proj", inner, hidden) for name in ("gate", "up"))
    after_attention = f"{prefix}post_attention_layernorm.weight"
    before_feedforward = optional("pre_feedforward_layernorm.weight")
    return Layer(
        input_norm=f"{prefix}input_layernorm.weight",
        query=query,
        key=key,
        value=value,
        query_norm=optional("self_attn.q_norm.weight"),
        key_norm=optional("self_attn.k_norm.weight"),
        output=linear(f"{attention}o_proj", hidden, queries),
        attention_norm=after_attention if before_feedforward else None,
        middle_norm=before_feedforward or after_attention,
        gate=gate,
        up=up,
        down=linear(f"{feedforward}down_proj", hidden, inner),
        feedforward_norm=optional("post_feedforward_layernorm.weight"),
        window=window,
        rope=rope,
    )


def _matrices(layers: tuple[Layer, ...], head: Linear, vocab: int, hidden: int, tied: bool) -> tuple[MatrixTensor, ...]:
    """Every tensor that is a matrix, once."""
    found: list[MatrixTensor] = [] if tied else [MatrixTensor(_EMBEDDING, vocab, hidden, None, "embedding")]
    for index, layer in enumerate(layers):
        roles: dict[Role, tuple[Linear, ...]] = {
            "qkv": (layer.query, layer.key, layer.value),
            "o": (layer.output,),
            **(
                {"gate_up": (layer.gate, layer.up)}
                if layer.gate.tensor == layer.up.tensor
                else {"gate": (layer.gate,), "up": (layer.up,)}
            ),
            "down": (layer.down,),
        }
        for role, parts in roles.items():
            rows: dict[str, int] = {}
            for part in parts:
                rows[part.tensor] = rows.get(part.tensor, 0) + part.rows
            found += [MatrixTensor(name, rows[name], parts[0].columns, index, role) for name in rows]
    return (*found, MatrixTensor(head.tensor, vocab, hidden, None, "head"))


def _notes(switch: int | None, family: Family) -> tuple[str, ...]:
    if switch is None:
        return ()
    note = f"LongRoPE: sequences of more than {switch} tokens take the long factors, each by its own length"
    if family.recomputes:
        note += f"; a cache that was filled before must be filled again at {switch + 1} tokens"
    return (note,)


def _places(family: Family, config: Mapping[str, Any], layers: int, tied: bool) -> dict[str, str]:
    """Tensor → words of its shape."""
    places = {_EMBEDDING: "v h", _NORM: "h"} | ({} if tied else {_HEAD: "v h"})
    names = family.layer_tensors(config)
    return places | {f"model.layers.{i}.{name}": words for i in range(layers) for name, words in names.items()}


def _unplaced(
    places: Mapping[str, str], sizes: Mapping[str, int], tensors: Mapping[str, TensorInfo], left_out: str | None
) -> list[InputError]:
    """Refusals for wrong shapes, tensors without a place, and places without a tensor."""
    wrong: list[str] = []
    for name, words in places.items():
        expected = [sizes[word] for word in words.split()]
        if name in tensors and list(tensors[name].shape) != expected:
            wrong.append(f"{name} is {list(tensors[name].shape)}, not {expected}")
    # Old checkpoints store the rotary frequencies, which follow from the config.
    unknown = [
        name for name in tensors if name not in places and name != left_out and not name.endswith("rotary_emb.inv_freq")
    ]
    missing = [name for name in places if name not in tensors]
    errors: list[InputError] = []
    if wrong:
        errors.append(
            CheckpointError(
                "onnx-shape",
                f"shapes do not follow from config.json: {first_names(wrong)}",
                why="one of both is another model's",
            )
        )
    if unknown:
        errors.append(
            UnsupportedError(
                "onnx-tensor",
                f"{len(unknown)} tensors have no place in the graph: {first_names(unknown)}",
                why="leaving them out would give another model",
            )
        )
    if missing:
        errors.append(
            CheckpointError(
                "onnx-tensor-missing",
                f"{len(missing)} tensors are missing: {first_names(missing)}",
                why="config.json and the architecture need them",
            )
        )
    return errors
