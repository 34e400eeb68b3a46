"""The importance matrix: calibration statistics → rounding weights, and llama.cpp's file of them.

llama.cpp weighs the rounding error of each input channel with the mean of x². It stores sums and a count, and divides
when it quantizes; the same division is done here, so that `llama-quantize --imatrix imatrix.gguf` rounds equally.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lora2edge.backends.gguf.container import Metadata, padding, write_header
from lora2edge.backends.gguf.mix import TYPES
from lora2edge.backends.gguf.model import Planned
from lora2edge.contracts import Calibration
from lora2edge.errors import DataError

if TYPE_CHECKING:
    from lora2edge.contracts import FloatArray

# Looked up, not multiplied, or outside what llama.cpp collects: rounding them needs no importance.
_OPTIONAL = frozenset({"token_embd.weight", "output.weight"})


@dataclass(frozen=True, slots=True)
class Importance:
    """Weights for one build, by GGUF tensor name."""

    sums: Mapping[str, FloatArray]
    """`[channels]` float32: sum of x² over `counts` tokens."""
    counts: Mapping[str, int]
    without: tuple[str, ...]
    """Matrices that are rounded without one."""

    def weights(self, name: str) -> FloatArray | None:
        """`[channels]` float32, mean of x²; None where there is none."""
        total = self.sums.get(name)
        return None if total is None else total / np.float32(self.counts[name])


def read_importance(tensors: Sequence[Planned], types: Mapping[str, str], calibration: Calibration) -> Importance:
    """Statistics for every matrix that is quantized. Raises DataError where one is missing or useless."""
    sums: dict[str, FloatArray] = {}
    counts: dict[str, int] = {}
    without: list[str] = []
    for tensor in tensors:
        if tensor.source is None or not TYPES[types[tensor.name]].is_quantized:
            continue
        try:
            stats = calibration.vectors(tensor.source)
        except KeyError as error:
            if tensor.name in _OPTIONAL:
                without.append(tensor.name)
                continue
            raise DataError(
                "imatrix-missing",
                f"the calibration has no statistics for {tensor.source}",
                why="all quantized matrices but embedding and head must be covered",
                hint="options: {imatrix: false} in the target quantizes without",
            ) from error
        mean_square = np.asarray(stats.mean_square, np.float32)
        _check(tensor, mean_square, stats.count)
        sums[tensor.name] = mean_square * np.float32(stats.count)
        counts[tensor.name] = stats.count
    return Importance(sums, counts, tuple(without))


def _check(tensor: Planned, mean_square: FloatArray, count: int) -> None:
    why = None
    if mean_square.shape != tensor.shape[-1:]:
        why = f"{list(mean_square.shape)} values, {tensor.shape[-1]} input channels"
    elif count <= 0:
        why = f"{count} tokens were seen"
    elif not np.isfinite(mean_square).all() or not np.isfinite(mean_square * np.float32(count)).all():
        why = "a value is infinite or not a number"
    elif (mean_square < 0).any() or not mean_square.any():
        why = "a mean square is negative" if (mean_square < 0).any() else "all channels were zero"
    if why:
        raise DataError(
            "imatrix-values",
            f"the calibration's statistics for {tensor.source} cannot weigh rounding errors",
            why=why,
            hint="calibrate again, on text that the model answers",
        )


def write_imatrix(path: Path, importance: Importance, dataset: str, chunk_size: int = 512) -> None:
    """Writes the statistics as `llama-imatrix` does, for `llama-quantize --imatrix`."""
    tokens = max(importance.counts.values(), default=0)
    metadata: Metadata = {
        "general.type": ("str", "imatrix"),
        "imatrix.datasets": ("strings", [dataset]),
        "imatrix.chunk_count": ("u32", tokens // chunk_size),
        "imatrix.chunk_size": ("u32", chunk_size),
    }
    with path.open("wb") as file:
        entries = list(_entries(importance))
        write_header(file, metadata, [(name, "F32", values.shape) for name, values in entries])
        for _, values in entries:
            file.write(values.tobytes() + b"\0" * padding(values.nbytes))


def _entries(importance: Importance) -> Iterator[tuple[str, FloatArray]]:
    for name in sorted(importance.sums):
        yield f"{name}.in_sum2", importance.sums[name].reshape(1, -1)
        yield f"{name}.counts", np.array([[importance.counts[name]]], np.float32)
