"""Writes a graph: the weights streamed into the external file, slab by slab, and the model's own small file.

Memory is bounded by the slabs in flight, and by one matrix of int8 where it is stored transposed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from lora2edge.checkpoint import encode_finite, in_order, not_finite
from lora2edge.errors import CheckpointError
from lora2edge.graph.builder import (
    BlockFormat,
    ChannelFormat,
    Entry,
    External,
    Floats,
    Graph,
    Matrix,
    Part,
    Table,
)
from lora2edge.journal import GrowingFile, Journal

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lora2edge.contracts import Checkpoint, FloatArray, Progress

    Bytes = NDArray[np.uint8]

SLAB_ELEMENTS = 1 << 19
"""Of one job."""
IR_VERSION = 10
PRODUCER = "lora2edge"
SOURCES = "lora2edge.sources"
"""Key of the model's metadata that says where each matrix comes from, as JSON (`_sources`)."""
_SAFETENSORS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


class Rounder(Protocol):
    """Makes integers of weights."""

    def codes(
        self, tensor: str, start: int, stop: int, form: BlockFormat | ChannelFormat
    ) -> tuple[NDArray[Any], FloatArray]:
        """Rows `start:stop` of a tensor: codes and scales.

        BlockFormat: uint8 `[rows, blocks, code bytes]` and float32 `[rows, blocks]`; ChannelFormat: int8
        `[rows, columns]` and float32 `[rows]`. Safe to call from several threads.
        """
        ...


@dataclass(frozen=True, slots=True)
class _Slab:
    """Some rows of an entry: of one of its parts, or of a table."""

    entry: Entry
    index: int
    """Of the entry."""
    part: Part
    is_last: bool
    """Of its entry."""

    @property
    def size(self) -> int:
        return self.part.rows * _columns(self.entry)


def write_data(path: Path, graph: Graph, checkpoint: Checkpoint, rounder: Rounder | None, progress: Progress) -> None:
    """Writes the external file; where its folder has a journal, goes on with what an earlier call left.

    `rounder` may be None where no weight becomes integers. Raises CheckpointError for a weight that is not finite, or
    too large for its dtype.
    """
    entries = graph.entries
    starts = [_first(entry).offset for entry in entries]
    progress.start("write", sum(_size(entry) for entry in entries), "weights")
    with Journal(path.parent) as journal, GrowingFile(journal, path.name, set(starts)) as file:
        # What an earlier process left ends where an entry begins: scales are written after all codes of theirs.
        done = starts.index(file.size) if file.size else 0
        progress.advance(sum(_size(entry) for entry in entries[:done]))
        work = (slab for index in range(done, len(entries)) for slab in _slabs(entries[index], index))
        pieces: list[tuple[NDArray[Any] | None, FloatArray]] = []
        for slab, result in in_order(lambda slab: _compute(slab, checkpoint, rounder), work):
            if isinstance(slab.entry, Matrix):
                assert isinstance(result, tuple)
                _append_codes(file, slab, result, pieces)
            else:
                file.append(_view(result))
            if slab.is_last and slab.index + 1 < len(starts):
                file.append(_zeros(starts[slab.index + 1] - file.size))
            progress.advance(slab.size)
        file.finish()
    progress.finish()


def write_model(path: Path, graph: Graph, data: str) -> None:
    """Writes the model's own file, whose weights lie in the file `data` beside it."""

    path.write_bytes(onnx_model(graph, data).SerializeToString(deterministic=True))


def onnx_model(graph: Graph, data: str) -> Any:
    """The graph as the onnx package's ModelProto."""
    from onnx import TensorProto, helper, numpy_helper

    kinds = {
        "float32": TensorProto.FLOAT,
        "float16": TensorProto.FLOAT16,
        "bfloat16": TensorProto.BFLOAT16,
        "int8": TensorProto.INT8,
        "uint8": TensorProto.UINT8,
        "int64": TensorProto.INT64,
        "int32": TensorProto.INT32,
    }
    initializers = [numpy_helper.from_array(value, name) for name, value in graph.constants.items()]
    for external in graph.externals():
        tensor = TensorProto(
            name=external.name,
            data_type=kinds[external.dtype],
            dims=external.shape,
            data_location=TensorProto.EXTERNAL,
        )
        for key, value in (("location", data), ("offset", external.offset), ("length", external.length)):
            tensor.external_data.add(key=key, value=str(value))
        initializers.append(tensor)
    inputs, outputs = (
        [helper.make_tensor_value_info(value.name, kinds[value.dtype], value.shape) for value in values]
        for values in (graph.inputs, graph.outputs)
    )
    nodes = [
        helper.make_node(
            node.kind,
            node.inputs,
            node.outputs,
            name=node.name,
            domain=node.domain,
            **_attributes(node.attributes, kinds),
        )
        for node in graph.nodes
    ]
    opsets = [helper.make_opsetid("", graph.opset), *(helper.make_opsetid(name, 1) for name in sorted(graph.domains))]
    proto = helper.make_graph(nodes, graph.name, inputs, outputs, initializers)
    model = helper.make_model(proto, opset_imports=opsets, ir_version=IR_VERSION, producer_name=PRODUCER)
    helper.set_model_props(model, {SOURCES: json.dumps(_sources(graph), separators=(",", ":")), **graph.notes})
    return model


