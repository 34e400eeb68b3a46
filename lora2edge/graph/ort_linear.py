"""Matrix products and embeddings in ONNX Runtime's dialect, whatever format their weights have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lora2edge.errors import TargetError
from lora2edge.graph.builder import (
    BlockFormat,
    ChannelFormat,
    FloatFormat,
    FloatType,
    Format,
    GraphBuilder,
    Part,
)
from lora2edge.graph.decoder import Linear

_PLAIN = FloatFormat("float32")


class Products:
    """Adds products with weights to a graph; a weight that is there is used again."""

    def __init__(self, graph: GraphBuilder, formats: Mapping[str, Format], accuracy_level: int) -> None:
        self._graph = graph
        self._formats = formats
        self._accuracy_level = accuracy_level
        self._made: dict[tuple[str, str], tuple[str, ...]] = {}
        """Nodes that several products share, by what they do and what to."""

    def format(self, tensor: str) -> Format:
        """The tensor's format; float32 where none is given."""
        return self._formats.get(tensor, _PLAIN)

    def linear(self, x: str, name: str, parts: Sequence[Linear], out: str = "") -> str:
        """`x` `[…, columns]` times the stacked rows of `parts`, which have one format: `[…, rows]`.

        `name`: of the weight in the graph.
        """
        graph, form = self._graph, self.format(parts[0].tensor)
        stacked = [Part(part.tensor, part.start, part.start + part.rows) for part in parts]
        rows, columns = sum(part.rows for part in parts), parts[0].columns
        bias = ""
        if any(part.bias for part in parts):
            rest = [Part(part.bias, part.start, part.start + part.rows) for part in parts]
            bias = graph.floats(f"{name}.bias", rest, (rows,))
        if isinstance(form, BlockFormat):
            codes, scales = graph.matrix(name, stacked, columns, form)
            return graph.contrib(
                "MatMulNBits", x, codes, scales, "", "", bias, out=out, K=columns, N=rows, bits=form.bits,
                block_size=form.block, accuracy_level=self._accuracy_level,
            )  # fmt: skip
        last = "" if bias else out
        if isinstance(form, ChannelFormat):
            y = self._integer_product(x, *graph.matrix(name, stacked, columns, form), out=last)
        else:
            weight = self._cast(graph.floats(name, stacked, (rows, columns), dtype=form.dtype), form.dtype)
            y = graph.contrib("FusedMatMul", x, weight, out=last, transB=1)
        return graph.op("Add", y, bias, out=out) if bias else y

    def embedding(self, ids: str, name: str, tensor: Linear, *, is_shared: bool) -> str:
        """Rows of a table `[rows, columns]`: `[batch, sequence, columns]`.

        `name`: of the weight in the graph; `is_shared`: whether a product takes it too.
        """
        graph, form = self._graph, self.format(tensor.tensor)
        part = Part(tensor.tensor, tensor.start, tensor.start + tensor.rows)
        if isinstance(form, FloatFormat):
            table = graph.floats(name, [part], (tensor.rows, tensor.columns), dtype=form.dtype)
            if is_shared:  # ORT casts it once, for the product: rows of the result keep no second copy in memory
                return graph.op("Gather", self._cast(table, form.dtype), ids, axis=0)
            return self._cast(graph.op("Gather", table, ids, axis=0), form.dtype)
        codes, scales = graph.matrix(name, [part], tensor.columns, form)
        if isinstance(form, ChannelFormat):
            return self._gather_columns(ids, codes, scales)
        blocks = -(-tensor.columns // form.block)
        shape = graph.constant(f"{name}.rows", [tensor.rows, blocks * form.code_bytes], "int64")
        flat = graph.op("Reshape", codes, shape)
        found = graph.contrib(
            "GatherBlockQuantized", flat, ids, scales, bits=form.bits, block_size=form.block, gather_axis=0,
            quantize_axis=1,
        )  # fmt: skip
        if tensor.columns % form.block == 0:
            return found
        first, end, axis = (graph.constant(f"{name}.{word}", [value], "int64") for word, value in
                            (("first", 0), ("end", tensor.columns), ("axis", -1)))  # fmt: skip
        return graph.op("Slice", found, first, end, axis)

    def scalar(self, name: str, value: float) -> str:
        """A number, rounded to the graph's float type as torch rounds it: to float32 first."""
        return self._cast(self._graph.constant(name, value, "float32"), "float32")

    def _integer_product(self, x: str, codes: str, scales: str, out: str) -> str:
        """U8 activations, quantized as they come, times int8 weights. ORT fuses these nodes into one or two."""
        graph = self._graph
        if graph.float_type != "float32":
            raise TargetError(
                "onnx-format", f"int8 with dynamic activations in a {graph.float_type} graph",
                why="DynamicQuantizeLinear takes float32",
                hint="use a float32 target, or weight-only int8",
            )  # fmt: skip
        if ("quantize", x) not in self._made:
            self._made["quantize", x] = graph.ops("DynamicQuantizeLinear", x, out=3)
        levels, step, zero = self._made["quantize", x]
        total = graph.op("Cast", graph.op("MatMulInteger", levels, codes, zero), to="float32")
        return graph.op("Mul", total, graph.op("Mul", step, scales), out=out)

    def _gather_columns(self, ids: str, codes: str, scales: str) -> str:
        """Rows of a table that is stored transposed."""
        graph = self._graph
        levels = graph.op("Transpose", graph.op("Gather", codes, ids, axis=1), perm=[1, 2, 0])
        last = graph.constant("last_axis", [-1], "int64")
        steps = graph.op("Unsqueeze", graph.op("Gather", scales, ids, axis=0), last)
        return graph.op("Mul", graph.op("Cast", levels, to="float32"), steps)

    def _cast(self, name: str, dtype: FloatType) -> str:
        """A weight in the graph's float type."""
        if dtype == self._graph.float_type:
            return name
        if ("cast", name) not in self._made:
            self._made["cast", name] = (self._graph.op("Cast", name, to=self._graph.float_type),)
        return self._made["cast", name][0]
