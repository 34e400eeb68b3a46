"""What an encoder with a classification head is made of, as plain data: from its config and tensor headers alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from lora2edge.contracts import IntArray, Task

Activation = Literal["gelu", "gelu-tanh", "relu", "tanh", "silu"]
"""`gelu` is exact; `gelu-tanh` its approximation by a tangent."""
Role = Literal[
    "embedding", "query", "key", "value", "attention-output", "up", "down", "position-key", "position-query", "pooler",
    "classifier",
]  # fmt: skip
"""What a matrix is for. `embedding` makes embeddings as wide as the layers; the last two see one token of a text
where the text is classified."""


@dataclass(frozen=True, slots=True)
class Linear:
    """y = x Wᵀ + b."""

    name: str
    """Tensor of the weight, `[rows, columns]`."""
    bias: str | None
    rows: int
    """Outputs."""
    columns: int
    """Inputs."""
    role: Role
    layer: int | None
    """None outside the layers."""


@dataclass(frozen=True, slots=True)
class Norm:
    """Layer normalization."""

    weight: str
    bias: str
    size: int
    epsilon: float


@dataclass(frozen=True, slots=True)
class Rows:
    """A table of embeddings, `[rows, columns]`."""

    name: str
    rows: int
    columns: int


@dataclass(frozen=True, slots=True)
class Embeddings:
    """Words, positions and token types, added, then normalized."""

    words: Rows
    positions: Rows | None
    """None: the layers alone know of positions."""
    padding: int | None
    """A token id: positions count the other tokens from `padding + 1` on, and it has the position `padding`, as in
    RoBERTa. None: they count from 0."""
    types: Rows | None
    """With one row every token is of its type; with more, token types are an input."""
    projection: Linear | None
    """Where the embedding is not as wide as the layers."""
    norm: Norm


@dataclass(frozen=True, slots=True)
class Relative:
    """Disentangled attention (DeBERTa, https://arxiv.org/abs/2006.03654): scores get a term of content to position
    and one of position to content, by the distance between query and key."""

    embeddings: Rows
    """Two halves, of keys behind and of keys in front."""
    norm: Norm | None
    buckets: int
    """Of distances on each side; the far ones share them. 0: each distance has its own."""
    farthest: int
    """Distance that the last bucket ends with."""
    content_to_position: bool
    position_to_content: bool

    def row(self, most: int) -> IntArray:
        """Row of the embeddings for each distance query − key from `most` down to `-most`: int64 `[2 most + 1]`."""
        distance = np.arange(most, -most - 1, -1, dtype=np.int64)
        half = self.embeddings.rows // 2
        if self.buckets:
            # In float32 like transformers' make_log_bucket_position, so that rounding falls the same way.
            middle = self.buckets // 2
            length = np.maximum(np.abs(distance), middle)
            share = np.log((length / middle).astype(np.float32)) / np.log(np.float32((self.farthest - 1) / middle))
            far = np.ceil(share * np.float32(middle - 1)) + np.float32(middle)
            distance = np.where(length <= middle, distance, (far * np.sign(distance)).astype(np.int64))
        return np.clip(distance + half, 0, 2 * half - 1)


@dataclass(frozen=True, slots=True)
class Layer:
    """Attention and feed-forward network, each followed by a norm of its sum with what it was given."""

    query: Linear
    key: Linear
    value: Linear
    output: Linear
    attention_norm: Norm
    up: Linear
    down: Linear
    norm: Norm
    position_key: Linear | None = None
    """Of the relative embeddings; None: `key` serves."""
    position_query: Linear | None = None


@dataclass(frozen=True, slots=True)
class Convolution:
    """Over the embeddings of neighbouring tokens, 0 beyond a text's ends; activated, and normalized with the first
    layer's output added (DeBERTa-v2)."""

    weight: str
    """`[width, width / groups, kernel]`."""
    bias: str
    size: int
    """Width."""
    kernel: int
    """Tokens, an odd number."""
    groups: int
    activation: Activation
    norm: Norm


@dataclass(frozen=True, slots=True)
class Head:
    """Class scores, of the first token or of every one."""

    dense: Linear | None
    activation: Activation
    """Behind `dense`."""
    classifier: Linear


@dataclass(frozen=True, slots=True)
class Encoder:
    """A whole model. Nothing in it says how it is computed."""

    family: str
    """Its `model_type`."""
    task: Task
    """`sequence-classification` or `token-classification`."""
    embeddings: Embeddings
    layers: tuple[Layer, ...]
    heads: int
    scale: float
    """Of the attention scores."""
    activation: Activation
    relative: Relative | None
    convolution: Convolution | None
    head: Head
    max_length: int
    """Tokens of a text."""

    @property
    def labels(self) -> int:
        """Number of classes."""
        return self.head.classifier.rows

    @property
    def hidden(self) -> int:
        """Width of the layers."""
        return self.embeddings.norm.size

    @property
    def has_token_types(self) -> bool:
        """Whether token types are an input."""
        return self.embeddings.types is not None and self.embeddings.types.rows > 1

    @property
    def matrices(self) -> tuple[Linear, ...]:
        """Every linear layer's weight, in the order in which they are used."""
        return tuple(linear for linear in self._linears() if linear is not None)

    def _linears(self) -> Iterable[Linear | None]:
        yield self.embeddings.projection
        for layer in self.layers:
            yield from (layer.query, layer.key, layer.value, layer.position_key, layer.position_query)
            yield from (layer.output, layer.up, layer.down)
        yield from (self.head.dense, self.head.classifier)
