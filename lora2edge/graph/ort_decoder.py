"""A decoder's graph in ONNX Runtime's dialect: opset 21 and its own operators, which are what makes it fast.

Inputs: `input_ids` int64 `[batch, sequence]`; `attention_mask` int64 `[batch, total]`, as wide as the longest row with
its new tokens, whose row sums are the lengths: padding is on the right; `past_key_values.{layer}.key` and `.value`
`[batch, kv_heads, past, head_dim]`; `logits_positions` int64 `[rows, kept]`, an initializer that may be overridden:
rows is 1 or batch, a value below 0 means the last real token of the row. Outputs: `logits` float32 `[batch, kept,
vocabulary]`; `present.{layer}.key` and `.value`, which may be bound to the buffers of the past. Several tokens on a
cache: one row at a time.
"""

from __future__ import annotations

from collections.abc import Mapping

from lora2edge.errors import UnsupportedError
from lora2edge.graph.builder import FloatType, Format, Graph, GraphBuilder, Part
from lora2edge.graph.decoder import Decoder, Layer, Linear
from lora2edge.graph.ort_linear import Products
from lora2edge.graph.rope import Rope

OPSET = 21


def write_ort_decoder(
    decoder: Decoder, formats: Mapping[str, Format], *, accuracy_level: int = 4, float_type: FloatType = "float32"
) -> Graph:
    """The decoder's graph; `formats` by tensor, float32 for those that it does not name.

    `accuracy_level`: of MatMulNBits; 4 multiplies int8 activations, 1 float32 ones. `float_type`: of activations and
    cache. Raises UnsupportedError `onnx-config`, TargetError `onnx-format`.
    """
    if decoder.head_dim % 8:
        raise UnsupportedError(
            "onnx-config", f"heads are {decoder.head_dim} wide", why="GroupQueryAttention takes multiples of 8"
        )
    return _Writer(decoder, formats, accuracy_level, float_type).write()


