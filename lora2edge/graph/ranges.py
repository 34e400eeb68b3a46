"""Between which values the inputs of a graph's matrices lie on given texts: what static int8 scales them by."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lora2edge.errors import CheckpointError, DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lora2edge.contracts import FloatArray, IntArray

_PRODUCTS = {"FusedMatMul", "MatMul", "Gemm"}
_MOST_BYTES = 1 << 28
"""Of the values that one run hands over; more are asked for in several runs."""


@dataclass(frozen=True, slots=True)
class ActivationRange:
    """Least and largest value of a matrix's input."""

    low: float
    high: float

    @property
    def scale(self) -> float:
        """Of unsigned bytes; the range is widened so that it holds 0, which then is exact."""
        return max(max(self.high, 0.0) - min(self.low, 0.0), 1e-9) / 255

    @property
    def zero(self) -> int:
        """The byte that means 0."""
        return int(np.clip(round(-min(self.low, 0.0) / self.scale), 0, 255))


def find_ranges(
    model: Path, batches: Iterable[Mapping[str, IntArray]], *, percentile: float = 100.0, threads: int = 0
) -> dict[str, ActivationRange]:
    """Matrix of the graph in `model` → range of its input over the real tokens of `batches`.

    `model`: a graph whose matrices are floats, as `write_ort_encoder` writes it. A batch: the graph's inputs, int64
    `[batch, sequence]`; rows of padding, where the attention mask is 0, are left out. `percentile`: this share of each
    batch's values, and of their negatives, lies within; 100 is minimum and maximum. The widest range of all batches
    counts. A matrix whose input was 0 throughout has none: any scale would turn all other texts' values into 0.
    `threads`: 0 means all cores. Raises DataError `no-texts` where there is no batch, CheckpointError
    `not-finite` where the model overflows.
    """
    session, inputs, widths = _open(model, threads)
    ranges: dict[str, tuple[float, float]] = {}
    for batch in batches:
        mask = batch["attention_mask"].astype(bool)
        for values in _run(session, widths, batch):
            for name, array in values.items():
                low, high = _bounds(_real(array, mask), percentile)
                if not (math.isfinite(low) and math.isfinite(high)):
                    raise _not_finite(next(matrix for matrix, given in inputs.items() if given == name))
                before = ranges.get(name, (low, high))
                ranges[name] = min(low, before[0]), max(high, before[1])
    if not ranges:
        raise DataError("no-texts", "no text to find the ranges of activations with", hint="add calibration texts")
    return {matrix: ActivationRange(*ranges[name]) for matrix, name in inputs.items() if ranges[name] != (0, 0)}


def _not_finite(matrix: str) -> CheckpointError:
    return CheckpointError(
        "not-finite",
        f"the input of {matrix} is not finite on a calibration text",
        why="the model overflows float32, so no scale fits",
        hint="check base and adapter: were they trained together, and is the adapter's weight right?",
    )


def _open(model: Path, threads: int) -> tuple[Any, dict[str, str], dict[str, int]]:
    """A session that also gives the inputs of matrices; matrix → its input's name; that name → values of a token."""
    import onnx
    import onnxruntime

    proto = onnx.load(model, load_external_data=False)
    weights = {tensor.name: max(tensor.dims, default=0) for tensor in proto.graph.initializer}
    made = {name for node in proto.graph.node for name in node.output}
    varying = {value.name for value in proto.graph.input}
    for node in proto.graph.node:  # in the order of computing
        if any(name in varying for name in node.input):
            varying.update(node.output)
    inputs = {
        node.input[1]: node.input[0]
        for node in proto.graph.node
        if node.op_type in _PRODUCTS and node.input[1] in weights and node.input[0] in made & varying
    }
    widths = {name: weights[matrix] for matrix, name in inputs.items()}
    for name in widths:
        proto.graph.output.append(onnx.ValueInfoProto(name=name))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(model.parent))
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session, inputs, widths


def _run(session: Any, widths: Mapping[str, int], batch: Mapping[str, IntArray]) -> Iterator[dict[str, FloatArray]]:
    """Values by name, as many at a time as fit into the memory that is meant for them."""
    feed = {value.name: batch[value.name] for value in session.get_inputs()}
    some: list[str] = []
    size = 0
    for name, width in widths.items():
        more = 4 * width * batch["attention_mask"].size
        if some and size + more > _MOST_BYTES:
            yield dict(zip(some, session.run(some, feed), strict=True))
            some, size = [], 0
        some.append(name)
        size += more
    if some:
        yield dict(zip(some, session.run(some, feed), strict=True))


def _real(array: FloatArray, mask: NDArray[np.bool_]) -> FloatArray:
    """Values of real tokens of `[tokens, width]`; all of `[texts, width]`, which are those of first tokens."""
    return array[mask.reshape(-1)] if len(array) == mask.size else array


def _bounds(values: FloatArray, percentile: float) -> tuple[float, float]:
    if percentile >= 100:
        return float(values.min()), float(values.max())
    low, high = np.percentile(values, [100 - percentile, percentile])
    return float(low), float(high)
