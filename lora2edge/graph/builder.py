"""An ONNX graph as plain data: nodes, small constants, and where each weight will lie in the external file.

Built from a config and tensor headers alone: no weight is read, and the onnx package is not needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lora2edge.contracts import FloatArray

FloatType = Literal["float32", "float16", "bfloat16"]
Dimension = int | str
"""A number, or the name of a dimension that is known at run time."""

CONTRIB = "com.microsoft"
"""Domain of ONNX Runtime's own operators."""
WIDTHS: Mapping[str, int] = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1, "uint8": 1, "int64": 8, "int32": 4}
"""Bytes of an element."""
_PAGE = 4096
_SMALL = 1 << 16
"""Weights from this size on begin on a page, so that they can be mapped; smaller ones on a cache line."""
_LINE = 64


@dataclass(frozen=True, slots=True)
class FloatFormat:
    """A matrix as floats."""

    dtype: FloatType = "float32"


@dataclass(frozen=True, slots=True)
class BlockFormat:
    """Integers with a scale for each block of a row: what MatMulNBits multiplies with. Zero is 2^(bits − 1)."""

    bits: Literal[4, 8]
    block: int
    """Columns of a block, a power of two from 16 on."""

    @property
    def code_bytes(self) -> int:
        """Bytes of a block's codes."""
        return self.block * self.bits // 8


@dataclass(frozen=True, slots=True)
class ChannelFormat:
    """int8 with a scale for each row, stored transposed: what integer matrix products take."""


Format = FloatFormat | BlockFormat | ChannelFormat


