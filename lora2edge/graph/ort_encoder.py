"""Writes an encoder in ONNX Runtime's dialect: fused attention, norms and activations, and integer matrix products.

Texts are padded on the right; the row sums of the attention mask are their lengths. Where a text is classified, the
last layer computes its first token alone: nothing else of it is looked at.

Activations are `[tokens, width]`, all texts of the batch together. So the sum before a norm stays an Add of its own:
of three dimensions, ONNX Runtime would fuse the two into SkipLayerNormalization, which takes 3.2 ms for 1024 tokens of
768 values where Add and LayerNormalization take 0.6 (1.31, AVX-512), a fifth of an int8 model's time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from lora2edge.errors import UnsupportedError
from lora2edge.graph.builder import (
    BlockFormat,
    ChannelFormat,
    FloatFormat,
    FloatType,
    Format,
    Graph,
    GraphBuilder,
    Part,
)
from lora2edge.graph.encoder import Activation, Convolution, Encoder, Layer, Linear, Norm, Relative, Rows
from lora2edge.graph.ranges import ActivationRange

if TYPE_CHECKING:
    from lora2edge.contracts import IntArray

OPSET = 21


def write_ort_encoder(
    encoder: Encoder,
    formats: Mapping[str, Format],
    *,
    accuracy_level: int = 4,
    activations: Mapping[str, ActivationRange] | None = None,
    float_type: FloatType = "float32",
) -> Graph:
    """The graph of `encoder`.

    Inputs `input_ids`, `attention_mask`, and `token_type_ids` where the model has them, int64 `[batch, sequence]`;
    output `logits`, float32 `[batch, labels]` or `[batch, sequence, labels]`, where those of padding mean nothing.

    `formats`: of each matrix by its name; one that is not named is float. With ChannelFormat the matrix is multiplied
    with unsigned bytes, scaled by its range in `activations`, or, where it has none there, by the range of the batch
    itself. `accuracy_level`: of MatMulNBits; 4 multiplies in integers, 1 in float32. `float_type`: of everything else.
    Raises UnsupportedError `onnx-precision` for bytes in a graph that is not float32.
    """
    if float_type != "float32" and any(isinstance(form, ChannelFormat) for form in formats.values()):
        raise UnsupportedError(
            "onnx-precision",
            f"int8 matrices in a {float_type} graph",
            why="ONNX Runtime multiplies bytes into float32 only",
            hint="choose float32 beside int8, or weights of 8 or 4 bits in blocks",
        )
    return _Writer(encoder, formats, accuracy_level, activations or {}, float_type).write()


class _Writer:
    def __init__(
        self,
        encoder: Encoder,
        formats: Mapping[str, Format],
        accuracy_level: int,
        activations: Mapping[str, ActivationRange],
        float_type: FloatType,
    ) -> None:
        self._encoder, self._formats, self._activations = encoder, formats, activations
        self._accuracy_level = accuracy_level
        self._graph = GraphBuilder(encoder.family, opset=OPSET, float_type=float_type)
        self._bytes: dict[tuple[str, ActivationRange | None], tuple[str, str, str]] = {}
        self._constants: dict[str, str] = {}

    def write(self) -> Graph:
        graph, encoder = self._graph, self._encoder
        names = ["input_ids", "attention_mask", *(["token_type_ids"] if encoder.has_token_types else [])]
        for name in names:
            graph.add_input(name, "int64", ("batch", "sequence"))
        mask = graph.op("Cast", "attention_mask", to="int32")
        self._lengths = graph.op("ReduceSum", mask, self._numbers(1), keepdims=0)
        shape = graph.op("Shape", "input_ids")
        self._longest = graph.op("Shape", "input_ids", start=1, end=2)
        self._by_text = graph.op("Concat", shape, self._numbers(-1), axis=0)
        self._by_head = graph.op("Concat", shape, self._numbers(encoder.heads, -1), axis=0)
        if encoder.relative:
            self._start_relative(encoder.relative)
        is_sequence = encoder.task == "sequence-classification"
        x = embedded = self._embed()
        for number, layer in enumerate(encoder.layers):
            is_convolved = encoder.convolution is not None and number == 0
            first_only = is_sequence and not is_convolved and layer is encoder.layers[-1]
            x = self._layer(x, layer, first_only)
            if encoder.convolution and is_convolved:
                x = self._convolve(embedded, x, encoder.convolution)
        if is_sequence and not first_only:
            x = self._first_tokens(x)
        if encoder.head.dense:
            x = self._activate(self._linear(x, encoder.head.dense), encoder.head.activation)
        logits = self._linear(x, encoder.head.classifier)
        if not is_sequence:
            logits = graph.op("Reshape", logits, self._by_text)
        graph.op("Cast", logits, out="logits", to="float32")
        between = () if is_sequence else ("sequence",)
        graph.add_output("logits", "float32", ("batch", *between, encoder.labels))
        return graph.finish()

    # ------------------------------------------------------------ embeddings

    def _embed(self) -> str:
        graph, given = self._graph, self._encoder.embeddings
        x = graph.op("Gather", self._table(given.words), "input_ids")
        if given.positions:
            x = graph.op("Add", x, self._positions(given.positions, given.padding))
        if given.types:
            types = self._table(given.types)
            x = graph.op("Add", x, graph.op("Gather", types, "token_type_ids") if given.types.rows > 1 else types)
        x = graph.op("Reshape", x, self._numbers(-1, given.words.columns))
        if given.projection:
            x = self._linear(x, given.projection)
        return self._norm(x, given.norm)

    def _positions(self, table: Rows, padding: int | None) -> str:
        graph, name = self._graph, self._table(table)
        if padding is None:
            return graph.op("Slice", name, self._numbers(0), self._longest, self._numbers(0))
        token = graph.constant("padding", padding, "int64")
        counted = graph.op("Cast", graph.op("Not", graph.op("Equal", "input_ids", token)), to="int64")
        number = graph.op("CumSum", counted, graph.constant("one", 1, "int64"))
        return graph.op("Gather", name, graph.op("Add", graph.op("Mul", number, counted), token))

    # ---------------------------------------------------------------- layers

    def _layer(self, x: str, layer: Layer, first_only: bool) -> str:
        asking = self._first_tokens(x) if first_only else x
        attended = self._attention(x, asking, layer, first_only)
        x = self._norm(self._graph.op("Add", self._linear(attended, layer.output), asking), layer.attention_norm)
        wide = self._activate(self._linear(x, layer.up), self._encoder.activation)
        return self._norm(self._graph.op("Add", self._linear(wide, layer.down), x), layer.norm)

    def _first_tokens(self, x: str) -> str:
        """`[batch, width]`"""
        graph = self._graph
        by_text = graph.op("Reshape", x, self._by_text)
        return graph.op("Gather", by_text, graph.constant("first", 0, "int64"), axis=1)

    def _attention(self, x: str, asking: str, layer: Layer, first_only: bool) -> str:
        graph, encoder = self._graph, self._encoder
        query, key, value = (
            self._linear(data, linear) for data, linear in ((asking, layer.query), (x, layer.key), (x, layer.value))
        )
        extra = ""
        if encoder.relative:
            extra = self._relative_scores(query, key, layer, encoder.relative, first_only)
        query = graph.op("Reshape", query, self._numbers(-1, 1, layer.query.rows) if first_only else self._by_text)
        key, value = (graph.op("Reshape", name, self._by_text) for name in (key, value))
        attended = graph.contrib(
            "MultiHeadAttention", query, key, value, "", self._lengths, extra, num_heads=encoder.heads,
            scale=encoder.scale,
        )  # fmt: skip
        return graph.op("Reshape", attended, self._numbers(-1, layer.value.rows))

    def _convolve(self, embedded: str, x: str, convolution: Convolution) -> str:
        graph, size = self._graph, convolution.size
        mask = graph.op("Cast", "attention_mask", to=graph.float_type)
        embedded = graph.op("Mul", embedded, graph.op("Reshape", mask, self._numbers(-1, 1)))
        by_value = graph.op("Transpose", graph.op("Reshape", embedded, self._by_text), perm=[0, 2, 1])
        shape = (size, size // convolution.groups, convolution.kernel)
        weight = graph.floats(convolution.weight, (Part(convolution.weight, 0, size),), shape)
        bias = self._vector(convolution.bias, size)
        pads = [convolution.kernel // 2] * 2
        found = graph.op("Conv", by_value, weight, bias, pads=pads, group=convolution.groups)
        found = graph.op("Reshape", graph.op("Transpose", found, perm=[0, 2, 1]), self._numbers(-1, size))
        return self._norm(graph.op("Add", self._activate(found, convolution.activation), x), convolution.norm)

    # --------------------------------------------------- disentangled attention

    def _start_relative(self, relative: Relative) -> None:
        """The normalized embeddings, and rows of them by distance: 2 n of them for texts of n tokens."""
        graph, most = self._graph, self._encoder.max_length
        self._relative_embeddings = self._table(relative.embeddings)
        if relative.norm:
            self._relative_embeddings = self._norm(self._relative_embeddings, relative.norm)
        rows = relative.row(most)
        middle = self._numbers(most + 1)
        bounds = (graph.op("Sub", middle, self._longest), graph.op("Add", middle, self._longest), self._numbers(0))
        self._falling = graph.op("Slice", graph.constant("distances.falling", rows, "int64"), *bounds)
        self._rising = graph.op("Slice", graph.constant("distances.rising", rows[::-1], "int64"), *bounds)
        last = graph.op("Sub", self._longest, self._numbers(1))
        double = graph.op("Add", self._longest, last)
        self._shift_from = last
        self._shift_to = graph.op("Add", last, graph.op("Mul", self._longest, double))
        self._shift_shape = graph.op("Concat", self._numbers(0, 0), self._longest, double, axis=0)
        self._from_first = graph.op("Slice", self._falling, last, double, self._numbers(0))

    def _relative_scores(self, query: str, key: str, layer: Layer, relative: Relative, first_only: bool) -> str:
        """Both terms, scaled, `[batch, heads, asking, sequence]`."""
        graph, terms = self._graph, []
        if relative.content_to_position:
            linear = layer.position_key or layer.key
            distances = self._from_first if first_only else self._falling
            scores = self._position_scores(query, linear, distances, first_only)
            terms.append(scores if first_only else self._shift(scores))
        if relative.position_to_content:
            scores = self._shift(self._position_scores(key, layer.position_query or layer.query, self._rising, False))
            if first_only:
                scores = graph.op("Slice", scores, *(self._numbers(n) for n in (0, 1, 3)))
            terms.append(graph.op("Transpose", scores, perm=[0, 1, 3, 2]))
        return graph.op("Add", *terms) if len(terms) > 1 else terms[0]

    def _position_scores(self, content: str, linear: Linear, distances: str, first_only: bool) -> str:
        """Scaled products of each token's content with the positions at `distances`.

        The positions are made of weights alone. With standard operators only, ONNX Runtime computes them once, when it
        loads the model; it folds no operator of its own.
        """
        graph = self._graph
        heads = self._encoder.heads
        shape = self._numbers(-1, 1, heads, linear.rows // heads) if first_only else self._by_head
        split = graph.op("Transpose", graph.op("Reshape", content, shape), perm=[0, 2, 1, 3])
        positions = graph.op("MatMul", self._relative_embeddings, self._constant_matrix(linear))
        if linear.bias:
            positions = graph.op("Add", positions, self._vector(linear.bias, linear.rows))
        positions = graph.op("Reshape", positions, self._numbers(0, heads, -1))
        positions = graph.op("Transpose", positions, perm=[1, 0, 2])
        positions = graph.op("Gather", positions, distances, axis=1)
        return graph.contrib("FusedMatMul", split, positions, transB=1, alpha=self._encoder.scale)

    def _constant_matrix(self, linear: Linear) -> str:
        """The weight as floats, `[columns, rows]`, of standard operators."""
        graph = self._graph
        if linear.name not in self._constants:
            form = self._formats.get(linear.name, FloatFormat(graph.float_type))
            if isinstance(form, FloatFormat):
                matrix = graph.op("Transpose", self._weight(linear, form), perm=[1, 0])
            elif isinstance(form, ChannelFormat):
                codes, scales = graph.matrix(linear.name, self._whole(linear), linear.columns, form)
                matrix = graph.op("Mul", graph.op("Cast", codes, to="float32"), scales)
            else:
                matrix = graph.op("Transpose", self._blocks(linear, form), perm=[1, 0])
            self._constants[linear.name] = matrix
        return self._constants[linear.name]

    def _blocks(self, linear: Linear, form: BlockFormat) -> str:
        """A matrix of MatMulNBits as floats, `[rows, columns]`."""
        graph, kind = self._graph, self._graph.float_type
        codes, scales = graph.matrix(linear.name, self._whole(linear), linear.columns, form)
        if form.bits == 4:
            low = graph.op("Mod", codes, graph.constant("sixteen", 16, "uint8"))
            high = graph.op("Div", codes, graph.constant("sixteen", 16, "uint8"))
            pairs = [graph.op("Unsqueeze", half, self._numbers(-1)) for half in (low, high)]
            codes = graph.op("Reshape", graph.op("Concat", *pairs, axis=-1), self._numbers(0, 0, -1))
        zero = graph.constant(f"zero.{form.bits}", 1 << (form.bits - 1), "float32")
        levels = graph.op("Sub", graph.op("Cast", codes, to="float32"), zero)
        exact = graph.op("Cast", graph.op("Unsqueeze", scales, self._numbers(-1)), to="float32")
        rows = graph.op("Reshape", graph.op("Mul", levels, exact), self._numbers(0, -1))
        rows = graph.op("Slice", rows, self._numbers(0), self._numbers(linear.columns), self._numbers(1))
        return graph.op("Cast", rows, to=kind)

    def _shift(self, scores: str) -> str:
        """`[.., n, 2 n]`, where column j of row i is for j + i − n + 1 → `[.., n, n]`, where it is for j.

        Read one row after the other, each row's wanted part begins 2 n − 1 behind that of the row before. That takes a
        fifth of the time of GatherElements.
        """
        graph = self._graph
        flat = graph.op("Reshape", scores, self._numbers(0, 0, -1))
        flat = graph.op("Slice", flat, self._shift_from, self._shift_to, self._numbers(2))
        rows = graph.op("Reshape", flat, self._shift_shape)
        return graph.op("Slice", rows, self._numbers(0), self._longest, self._numbers(3))

    # -------------------------------------------------------------- operators

    def _linear(self, x: str, linear: Linear) -> str:
        """x Wᵀ + b of `[tokens, columns]`."""
        graph, form = self._graph, self._formats.get(linear.name, FloatFormat(self._graph.float_type))
        bias = self._vector(linear.bias, linear.rows) if linear.bias else ""
        if isinstance(form, FloatFormat):
            return graph.op("Gemm", x, self._weight(linear, form), bias, transB=1)
        codes, scales = graph.matrix(linear.name, self._whole(linear), linear.columns, form)
        if isinstance(form, BlockFormat):
            return graph.contrib(
                "MatMulNBits", x, codes, scales, "", "", bias, K=linear.columns, N=linear.rows, bits=form.bits,
                block_size=form.block, accuracy_level=self._accuracy_level,
            )  # fmt: skip
        data, scale, zero = self._quantized(x, linear)
        return graph.contrib("MatMulIntegerToFloat", data, codes, scale, scales, zero, "", bias)

    def _weight(self, linear: Linear, form: FloatFormat) -> str:
        """`[rows, columns]` floats, as stored."""
        graph = self._graph
        weight = graph.floats(linear.name, self._whole(linear), (linear.rows, linear.columns), dtype=form.dtype)
        return weight if form.dtype == graph.float_type else graph.op("Cast", weight, to=graph.float_type)

    @staticmethod
    def _whole(linear: Linear) -> tuple[Part, ...]:
        return (Part(linear.name, 0, linear.rows),)

    def _vector(self, name: str, size: int) -> str:
        return self._graph.floats(name, (Part(name, 0, size),), (size,))

    def _quantized(self, x: str, linear: Linear) -> tuple[str, str, str]:
        """Unsigned bytes of `x`, their scale and zero: signed ones take several times as long on x86."""
        span = self._activations.get(linear.name)
        if (x, span) not in self._bytes:
            graph = self._graph
            if span is None:
                data, scale, zero = graph.ops("DynamicQuantizeLinear", x, out=3)
            else:
                scale = graph.constant(f"{linear.name}.input_scale", span.scale, "float32")
                zero = graph.constant(f"{linear.name}.input_zero", span.zero, "uint8")
                data = graph.op("QuantizeLinear", x, scale, zero)
            self._bytes[x, span] = data, scale, zero
        return self._bytes[x, span]

    def _activate(self, x: str, kind: Activation) -> str:
        graph = self._graph
        if kind == "gelu":
            return graph.contrib("Gelu", x)
        if kind == "gelu-tanh":
            return graph.contrib("FastGelu", x)
        if kind == "silu":
            return graph.op("Mul", x, graph.op("Sigmoid", x))
        return graph.op({"relu": "Relu", "tanh": "Tanh"}[kind], x)

    def _norm(self, x: str, norm: Norm) -> str:
        ends = (self._vector(name, norm.size) for name in (norm.weight, norm.bias))
        return self._graph.op("LayerNormalization", x, *ends, axis=-1, epsilon=norm.epsilon)

    def _table(self, rows: Rows) -> str:
        return self._graph.floats(rows.name, (Part(rows.name, 0, rows.rows),), (rows.rows, rows.columns))

    def _numbers(self, *values: int) -> str:
        """A constant vector of int64."""
        array: IntArray = np.array(values, np.int64)
        return self._graph.constant(f"numbers.{'.'.join(map(str, values))}", array, "int64")
