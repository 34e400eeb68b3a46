"""Reads which encoder a checkpoint is: BERT, RoBERTa and its kin, DistilBERT, DeBERTa-v2 and v3, with a classifier.

As transformers 5 computes them. Whatever is not known is refused, and so is a tensor that has no place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from lora2edge.graph.encoder import (
    Activation,
    Convolution,
    Embeddings,
    Encoder,
    Head,
    Layer,
    Relative,
)
from lora2edge.graph.encoder_given import Given, unknown_model

if TYPE_CHECKING:
    from lora2edge.contracts import Task, TensorInfo

TASKS: tuple[Task, ...] = ("sequence-classification", "token-classification")
_LONGEST = 1 << 16
"""Tokens of a text where no table of positions bounds them: attention to all of them is slow long before."""


def describe_encoder(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], task: Task) -> Encoder:
    """The encoder that `config` and `tensors` speak of; reads no weight.

    Raises UnsupportedError `onnx-architecture` for what is not known (another kind of model may still be written by
    another tool), CheckpointError for a checkpoint that is not whole; Refusals for several of them.
    """
    family = str(config.get("model_type"))
    if family not in _FAMILIES:
        raise unknown_model(f"model_type is {family}", f"known encoders: {', '.join(sorted(_FAMILIES))}")
    if task not in TASKS:
        raise unknown_model(f"the {family} checkpoint is for {task}", f"encoders are written for {' and '.join(TASKS)}")
    given = Given(config, tensors, task)
    found = _FAMILIES[family](given)
    given.finish()
    return found


def _bert(given: Given) -> Encoder:
    """https://arxiv.org/abs/1810.04805"""
    return _like_bert(given, "bert", None)


def _roberta(given: Given) -> Encoder:
    """https://arxiv.org/abs/1907.11692; XLM-RoBERTa and CamemBERT differ by their vocabularies and training."""
    return _like_bert(given, "roberta", given.whole("pad_token_id", 1, least=0))


def _like_bert(given: Given, prefix: str, padding: int | None) -> Encoder:
    hidden, heads = given.whole("hidden_size", 768), given.whole("num_attention_heads", 12)
    epsilon, places = given.number("layer_norm_eps", 1e-12), given.whole("max_position_embeddings", 512)
    kind = given.config.get("position_embedding_type")
    if kind not in (None, "absolute"):
        given.refuse(f"position_embedding_type is {kind}", "positions are added to the embeddings (absolute) only")
    if given.flag("is_decoder", False) or given.flag("add_cross_attention", False):
        given.refuse("is_decoder or add_cross_attention is true", "each token of an encoder sees all others")
    _check_heads(given, hidden, heads)
    at = f"{prefix}.embeddings"
    embeddings = Embeddings(
        given.table(f"{at}.word_embeddings", 0, hidden),
        given.table(f"{at}.position_embeddings", places, hidden),
        padding,
        given.table(f"{at}.token_type_embeddings", given.whole("type_vocab_size", 2), hidden),
        None,
        given.norm(f"{at}.LayerNorm", hidden, epsilon),
    )
    layers = [
        _layer(given, f"{prefix}.encoder.layer.{number}", number, ("query", "key", "value"), hidden, epsilon)
        for number in given.layers("num_hidden_layers", 12)
    ]
    head = (
        _head(given, "classifier", hidden, None, "tanh")
        if not given.is_sequence
        else _head(given, "classifier", hidden, f"{prefix}.pooler.dense", "tanh")
        if padding is None
        else _head(given, "classifier.out_proj", hidden, "classifier.dense", "tanh")
    )
    return _encoder(
        given, embeddings, layers, heads, head, max_length=places if padding is None else places - padding - 1
    )


