"""A checkpoint's tensors and config as llama.cpp's: names, order, shapes, metadata. Reads no weight.

A tensor without a place is an error, and so is a place without a tensor.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora2edge.backends.gguf.architectures import Architecture, Config, find_architecture
from lora2edge.backends.gguf.container import Metadata
from lora2edge.backends.gguf.mix import Shape, order_key
from lora2edge.backends.gguf.rope import Rope, read_rope, rotary_fraction
from lora2edge.checkpoint.tying import says_tied
from lora2edge.checkpoint.values import count, first_names, need
from lora2edge.contracts import TensorInfo
from lora2edge.errors import CheckpointError, InputError, UnsupportedError, refuse

if TYPE_CHECKING:
    from lora2edge.contracts import FloatArray


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

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


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


def plan_model(config: Config, tensors: Mapping[str, TensorInfo], context_length: int | None = None) -> ModelPlan:
    """What the file will hold. Reads no weight; raises every refusal at once.

    `context_length` replaces the one that follows from the config.
    """
    architecture = find_architecture(config)
    config = {**architecture.defaults, **config}
    errors: list[InputError] = []
    shape = _shape(config, len(tensors))
    hidden = count(config, "hidden_size")
    head_dim = hidden // shape.heads if config.get("head_dim") is None else count(config, "head_dim")
    sizes = _sizes(config, shape, head_dim)
    errors += _assumptions(config, architecture, head_dim, sizes["h"] // shape.heads)
    context, notes = _context(config, architecture, context_length)
    rotated = int(head_dim * rotary_fraction(config))
    theta = float(architecture.defaults.get("rope_theta", 10000.0))
    rope = Rope({})
    try:
        rope = read_rope(
            config, architecture.ropes, rotated, theta=theta, context=count(config, "max_position_embeddings")
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
        f"{prefix}.attention.layer_norm_rms_epsilon": ("f32", float(need(config, "rms_norm_eps"))),
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


def _shape(config: Config, most_layers: int) -> Shape:
    layers, heads = count(config, "num_hidden_layers"), count(config, "num_attention_heads")
    kv_heads = count(config, "num_key_value_heads") if config.get("num_key_value_heads") is not None else heads
    if heads % kv_heads or layers > most_layers:
        raise CheckpointError(
            "config-key",
            f"config.json has {layers} layers, {heads} attention heads and {kv_heads} key-value heads",
            why=f"heads must be a multiple of key-value heads, and there are {most_layers} tensors",
        )
    return Shape(layers, heads, kv_heads, is_llama=find_architecture(config).name == "llama")


def _sizes(config: Config, shape: Shape, head_dim: int) -> dict[str, int]:
    """The words of the tables' shapes."""
    hidden, inner, vocab = (count(config, key) for key in ("hidden_size", "intermediate_size", "vocab_size"))
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
    positions = count(config, "max_position_embeddings")
    window = config.get("sliding_window")
    if architecture.name.startswith("gemma") or config.get("use_sliding_window") is False:
        window = None
    if "use_sliding_window" not in config and architecture.name.startswith("qwen"):
        window = None  # transformers' own default
    if "sliding_attention" not in (config.get("layer_types") or ["sliding_attention"]):
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
    tied = says_tied(config) is True
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
    wrong: list[str] = []
    for name, (place, words) in places.items():
        found = tensors.get(name)
        expected = tuple(sizes[word] for word in words.split())
        if found is None:
            continue
        if found.shape != expected:
            wrong.append(f"{name} is {list(found.shape)}, not {list(expected)}")
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
    if wrong:
        errors.append(
            CheckpointError(
                "gguf-shape",
                f"shapes do not follow from config.json: {first_names(wrong)}",
                why="one of both is another model's",
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
                f"{len(unknown)} tensors have no place in llama.cpp's {architecture.name}: {first_names(unknown)}",
                why="leaving them out would give another model",
            )
        )
    if missing:
        errors.append(
            CheckpointError(
                "gguf-tensor-missing",
                f"{len(missing)} tensors are missing: {first_names(missing)}",
                why="config.json and the architecture need them",
            )
        )
    return errors


def layer_of(name: str) -> int | None:
    """Layer number in a tensor's name, GGUF or checkpoint; None outside the layers."""
    found = re.search(r"(?:^|\.)(?:blk|layers)\.(\d+)\.", name)
    return int(found[1]) if found else None
