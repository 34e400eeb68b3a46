"""Ranges of activations against what transformers' layers are given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora2edge.errors import CheckpointError, DataError
from lora2edge.graph.builder import ChannelFormat
from lora2edge.graph.ranges import ActivationRange, find_ranges
from tests.unit.graph.encoders import (
    TASKS,
    error,
    make_encoder,
    open_graph,
    ragged,
    reference,
    run_graph,
    write_encoder,
)


@pytest.mark.parametrize("percentile", [100.0, 99.0])
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("family", ["bert", "deberta-v3"])
def test_ranges_of_real_tokens(family: str, task: str, percentile: float, tmp_path: Path) -> None:
    model = make_encoder(tmp_path, family, task)
    encoder = write_encoder(tmp_path, tmp_path / "graph")
    batches = [ragged([30, 5, 17], pairs=True, seed=seed) for seed in range(3)]
    found = find_ranges(tmp_path / "graph" / "model.onnx", batches, percentile=percentile, threads=1)
    is_sequence = task == "sequence"
    given: dict[str, list[Any]] = {}
    modules = dict(model.named_modules())
    positions = encoder.relative.embeddings.rows if encoder.relative else None
    for matrix in encoder.matrices:

        def hook(_: Any, inputs: Any, name: str = matrix.name) -> None:
            if inputs[0].shape[:2] != (1, positions):
                given.setdefault(name, []).append(inputs[0].numpy())

        modules[matrix.name.removesuffix(".weight")].register_forward_pre_hook(hook)
    for batch in batches:
        reference(model, batch, encoder.has_token_types)
    assert set(found) == {matrix.name for matrix in encoder.matrices}
    for matrix in encoder.matrices:
        values = []
        for array, batch in zip(given[matrix.name], batches, strict=True):
            if array.ndim == 2:
                values.append(array)
            elif is_sequence and matrix.layer == 1 and matrix.role in ("query", "attention-output", "up", "down"):
                values.append(array[:, 0])
            else:
                values.append(array[batch["attention_mask"].astype(bool)])
        low = min(np.percentile(array, 100 - percentile) for array in values)
        high = max(np.percentile(array, percentile) for array in values)
        np.testing.assert_allclose([found[matrix.name].low, found[matrix.name].high], [low, high], rtol=1e-4, atol=1e-5)


def test_a_range_holds_zero() -> None:
    span = ActivationRange(0.5, 2.0)
    assert (span.scale, span.zero) == (2.0 / 255, 0)
    span = ActivationRange(-2.0, -1.0)
    assert (span.scale, span.zero) == (2.0 / 255, 255)
    span = ActivationRange(-1.0, 3.0)
    assert span.zero == 64 and span.scale == pytest.approx(4 / 255)
    assert ActivationRange(0.0, 0.0).scale > 0


def test_no_text_is_refused(tmp_path: Path) -> None:
    make_encoder(tmp_path, "bert", "sequence")
    write_encoder(tmp_path, tmp_path / "graph")
    with pytest.raises(DataError) as caught:
        find_ranges(tmp_path / "graph" / "model.onnx", [])
    assert caught.value.code == "no-texts"


def test_a_model_that_overflows_is_refused(tmp_path: Path) -> None:
    import torch

    model = make_encoder(tmp_path, "bert", "token")
    with torch.no_grad():
        for name in ("intermediate", "output"):
            getattr(model.bert.encoder.layer[0], name).dense.weight.mul_(1e30)
    model.save_pretrained(tmp_path)
    write_encoder(tmp_path, tmp_path / "graph")
    with pytest.raises(CheckpointError) as caught:
        find_ranges(tmp_path / "graph" / "model.onnx", [ragged([9])], threads=1)
    assert caught.value.code == "not-finite" and "layer.1" in caught.value.what


def test_values_come_in_several_runs_where_memory_is_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_encoder(tmp_path, "bert", "token")
    write_encoder(tmp_path, tmp_path / "graph")
    batches = [ragged([30, 5, 17])]
    whole = find_ranges(tmp_path / "graph" / "model.onnx", batches, threads=1)
    monkeypatch.setattr("lora2edge.graph.ranges._MOST_BYTES", 1000)
    assert find_ranges(tmp_path / "graph" / "model.onnx", batches, threads=1) == whole


def test_an_input_that_was_always_zero_gets_the_range_of_the_text(tmp_path: Path) -> None:
    """A ReLU that no calibration text opened: with a fixed range, it could open for no text at all."""
    import torch

    model = make_encoder(tmp_path, "distilbert", "sequence")
    with torch.no_grad():
        model.pre_classifier.weight.mul_(1e-6)
        model.pre_classifier.bias.fill_(-1)
    model.save_pretrained(tmp_path)
    write_encoder(tmp_path, tmp_path / "graph")
    found = find_ranges(tmp_path / "graph" / "model.onnx", [ragged([9, 5])], threads=1)
    assert "classifier.weight" not in found and "pre_classifier.weight" in found
    with torch.no_grad():
        model.pre_classifier.bias.fill_(2)
    model.save_pretrained(tmp_path)
    write_encoder(tmp_path, tmp_path / "int8", lambda matrix: ChannelFormat(), activations=found)
    batch = ragged([9, 5], seed=1)
    logits = run_graph(open_graph(tmp_path / "int8" / "model.onnx"), batch)
    expected = reference(model, batch, False)
    assert error(logits, expected, batch["attention_mask"]) < 0.02
