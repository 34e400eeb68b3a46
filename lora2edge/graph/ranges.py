"""Between which values the inputs of a graph's matrices lie on given texts: what static int8 scales them by."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lora2edge.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lora2edge.contracts import FloatArray, IntArray

_PRODUCTS = {"FusedMatMul", "MatMul", "Gemm"}
_MOST_BYTES = 1 << 28
"""Of inputs that one run hands over; more are asked for in several runs."""


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
    counts. `threads`: 0 means all cores. Raises DataError `no-texts` where there is no batch.
    """
    session, inputs = _open(model, threads)
    ranges: dict[str, tuple[float, float]] = {}
    for batch in batches:
        mask = batch["attention_mask"].astype(bool)
        for values in _run(session, inputs, batch):
            for name, array in values.items():
                low, high = _bounds(_real(array, mask), percentile)
                before = ranges.get(name, (low, high))
                ranges[name] = min(low, before[0]), max(high, before[1])
    if not ranges:
        raise DataError("no-texts", "no text to find the ranges of activations with", hint="add calibration texts")
    return {matrix: ActivationRange(*ranges[name]) for matrix, name in inputs.items()}


def _open(model: Path, threads: int) -> tuple[Any, dict[str, str]]:
    """A session that also gives the inputs of matrices, and matrix → its input's name."""
    import onnx
    import onnxruntime

    proto = onnx.load(model, load_external_data=False)
    weights = {tensor.name for tensor in proto.graph.initializer}
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
    for name in dict.fromkeys(inputs.values()):
        proto.graph.output.append(onnx.ValueInfoProto(name=name))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(model.parent))
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session, inputs


def _run(session: Any, inputs: Mapping[str, str], batch: Mapping[str, IntArray]) -> Iterable[dict[str, FloatArray]]:
    """Values by name, some at a time."""
    feed = {value.name: batch[value.name] for value in session.get_inputs()}
    names = list(dict.fromkeys(inputs.values()))
    widest = 4 * 4096 * batch["attention_mask"].size
    step = max(1, _MOST_BYTES // widest)
    for start in range(0, len(names), step):
        some = names[start : start + step]
        yield dict(zip(some, session.run(some, feed), strict=True))


def _real(array: FloatArray, mask: NDArray[np.bool_]) -> FloatArray:
    """Values of real tokens: all of them where tokens are no axis, or only the first token of each text is there."""
    if array.ndim == 3 and array.shape[1] == mask.shape[1]:
        return array[mask]
    return array


def _bounds(values: FloatArray, percentile: float) -> tuple[float, float]:
    if percentile >= 100:
        return float(values.min()), float(values.max())
    low, high = np.percentile(values, [100 - percentile, percentile])
    return float(low), float(high)