class _Writer:
    """Writes one graph, from the ids to the logits."""

    def __init__(
        self, decoder: Decoder, formats: Mapping[str, Format], accuracy_level: int, float_type: FloatType
    ) -> None:
        self.decoder = decoder
        self.graph = GraphBuilder("decoder", opset=OPSET, float_type=float_type)
        self.products = Products(self.graph, formats, accuracy_level)
        self.ropes: list[Rope] = []
        self.turned: set[str] = set()
        self.norms = 0

    def write(self) -> Graph:
        decoder, graph = self.decoder, self.graph
        graph.add_input("input_ids", "int64", ("batch", "sequence"))
        graph.add_input("attention_mask", "int64", ("batch", "total"))
        graph.constant("logits_positions", [[-1]], "int64")
        # onnxruntime-genai allocates a row for every token unless the shape says that there is one.
        graph.add_output("logits", "float32", ("batch", 1, decoder.vocab_rows))
        self._lengths()
        # The residual stream is skip + delta; the addition is part of the next norm.
        skip, delta = self._embedding(), ""
        for index, layer in enumerate(decoder.layers):
            x, skip = self._norm(layer.input_norm, skip, delta)
            delta = self._optional_norm(layer.attention_norm, self._attention(index, layer, x))
            x, skip = self._norm(layer.middle_norm, skip, delta)
            delta = self._optional_norm(layer.feedforward_norm, self._feedforward(index, layer, x))
        self._logits(skip, delta)
        graph.add_input("logits_positions", "int64", ("rows", "kept"))
        for name in ("switch_length", "recompute_length"):
            if (length := getattr(decoder, name)) is not None:
                graph.note(name, length)
        return graph.finish()

    def _lengths(self) -> None:
        """What all layers share: `lengths` `[batch]`, GroupQueryAttention's counts, where the logits are taken."""
        graph = self.graph
        zero, one, last = (graph.constant(name, [value], "int64") for name, value in
                           (("zero", 0), ("one", 1), ("last_axis", -1)))  # fmt: skip
        graph.op("ReduceSum", "attention_mask", one, out="lengths", keepdims=0)
        graph.op("Cast", graph.op("Sub", "lengths", one), out="seqlens_k", to="int32")
        width = graph.op("Shape", "attention_mask", start=1, end=2)
        scalar = graph.constant("scalar", [], "int64")
        graph.op("Reshape", graph.op("Cast", width, to="int32"), scalar, out="total_length")
        graph.op("Shape", "input_ids", out="new_tokens", start=1, end=2)
        end = graph.op("Sub", graph.op("Min", "lengths", "new_tokens"), one)
        chosen = graph.op(
            "Where", graph.op("Less", "logits_positions", zero), graph.op("Unsqueeze", end, last), "logits_positions"
        )
        # One row of positions serves all rows of the batch.
        batch = graph.op("Shape", "input_ids", start=0, end=1)
        spread = graph.op("Expand", chosen, graph.op("Concat", batch, one, axis=0))
        graph.op("Unsqueeze", spread, last, out="kept_tokens")

    def _embedding(self) -> str:
        decoder = self.decoder
        tied = decoder.is_tied
        name = "head" if tied else "embedding"
        table = decoder.head if tied else Linear(decoder.embedding, 0, decoder.vocab_rows, decoder.hidden)
        x = self.products.embedding("input_ids", name, table, is_shared=tied)
        if decoder.embedding_scale is None:
            return x
        return self.graph.op("Mul", x, self.products.scalar("embedding_scale", decoder.embedding_scale))

    def _norm(self, tensor: str, skip: str, delta: str, *, is_last: bool = False) -> tuple[str, str]:
        """The norm of skip + delta, and that sum, which the last one does not need."""
        if not delta:
            return self._optional_norm(tensor, skip), skip
        self.norms += 1
        out = (f"norm_{self.norms}", "", "", "" if is_last else f"skip_{self.norms}")
        self.graph.ops(
            "SkipSimplifiedLayerNormalization", skip, delta, self._norm_weight(tensor, self.decoder.hidden), out=out,
            domain="com.microsoft", epsilon=self.decoder.epsilon,
        )  # fmt: skip
        return out[0], out[3]

    def _optional_norm(self, tensor: str | None, x: str, width: int = 0) -> str:
        if tensor is None:
            return x
        return self.graph.op(
            "SimplifiedLayerNormalization", x, self._norm_weight(tensor, width or self.decoder.hidden), axis=-1,
            epsilon=self.decoder.epsilon, stash_type=1,
        )  # fmt: skip

    def _norm_weight(self, tensor: str, width: int) -> str:
        return self.graph.floats(tensor, [Part(tensor, 0, width)], (width,), shift=self.decoder.norm_shift)

    def _attention(self, index: int, layer: Layer, x: str) -> str:
        decoder, graph = self.decoder, self.graph
        past, present = (
            [f"{word}.{index}.{kind}" for kind in ("key", "value")] for word in ("past_key_values", "present")
        )
        for names, add, dimension in ((past, graph.add_input, "past"), (present, graph.add_output, "present")):
            for name in names:
                add(name, graph.float_type, ("batch", decoder.kv_heads, dimension, decoder.head_dim))
        # GroupQueryAttention cannot choose LongRoPE's factors by each row's length, and turns multiples of 16 only.
        turned_apart = bool(layer.rope.long_frequencies or layer.rope.dimensions % 16 or decoder.head_dim % 16)
        packed = self._packed(index, layer, x)
        if packed and (layer.query_norm or turned_apart):
            sizes = [part.rows for part in (layer.query, layer.key, layer.value)]
            parts = graph.ops("Split", packed, graph.constant("qkv_sizes", sizes, "int64"), out=3, axis=-1)
        elif packed:
            parts = (packed, "", "")
        else:
            parts = tuple(
                self.products.linear(x, f"layers.{index}.{name}", [part])
                for name, part in (("query", layer.query), ("key", layer.key), ("value", layer.value))
            )
        query, key, value = parts
        if layer.query_norm:
            query = self._head_norm(layer.query_norm, query, decoder.heads)
        if layer.key_norm:
            key = self._head_norm(layer.key_norm, key, decoder.kv_heads)
        cosines, sines = self._tables(layer.rope)
        if turned_apart:
            query, key = (
                self._turn(part, layer.rope, heads, cosines, sines)
                for part, heads in ((query, decoder.heads), (key, decoder.kv_heads))
            )
            cosines = sines = ""
        more = {"softcap": decoder.attention_softcap} if decoder.attention_softcap else {}
        if layer.window:
            more["local_window_size"] = layer.window
        mixed = graph.ops(
            "GroupQueryAttention", query, key, value, *past, "seqlens_k", "total_length", cosines, sines,
            out=(f"attention_{index}", *present), domain="com.microsoft", num_heads=decoder.heads,
            kv_num_heads=decoder.kv_heads, scale=decoder.attention_scale, do_rotary=int(not turned_apart),
            rotary_interleaved=0, **more,
        )[0]  # fmt: skip
        return self.products.linear(mixed, f"layers.{index}.output", [layer.output])

    def _packed(self, index: int, layer: Layer, x: str) -> str:
        """Query, key and value of one product; "" where their formats differ."""
        parts = (layer.query, layer.key, layer.value)
        if len({self.products.format(part.tensor) for part in parts}) > 1:
            return ""
        return self.products.linear(x, f"layers.{index}.qkv", parts)

    def _head_norm(self, tensor: str, x: str, heads: int) -> str:
        """The norm of each head. GroupQueryAttention's own is not for CPUs."""
        graph, width = self.graph, self.decoder.head_dim
        split = graph.op("Reshape", x, graph.constant("heads", [0, 0, -1, width], "int64"))
        normed = self._optional_norm(tensor, split, width)
        return graph.op("Reshape", normed, graph.constant(f"heads_{heads}", [0, 0, heads * width], "int64"))

    def _tables(self, rope: Rope) -> tuple[str, str]:
        """Cosines and sines, one pair for all layers that turn alike."""
        if rope not in self.ropes:
            self.ropes.append(rope)
        index = self.ropes.index(rope)
        shape = (rope.rows(self.decoder.context_length), rope.dimensions // 2)
        cosines = self.graph.table(f"cosines.{index}", shape, rope.cosines)
        return cosines, self.graph.table(f"sines.{index}", shape, rope.sines)

    def _turn(self, x: str, rope: Rope, heads: int, cosines: str, sines: str) -> str:
        """Query or key, turned before GroupQueryAttention sees it."""
        width = rope.dimensions if rope.dimensions < self.decoder.head_dim else 0
        return self.graph.contrib(
            "RotaryEmbedding",
            x,
            self._table_rows(rope),
            cosines,
            sines,
            interleaved=0,
            num_heads=heads,
            rotary_embedding_dim=width,
        )

    def _table_rows(self, rope: Rope) -> str:
        """Rows of the tables for this call's tokens, `[batch, sequence]`; the long factors' follow the short ones'."""
        graph, name = self.graph, f"turns.{self.ropes.index(rope)}"
        if name in self.turned:
            return name
        self.turned.add(name)
        before = graph.op("Max", graph.op("Sub", "lengths", "new_tokens"), "zero")
        if rope.long_frequencies:
            switch = graph.constant(f"{name}.switch", [rope.switch], "int64")
            shift = graph.op("Where", graph.op("Greater", "lengths", switch), switch, "zero")
            before = graph.op("Add", before, shift)
        first = graph.op("Unsqueeze", before, "last_axis")
        numbers = graph.op(
            "Range",
            graph.constant("from", 0, "int64"),
            graph.op("Squeeze", "new_tokens"),
            graph.constant("step", 1, "int64"),
        )
        return graph.op("Add", first, numbers, out=name)

    def _feedforward(self, index: int, layer: Layer, x: str) -> str:
        graph, products = self.graph, self.products
        prefix = f"layers.{index}."
        gate = products.linear(x, f"{prefix}gate", [layer.gate])
        up = products.linear(x, f"{prefix}up", [layer.up])
        if self.decoder.activation == "silu":
            active = graph.op("Mul", gate, graph.op("Sigmoid", gate))
        else:
            how = "tanh" if self.decoder.activation == "gelu_tanh" else "none"
            active = graph.op("Gelu", gate, approximate=how)
        return products.linear(graph.op("Mul", active, up), f"{prefix}down", [layer.down])

    def _logits(self, skip: str, delta: str) -> None:
        """Of the tokens that are asked for: the others are dropped before the last norm."""
        decoder, graph = self.decoder, self.graph
        skip, delta = (graph.op("GatherND", part, "kept_tokens", batch_dims=1) for part in (skip, delta))
        x, _ = self._norm(decoder.norm, skip, delta, is_last=True)
        cap, is_plain = decoder.logit_softcap, graph.float_type == "float32"
        y = self.products.linear(x, "head", [decoder.head], out="logits" if is_plain and not cap else "")
        if not is_plain:
            y = graph.op("Cast", y, out="" if cap else "logits", to="float32")
        if cap:
            limit = graph.constant("logit_softcap", cap, "float32")
            graph.op("Mul", graph.op("Tanh", graph.op("Div", y, limit)), limit, out="logits")
