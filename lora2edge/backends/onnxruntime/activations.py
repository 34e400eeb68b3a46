"""Between which values an encoder's activations lie on the calibration texts: what static int8 scales them by."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lora2edge.contracts import Checkpoint, Encoded, Progress
from lora2edge.graph.builder import FloatFormat
from lora2edge.graph.encoder import Encoder
from lora2edge.graph.ort_encoder import write_ort_encoder
from lora2edge.graph.ranges import ActivationRange, find_ranges
from lora2edge.graph.write import write_data, write_model

if TYPE_CHECKING:
    from lora2edge.contracts import IntArray

_BATCH_TOKENS = 2048
"""Padded tokens that are run together."""


def calibrated_ranges(
    checkpoint: Checkpoint,
    encoder: Encoder,
    texts: Sequence[Encoded],
    scratch: Path,
    progress: Progress,
    *,
    percentile: float,
) -> dict[str, ActivationRange]:
    """Runs `texts` through the model in float32, whose graph lies in the folder `scratch` meanwhile."""
    scratch.mkdir()
    try:
        graph = write_ort_encoder(encoder, {matrix.name: FloatFormat() for matrix in encoder.matrices})
        write_data(scratch / "model.onnx.data", graph, checkpoint, None, progress)
        write_model(scratch / "model.onnx", graph, "model.onnx.data")
        progress.start("ranges", len(texts), "texts")
        ranges = find_ranges(scratch / "model.onnx", _batches(texts, encoder, progress), percentile=percentile)
        progress.finish()
        return ranges
    finally:
        shutil.rmtree(scratch)


def _batches(texts: Sequence[Encoded], encoder: Encoder, progress: Progress) -> Iterator[dict[str, IntArray]]:
    """Texts of similar lengths together, padded on the right."""
    ordered = sorted((text for text in texts if len(text.ids) <= encoder.max_length), key=lambda text: len(text.ids))
    while ordered:
        count = max(1, _BATCH_TOKENS // len(ordered[-1].ids))
        group, ordered = ordered[-count:], ordered[:-count]
        shape = (len(group), max(len(text.ids) for text in group))
        batch = {name: np.zeros(shape, np.int64) for name in ("input_ids", "attention_mask", "token_type_ids")}
        for row, text in enumerate(group):
            batch["input_ids"][row, : len(text.ids)] = text.ids
            batch["attention_mask"][row, : len(text.ids)] = 1
            batch["token_type_ids"][row, : len(text.types)] = text.types
        yield batch
        progress.advance(len(group))