def _distilbert(given: Given) -> Encoder:
    """https://arxiv.org/abs/1910.01108"""
    hidden, heads, wide = given.whole("dim", 768), given.whole("n_heads", 12), given.whole("hidden_dim", 3072)
    places, epsilon = given.whole("max_position_embeddings", 512), 1e-12
    _check_heads(given, hidden, heads)
    at = "distilbert.embeddings"
    embeddings = Embeddings(
        given.table(f"{at}.word_embeddings", 0, hidden),
        given.table(f"{at}.position_embeddings", places, hidden),
        None,
        None,
        None,
        given.norm(f"{at}.LayerNorm", hidden, epsilon),
    )
    layers = []
    for number in given.layers("n_layers", 6):
        at = f"distilbert.transformer.layer.{number}"
        layers.append(
            Layer(
                query=given.linear(f"{at}.attention.q_lin", hidden, hidden, "query", number),
                key=given.linear(f"{at}.attention.k_lin", hidden, hidden, "key", number),
                value=given.linear(f"{at}.attention.v_lin", hidden, hidden, "value", number),
                output=given.linear(f"{at}.attention.out_lin", hidden, hidden, "attention-output", number),
                attention_norm=given.norm(f"{at}.sa_layer_norm", hidden, epsilon),
                up=given.linear(f"{at}.ffn.lin1", wide, hidden, "up", number),
                down=given.linear(f"{at}.ffn.lin2", hidden, wide, "down", number),
                norm=given.norm(f"{at}.output_layer_norm", hidden, epsilon),
            )
        )
    head = _head(given, "classifier", hidden, "pre_classifier" if given.is_sequence else None, "relu")
    return _encoder(given, embeddings, layers, heads, head, max_length=places, activation="activation")