@dataclass(frozen=True, slots=True)
class Part:
    """Rows `start:stop` of a tensor of the checkpoint; zeros where `tensor` is None."""

    tensor: str | None
    start: int
    stop: int

    @property
    def rows(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class External:
    """An initializer in the external file."""

    name: str
    dtype: str
    """A key of WIDTHS."""
    shape: tuple[int, ...]
    offset: int

    @property
    def length(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * WIDTHS[self.dtype]


@dataclass(frozen=True, slots=True)
class Floats:
    """Rows of the checkpoint, stacked, as floats."""

    external: External
    parts: tuple[Part, ...]
    shift: float = 0.0
    """Added to every element: Gemma's norms multiply by 1 + weight."""


@dataclass(frozen=True, slots=True)
class Matrix:
    """Rows of the checkpoint, stacked, as integers: the codes, and behind them the scales."""

    codes: External
    """BlockFormat: uint8 `[rows, blocks, code bytes]`, low half first; ChannelFormat: int8 `[columns, rows]`."""
    scales: External
    """`[rows, blocks]`, or `[rows]`."""
    parts: tuple[Part, ...]
    format: BlockFormat | ChannelFormat
    columns: int


@dataclass(frozen=True, slots=True)
class Table:
    """Computed rows, such as the cosines of a rotary embedding."""

    external: External
    make: Callable[[int, int], FloatArray]
    """Rows `start:stop`, float32."""


Entry = Floats | Matrix | Table


@dataclass(frozen=True, slots=True)
class Node:
    """One operator."""

    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    name: str
    domain: str = ""
    attributes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Value:
    """An input or output of the graph."""

    name: str
    dtype: str
    shape: tuple[Dimension, ...]


@dataclass(frozen=True, slots=True)
class Graph:
    """A whole model but its weights."""

    name: str
    opset: int
    nodes: tuple[Node, ...]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    constants: Mapping[str, NDArray[Any]]
    """Stored in the model's own file."""
    entries: tuple[Entry, ...]
    """In the order of the external file."""
    domains: frozenset[str]
    notes: Mapping[str, str] = field(default_factory=dict)
    """Of the model's metadata, under names that begin with "lora2edge."."""

    @property
    def data_bytes(self) -> int:
        """Size of the external file."""
        return max((external.offset + external.length for external in self.externals()), default=0)

    def externals(self) -> Iterable[External]:
        """Every initializer in the external file, in order."""
        for entry in self.entries:
            if isinstance(entry, Matrix):
                yield entry.codes
                yield entry.scales
            else:
                yield entry.external


class GraphBuilder:
    """Collects what a graph is made of. Names are unique; a constant or weight that is there is used again."""

    def __init__(self, name: str, *, opset: int, float_type: FloatType = "float32") -> None:
        self.float_type: FloatType = float_type
        """Of activations, norms, biases and scales."""
        self._name, self._opset = name, opset
        self._nodes: list[Node] = []
        self._inputs: list[Value] = []
        self._outputs: list[Value] = []
        self._constants: dict[str, NDArray[Any]] = {}
        self._entries: dict[str, Entry] = {}
        self._counts: dict[str, int] = {}
        self._notes: dict[str, str] = {}
        self._end = 0

    def op(self, kind: str, *inputs: str, out: str = "", domain: str = "", **attributes: Any) -> str:
        """A node with one output, whose name it returns. An empty input is one that is left out."""
        return self.ops(kind, *inputs, out=(out or self._unique(kind),), domain=domain, **attributes)[0]

    def ops(
        self, kind: str, *inputs: str, out: Sequence[str] | int, domain: str = "", **attributes: Any
    ) -> tuple[str, ...]:
        """A node with several outputs: their names ("" for one that is not wanted), or how many."""
        name = self._unique(kind)
        outputs = tuple(f"{name}.{index}" for index in range(out)) if isinstance(out, int) else tuple(out)
        while inputs and not inputs[-1]:
            inputs = inputs[:-1]
        self._nodes.append(Node(kind, inputs, outputs, name, domain, attributes))
        return outputs

    def contrib(self, kind: str, *inputs: str, out: str = "", **attributes: Any) -> str:
        """`op` of ONNX Runtime's own operators."""
        return self.op(kind, *inputs, out=out, domain=CONTRIB, **attributes)

    def add_input(self, name: str, dtype: str, shape: Sequence[Dimension]) -> str:
        self._inputs.append(Value(name, dtype, tuple(shape)))
        return name

    def add_output(self, name: str, dtype: str, shape: Sequence[Dimension]) -> str:
        self._outputs.append(Value(name, dtype, tuple(shape)))
        return name

    def constant(self, name: str, value: Any, dtype: str) -> str:
        """A small constant; a number stays a scalar."""
        self._constants.setdefault(name, np.array(value, dtype))
        return name

    def note(self, name: str, value: object) -> None:
        """A fact for whoever runs the model, in its metadata."""
        self._notes[f"lora2edge.{name}"] = str(value)

    def floats(self, name: str, parts: Sequence[Part], shape: Sequence[int], *, shift: float = 0.0,
               dtype: FloatType | None = None) -> str:  # fmt: skip
        """A weight that stays float (a norm, a bias, an embedding): `parts` stacked, of `shape` in all."""
        if name not in self._entries:
            external = self._place(name, dtype or self.float_type, shape)
            self._entries[name] = Floats(external, tuple(parts), shift)
        return name

    def table(self, name: str, shape: Sequence[int], make: Callable[[int, int], FloatArray]) -> str:
        """Computed values in the graph's float type."""
        if name not in self._entries:
            self._entries[name] = Table(self._place(name, self.float_type, shape), make)
        return name

    def matrix(
        self, name: str, parts: Sequence[Part], columns: int, form: BlockFormat | ChannelFormat
    ) -> tuple[str, str]:
        """A matrix of integers: the names of its codes and of its scales."""
        rows = sum(part.rows for part in parts)
        if name not in self._entries:
            if isinstance(form, BlockFormat):
                blocks = -(-columns // form.block)
                codes = self._place(f"{name}.codes", "uint8", (rows, blocks, form.code_bytes))
                scales = self._place(f"{name}.scales", self.float_type, (rows, blocks))
            else:
                codes = self._place(f"{name}.codes", "int8", (columns, rows))
                scales = self._place(f"{name}.scales", "float32", (rows,))
            self._entries[name] = Matrix(codes, scales, tuple(parts), form, columns)
        return f"{name}.codes", f"{name}.scales"

    def finish(self) -> Graph:
        """The graph."""
        return Graph(
            name=self._name,
            opset=self._opset,
            nodes=tuple(self._nodes),
            inputs=tuple(self._inputs),
            outputs=tuple(self._outputs),
            constants=dict(self._constants),
            entries=tuple(self._entries.values()),
            domains=frozenset(node.domain for node in self._nodes if node.domain),
            notes=dict(self._notes),
        )

    def _unique(self, kind: str) -> str:
        self._counts[kind] = self._counts.get(kind, -1) + 1
        return f"{kind}_{self._counts[kind]}"

    def _place(self, name: str, dtype: str, shape: Sequence[int]) -> External:
        length = math.prod(shape) * WIDTHS[dtype]
        unit = _PAGE if length >= _SMALL else _LINE
        external = External(name, dtype, tuple(shape), -(-self._end // unit) * unit)
        self._end = external.offset + external.length
        return external
