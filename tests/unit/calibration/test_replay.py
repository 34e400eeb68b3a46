"""Layers run again on their stored inputs, against the whole model; and quantized ones beside them."""

from __future__ import annotations

import copy
import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from lora2edge.calibration import Replay, calibrate
from lora2edge.checkpoint import open_checkpoint
from lora2edge.errors import DataError
from lora2edge.journal import Journal
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
    replay = Replay(view, found, tmp_path)
    sums: dict[str, Any] = {}
    counts: dict[str, int] = {}

    def add(group: list[str], batches: Any) -> None:
        for batch in batches:
            assert batch.reference is None
            product = batch.times * (batch.values.astype(np.float64).T @ batch.values)
            for tensor in group:
                sums[tensor] = sums.get(tensor, 0.0) + product
                counts[tensor] = counts.get(tensor, 0) + batch.times * len(batch.values)

    for layer in reversed(range(found.layers)):
        for group in replay.open(layer):
            add(group, replay.inputs(group))
        replay.close()
    if view.task == "causal-lm":
        add(replay.head, replay.head_inputs())
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


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3", "phi3"])
def test_inputs_of_quantized_layers_are_those_of_a_changed_model(name: str, tmp_path: Path) -> None:
    """Each tensor is changed when its turn comes; its inputs are those of transformers' model as it stands then."""
    make_model(ARCHITECTURES[name], tmp_path)
    view, texts = open_checkpoint(tmp_path), samples(12, vocab=370)
    (tmp_path / "out").mkdir()
    found = calibrate(view, texts, tmp_path / "out", SILENT, device="cpu", threads=1, layer_inputs=True)
    changed = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    merged = copy.deepcopy(changed)
    generator = np.random.default_rng(0)

    def noisy(values: Any) -> Any:
        return (values * (1 + 0.2 * generator.standard_normal(values.shape))).astype(np.float32)

    with Journal(tmp_path / "out") as journal, torch.no_grad():
        replay = Replay(view, found, tmp_path, feedback=journal)

        def embedding(ids: Any, rows: Any) -> Any:
            weight = changed.get_input_embeddings().weight
            np.testing.assert_array_equal(rows, weight[ids].numpy())
            weight[ids] = torch.from_numpy(noisy(rows))
            return weight[ids].numpy()

        changed.lm_head.weight = torch.nn.Parameter(changed.lm_head.weight.clone())  # where tied: no longer
        replay.change_embedding(embedding)
        order = []
        for layer in range(found.layers):
            for group in replay.open(layer):
                check(list(replay.inputs(group)), view, group[0], changed, merged, found)
                for tensor in group:
                    place = changed.get_submodule(view.module_names(tensor)[0].removesuffix(".weight")).weight
                    place.copy_(torch.from_numpy(noisy(place.numpy())))
                    half = len(place) // 2
                    replay.put(tensor, 0, place[:half].numpy())
                    replay.put(tensor, half, place[half:].numpy())
                order.append(group)
            replay.close()
            assert replay.finished() == layer + 1
        check(list(replay.head_inputs()), view, replay.head[0], changed, merged, found, "lm_head")
    sizes = [1, 1, 1, 1] if name == "phi3" else [3, 1, 2, 1]  # query, key and value; output; gate and up; down
    assert [len(group) for group in order] == sizes * found.layers
    assert [path.name for path in (tmp_path / "out").glob("hidden-*")] == [f"hidden-{found.layers:04}.bin"]


def test_learned_positions_go_on_behind_the_prefix(tmp_path: Path) -> None:
    """What a quantized model's first layer is given has them in it."""
    settings = {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0}
    llama = ARCHITECTURES["llama"]
    opt = dataclasses.replace(
        llama, model_class="OPTForCausalLM", config_class="OPTConfig", settings={**llama.settings, **settings}
    )
    merged = make_model(opt, tmp_path)
    view, texts = open_checkpoint(tmp_path), samples(12, vocab=370)
    (tmp_path / "out").mkdir()
    found = calibrate(view, texts, tmp_path / "out", SILENT, device="cpu", threads=1, layer_inputs=True)
    assert found.prefix
    with Journal(tmp_path / "out") as journal:
        replay = Replay(view, found, tmp_path, feedback=journal)
        group = replay.open(0)[0]
        check(list(replay.inputs(group)), view, group[0], copy.deepcopy(merged), merged, found)


def check(batches: Any, view: Any, tensor: str, changed: Any, merged: Any, found: Any, path: str = "") -> None:
    """Values against the changed model, references against the merged one."""
    path = path or view.module_names(tensor)[0].removesuffix(".weight")
    for model, sides in ((changed, [b.values for b in batches]), (merged, [b.reference for b in batches])):
        expected: Any = 0
        for sample in found.samples:
            inputs = hooked(model, path, sample.ids).astype(np.float64)
            expected = expected + inputs.T @ inputs
        product = sum(b.times * (v.astype(np.float64).T @ v) for b, v in zip(batches, sides, strict=True))
        tolerance = 1e-4 if model is changed else 0.02
        assert np.linalg.norm(product - expected) < tolerance * np.linalg.norm(expected)


def hooked(model: Any, path: str, ids: Any) -> Any:
    seen = []
    hook = model.get_submodule(path).register_forward_pre_hook(lambda _, given: seen.append(given[0][0].numpy()))
    with torch.no_grad():
        model(torch.tensor([ids]))
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("change", [-2, 2])
def test_stored_inputs_of_another_size_are_refused(change: int, tmp_path: Path) -> None:
    make_model(ARCHITECTURES["llama"], tmp_path)
    view = open_checkpoint(tmp_path)
    (tmp_path / "out").mkdir()
    found = calibrate(view, samples(vocab=370), tmp_path / "out", SILENT, device="cpu", threads=1, layer_inputs=True)
    path = found.inputs_path(found.layers)
    os.truncate(path, path.stat().st_size + change)
    with pytest.raises(DataError) as caught:
        Replay(view, found, tmp_path)
    assert caught.value.code == "stale-calibration"


def test_without_stored_inputs_there_is_nothing_to_run(tmp_path: Path) -> None:
    make_model(ARCHITECTURES["llama"], tmp_path)
    view = open_checkpoint(tmp_path)
    (tmp_path / "out").mkdir()
    found = calibrate(view, samples(vocab=370), tmp_path / "out", SILENT, device="cpu", threads=1)
    with pytest.raises(DataError) as caught:
        Replay(view, found, tmp_path)
    assert caught.value.code == "no-layer-inputs"