def _deberta(given: Given) -> Encoder:
    """DeBERTa-v2, https://arxiv.org/abs/2006.03654, and v3, https://arxiv.org/abs/2111.09543: one graph."""
    hidden, heads = given.whole("hidden_size", 1536), given.whole("num_attention_heads", 24)
    epsilon, places = given.number("layer_norm_eps", 1e-7), given.whole("max_position_embeddings", 512)
    width, kinds = given.whole("embedding_size", hidden), given.whole("type_vocab_size", 0, least=0)
    if given.config.get("attention_head_size") not in (None, hidden // heads):
        given.refuse("attention_head_size is set", f"heads of {hidden} / {heads} values are written")
    _check_heads(given, hidden, heads)
    at = "deberta.embeddings"
    embeddings = Embeddings(
        given.table(f"{at}.word_embeddings", 0, width),
        given.table(f"{at}.position_embeddings", places, width) if given.flag("position_biased_input", True) else None,
        None,
        given.table(f"{at}.token_type_embeddings", kinds, width) if kinds else None,
        given.linear(f"{at}.embed_proj", hidden, width, "embedding", bias=False) if width != hidden else None,
        given.norm(f"{at}.LayerNorm", hidden, epsilon),
    )
    terms = _attention_terms(given)
    relative = _relative(given, terms, hidden, epsilon, places) if given.flag("relative_attention", False) else None
    own = () if relative is None or given.flag("share_att_key", False) else terms
    names = ("query_proj", "key_proj", "value_proj")
    layers = [
        _layer(given, f"deberta.encoder.layer.{number}", number, names, hidden, epsilon, own)
        for number in given.layers("num_hidden_layers", 24)
    ]
    head = (
        _head(given, "classifier", hidden, "pooler.dense", given.activation("pooler_hidden_act"))
        if given.is_sequence
        else _head(given, "classifier", hidden, None, "gelu")
    )
    scale = 1 / math.sqrt(max(hidden // heads, 1) * (1 + len(terms)))
    uses_relative = relative if terms else None
    return _encoder(
        given, embeddings, layers, heads, head, max_length=min(places, _LONGEST), scale=scale, relative=uses_relative,
        convolution=_convolution(given, hidden, epsilon),
    )  # fmt: skip


def _convolution(given: Given, hidden: int, epsilon: float) -> Convolution | None:
    kernel, groups = given.whole("conv_kernel_size", 0, least=0), given.whole("conv_groups", 1)
    if not kernel:
        return None
    if kernel % 2 == 0 or hidden % groups:
        given.refuse(f"conv_kernel_size is {kernel}, conv_groups {groups}", "as many tokens and values must come out")
        groups = 1
    at = "deberta.encoder.conv"
    return Convolution(
        given.take(f"{at}.conv.weight", hidden, hidden // groups, kernel),
        given.take(f"{at}.conv.bias", hidden),
        hidden,
        kernel,
        groups,
        given.activation("conv_act", "tanh"),
        given.norm(f"{at}.LayerNorm", hidden, epsilon),
    )


def _attention_terms(given: Given) -> tuple[str, ...]:
    """`c2p` and `p2c` where they are on."""
    kinds = given.config.get("pos_att_type") or []
    kinds = [kind.strip() for kind in kinds.lower().split("|")] if isinstance(kinds, str) else kinds
    if not isinstance(kinds, list) or any(kind not in ("c2p", "p2c") for kind in kinds):
        given.refuse(f"pos_att_type is {given.config.get('pos_att_type')}", "known: c2p, p2c")
        return ()
    return tuple(kind for kind in ("c2p", "p2c") if kind in kinds)


def _relative(given: Given, terms: tuple[str, ...], hidden: int, epsilon: float, places: int) -> Relative:
    buckets = given.whole("position_buckets", -1, least=-1)
    farthest = given.whole("max_relative_positions", -1, least=-1)
    farthest = places if farthest < 1 else farthest
    if 0 < buckets < 4 or (buckets > 0 and farthest <= buckets // 2 + 1):
        given.refuse(f"position_buckets is {buckets}, distances reach {farthest}", "no distance would share a bucket")
        buckets = 0
    half = buckets if buckets > 0 else farthest
    norms = str(given.config.get("norm_rel_ebd") or "none").lower().split("|")
    return Relative(
        given.table("deberta.encoder.rel_embeddings", 2 * half, hidden),
        given.norm("deberta.encoder.LayerNorm", hidden, epsilon)
        if "layer_norm" in [name.strip() for name in norms]
        else None,
        max(buckets, 0),
        farthest,
        "c2p" in terms,
        "p2c" in terms,
    )


def _layer(given: Given, at: str, number: int, names: tuple[str, str, str], hidden: int, epsilon: float,
           own: tuple[str, ...] = ()) -> Layer:  # fmt: skip
    """A layer as BERT names it. `own`: terms of disentangled attention with matrices of their own."""
    wide = given.whole("intermediate_size", 4 * hidden)
    query, key, value = (f"{at}.attention.self.{name}" for name in names)
    self = f"{at}.attention.self"
    return Layer(
        query=given.linear(query, hidden, hidden, "query", number),
        key=given.linear(key, hidden, hidden, "key", number),
        value=given.linear(value, hidden, hidden, "value", number),
        output=given.linear(f"{at}.attention.output.dense", hidden, hidden, "attention-output", number),
        attention_norm=given.norm(f"{at}.attention.output.LayerNorm", hidden, epsilon),
        up=given.linear(f"{at}.intermediate.dense", wide, hidden, "up", number),
        down=given.linear(f"{at}.output.dense", hidden, wide, "down", number),
        norm=given.norm(f"{at}.output.LayerNorm", hidden, epsilon),
        position_key=given.linear(f"{self}.pos_key_proj", hidden, hidden, "position-key", number)
        if "c2p" in own
        else None,
        position_query=given.linear(f"{self}.pos_query_proj", hidden, hidden, "position-query", number)
        if "p2c" in own
        else None,
    )


def _head(given: Given, classifier: str, hidden: int, dense: str | None, activation: Activation) -> Head:
    pooler = given.linear(dense, hidden, hidden, "pooler") if dense else None
    return Head(pooler, activation, given.classifier(classifier, hidden))


def _encoder(
    given: Given,
    embeddings: Embeddings,
    layers: list[Layer],
    heads: int,
    head: Head,
    *,
    max_length: int,
    scale: float | None = None,
    relative: Relative | None = None,
    convolution: Convolution | None = None,
    activation: str = "hidden_act",
) -> Encoder:
    if max_length < 1:
        given.refuse(f"max_position_embeddings leaves {max_length} positions", "a text has at least one token")
    return Encoder(
        family=str(given.config.get("model_type")),
        task=given.task,
        embeddings=embeddings,
        layers=tuple(layers),
        heads=heads,
        scale=scale or 1 / math.sqrt(max(embeddings.norm.size // heads, 1)),
        activation=given.activation(activation),
        relative=relative,
        convolution=convolution,
        head=head,
        max_length=max_length,
    )


def _check_heads(given: Given, hidden: int, heads: int) -> None:
    if hidden % heads:
        given.refuse(f"hidden_size {hidden} is not a multiple of {heads} heads", "each head has as many values")


_FAMILIES: Mapping[str, Callable[[Given], Encoder]] = {
    "bert": _bert,
    "roberta": _roberta,
    "xlm-roberta": _roberta,
    "camembert": _roberta,
    "distilbert": _distilbert,
    "deberta-v2": _deberta,
}