def _sources(graph: Graph) -> dict[str, list[tuple[str, int, int]]]:
    """Initializer (of a matrix of integers its codes) → the rows of the checkpoint that it holds, in order."""
    return {
        _first(entry).name: [(part.tensor, part.start, part.stop) for part in entry.parts if part.tensor]
        for entry in graph.entries
        if not isinstance(entry, Table) and len(_first(entry).shape) > 1
    }


def _attributes(attributes: Mapping[str, Any], kinds: Mapping[str, int]) -> dict[str, Any]:
    """A `to` (of Cast) is written as the name of a dtype."""
    return {key: kinds[value] if key == "to" else value for key, value in attributes.items()}


def _first(entry: Entry) -> External:
    return entry.codes if isinstance(entry, Matrix) else entry.external


def _columns(entry: Entry) -> int:
    return entry.columns if isinstance(entry, Matrix) else math.prod(entry.external.shape[1:])


def _size(entry: Entry) -> int:
    """Weights in it."""
    parts = (Part(None, 0, entry.external.shape[0]),) if isinstance(entry, Table) else entry.parts
    return sum(part.rows for part in parts) * _columns(entry)


def _slabs(entry: Entry, index: int) -> Iterator[_Slab]:
    parts = (Part(None, 0, entry.external.shape[0]),) if isinstance(entry, Table) else entry.parts
    step = max(1, SLAB_ELEMENTS // max(1, _columns(entry)))
    for part in parts:
        for start in range(part.start, part.stop, step):
            stop = min(start + step, part.stop)
            is_last = part is parts[-1] and stop == part.stop
            yield _Slab(entry, index, Part(part.tensor, start, stop), is_last)


def _compute(slab: _Slab, checkpoint: Checkpoint, rounder: Rounder | None) -> Any:
    """The bytes of a float entry's rows; codes and scales of a matrix's."""
    entry, part = slab.entry, slab.part
    if isinstance(entry, Matrix):
        assert rounder is not None and part.tensor is not None
        return rounder.codes(part.tensor, part.start, part.stop, entry.format)
    return _encode(_values(entry, part, checkpoint), entry.external, part.tensor)


def _values(entry: Floats | Table, part: Part, checkpoint: Checkpoint) -> FloatArray:
    """Rows of a float entry, float32."""
    if isinstance(entry, Table):
        return entry.make(part.start, part.stop)
    if part.tensor is None:
        return np.zeros((part.rows, *entry.external.shape[1:]), np.float32)
    rows = checkpoint.rows(part.tensor, part.start, part.stop)
    return rows + np.float32(entry.shift) if entry.shift else rows


def _append_codes(
    file: GrowingFile,
    slab: _Slab,
    result: tuple[NDArray[Any], FloatArray],
    pieces: list[tuple[NDArray[Any] | None, FloatArray]],
) -> None:
    """Appends codes as they come, but for transposed ones; and, after a matrix's last, its scales."""
    entry = slab.entry
    assert isinstance(entry, Matrix)
    codes, scales = result
    if isinstance(entry.format, ChannelFormat):
        pieces.append((codes, scales))
    else:
        file.append(_view(codes))
        pieces.append((None, scales))
    if slab.is_last:
        if waiting := [codes for codes, _ in pieces if codes is not None]:
            file.append(_view(np.concatenate(waiting).T))
        gap = entry.scales.offset - entry.codes.offset - entry.codes.length
        stacked = np.concatenate([scales for _, scales in pieces])
        file.append(_zeros(gap), _view(_encode(stacked, entry.scales, slab.part.tensor)))
        pieces.clear()


def _encode(values: FloatArray, external: External, tensor: str | None) -> NDArray[Any]:
    encoded, is_finite = encode_finite(values, _SAFETENSORS[external.dtype])
    if not is_finite:
        if np.isfinite(values).all():
            raise CheckpointError(
                "weight-range",
                f"{tensor or external.name} holds {float(np.abs(values).max()):g}",
                why=f"{external.dtype} does not reach that far",
                hint="a target in float32 or bfloat16 does",
            )
        raise not_finite(tensor or external.name)
    return encoded


def _view(array: NDArray[Any]) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _zeros(count: int) -> memoryview:
    return memoryview(bytes(count))
