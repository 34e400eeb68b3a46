"""Layers run again on their stored inputs, against the whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lora2edge.calibration import Replay, calibrate
from lora2edge.checkpoint import open_checkpoint
from lora2edge.errors import DataError
from lora2edge.progress import SILENT
from tests.architectures import ARCHITECTURES, make_model
from tests.unit.calibration.whole import run_whole, samples


@pytest.mark.parametrize("name", ["qwen2", "gemma3", "qwen3_moe", "phi3", "bert"])
def test_matrices_of_inputs_are_those_of_the_whole_model(name: str, tmp_path: Path) -> None:
    """XᵀX of every linear layer; what enters a layer is rounded to bfloat16, hence the tolerance."""
    make_model(ARCHITECTURES[name], tmp_path)
    view, texts = open_checkpoint(tmp_path), samples(20, vocab=370)
    expected = run_whole(view, texts)
    (tmp_path / "out").mkdir()
    found = calibrate(view, texts, tmp_path / "out", SILENT, device="cpu", threads=1, layer_inputs=True)
    replay = Replay(view, found, device="cpu")
    sums: dict[str, Any] = {}
    counts: dict[str, int] = {}
    for layer in reversed(range(found.layers)):

        def add(tensor: str, inputs: Any, times: int) -> None:
            assert inputs.dtype == torch.float32
            product = times * (inputs.double().T @ inputs.double()).numpy()
            sums[tensor] = sums.get(tensor, 0.0) + product
            counts[tensor] = counts.get(tensor, 0) + times * len(inputs)

        replay.visit(layer, add)
    assert set(sums) == {tensor for tensor in found.names if found.counts[tensor]}
    compared = 0
    for tensor, product in sums.items():
        values = next((expected[home] for home in view.module_names(tensor) if home in expected), None)
        if values is not None:
            assert counts[tensor] == found.counts[tensor]
            exact = values.astype(np.float64).T @ values.astype(np.float64)
            assert np.linalg.norm(product - exact) < 0.02 * np.linalg.norm(exact)
            compared += 1
        elif ".experts." in tensor:  # a token whose two best experts are nearly equal may go the other way
            assert abs(counts[tensor] - found.counts[tensor]) <= 0.05 * found.counts[tensor] + 2
    assert compared >= 9


def test_without_stored_inputs_there_is_nothing_to_run(tmp_path: Path) -> None:
    make_model(ARCHITECTURES["llama"], tmp_path)
    view = open_checkpoint(tmp_path)
    (tmp_path / "out").mkdir()
    found = calibrate(view, samples(vocab=370), tmp_path / "out", SILENT, device="cpu", threads=1)
    with pytest.raises(DataError) as caught:
        Replay(view, found, device="cpu").visit(0, lambda *_: None)
    assert caught.value.code == "no-layer-inputs"
