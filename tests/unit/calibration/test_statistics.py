"""Activation statistics against plain PyTorch: one sequence at a time, no padding, float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lora2edge.adapters import merge, read_adapter
from lora2edge.calibration import calibrate, open_calibration
from lora2edge.calibration.model import build_model
from lora2edge.checkpoint import open_checkpoint
from lora2edge.contracts import Sample
from lora2edge.errors import CheckpointError, DataError
from lora2edge.progress import SILENT
from tests.architectures import ARCHITECTURES, make_model
from tests.tiny import make_adapter, make_checkpoint
from tests.unit.calibration.whole import ITEM, samples


def by_hand(base: Path, adapter: Path, samples: list[Sample]) -> dict[str, Any]:
    """Mean of x² of each linear layer's input in PEFT's own merge, module name → [channels] float64."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().eval()
    seen: dict[str, list[Any]] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            seen[name] = []
            module.register_forward_pre_hook(lambda _, inputs, name=name: seen[name].append(inputs[0][0].double()))
    with torch.inference_mode():
        for sample in samples:
            model(torch.tensor([sample.ids]))
    return {f"{name}.weight": torch.cat(found).square().mean(0).numpy() for name, found in seen.items()}


@pytest.mark.parametrize(
    ("arch", "tied", "shared"),
    [("qwen2", True, 0), ("llama", False, 20), ("gemma2", True, 70), ("gemma3", True, 5), ("phi3", False, 1)],
)
def test_statistics_are_those_of_plain_pytorch(tmp_path: Path, arch: str, tied: bool, shared: int) -> None:
    base = make_checkpoint(tmp_path / "base", arch, tied=tied)
    adapter = make_adapter(tmp_path / "adapter", base)
    view = merge(open_checkpoint(str(base)), (read_adapter(str(adapter)),))
    (tmp_path / "out").mkdir()
    texts = [*samples(shared), *samples(shared)[:1]]
    calibrate(view, texts, tmp_path / "out", SILENT, device="cpu", threads=1)
    found = open_calibration(tmp_path / "out")
    expected = by_hand(base, adapter, texts)
    if tied:
        expected["model.embed_tokens.weight"] = expected.pop("lm_head.weight")
    assert set(found.names) == set(expected)
    for name, values in expected.items():
        stats = found.vectors(name)
        assert stats.count == sum(len(sample.ids) for sample in texts)
        assert stats.mean_square.dtype == np.float32
        np.testing.assert_allclose(stats.mean_square, values, rtol=2e-4)
    assert list(found.samples) == texts
    with pytest.raises(KeyError):
        found.vectors("model.norm.weight")


def test_a_changed_or_missing_folder_is_refused(tmp_path: Path) -> None:
    view = open_checkpoint(str(make_checkpoint(tmp_path / "base")))
    out = tmp_path / "out"
    out.mkdir()
    first = calibrate(view, samples(), out, SILENT, device="cpu", threads=1).digest
    assert open_calibration(out).digest == first
    with (out / "samples.jsonl").open("a") as file:
        file.write("\n")
    with pytest.raises(DataError, match="cannot be used"):
        open_calibration(out)
    with pytest.raises(DataError, match="no calibration folder"):
        open_calibration(tmp_path)


def test_the_digest_tells_models_and_texts_apart(tmp_path: Path) -> None:
    digests = set()
    for seed, texts in ((0, samples()), (1, samples()), (0, samples()[1:]), (0, samples())):
        view = open_checkpoint(str(make_checkpoint(tmp_path / f"base{seed}", seed=seed)))
        out = tmp_path / "out"
        out.mkdir(exist_ok=True)
        digests.add(calibrate(view, texts, out, SILENT, device="cpu", threads=1).digest)
    assert len(digests) == 3


def test_no_text_and_broken_weights_are_errors(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base", dtype="float32")
    view = open_checkpoint(str(base))
    with pytest.raises(DataError) as caught:
        calibrate(view, [], tmp_path, SILENT, device="cpu", threads=1)
    assert caught.value.code == "calibration-gap"
    with pytest.raises(DataError) as caught:
        calibrate(view, [Sample((), 0, ITEM)], tmp_path, SILENT, device="cpu", threads=1)
    assert caught.value.code == "calibration-gap"

    class Overflowing:
        """Activations of 1e30 have no square in float32."""

        def __getattr__(self, name: str) -> Any:
            return getattr(view, name)

        def rows(self, name: str, start: int, stop: int) -> Any:
            scale = 1e30 if name == "model.layers.0.mlp.up_proj.weight" else 1.0
            return view.rows(name, start, stop) * np.float32(scale)

    with pytest.raises(DataError) as caught:
        calibrate(Overflowing(), samples(), tmp_path, SILENT, device="cpu", threads=1)  # type: ignore[arg-type]
    assert caught.value.code == "calibration-not-finite"
    assert "model.layers.0.mlp.down_proj.weight: input channel 0 of 128" in caught.value.why


def test_one_channel_that_is_no_number_is_named(tmp_path: Path) -> None:
    view = open_checkpoint(str(make_checkpoint(tmp_path / "base", dtype="float32", layers=3)))

    class Broken:
        def __getattr__(self, name: str) -> Any:
            return getattr(view, name)

        def rows(self, name: str, start: int, stop: int) -> Any:
            rows = view.rows(name, start, stop)
            if name == "model.layers.1.self_attn.v_proj.weight":
                rows[5] = np.nan
            return rows

    with pytest.raises(DataError) as caught:
        calibrate(Broken(), samples(), tmp_path, SILENT, device="cpu", threads=1)  # type: ignore[arg-type]
    assert caught.value.code == "calibration-not-finite"
    assert caught.value.what == "the outputs of model.layers.1.self_attn.v_proj.weight are not finite in float32"
    assert "output channel 5 of 32" in caught.value.why


@pytest.mark.parametrize("lengths", [(1,), (1, 1), (2,), (3, 1, 2)])
def test_a_set_of_one_token_or_few(tmp_path: Path, lengths: tuple[int, ...]) -> None:
    base = make_checkpoint(tmp_path / "base", "llama", tied=False)
    adapter = make_adapter(tmp_path / "adapter", base)
    view = merge(open_checkpoint(str(base)), (read_adapter(str(adapter)),))
    (tmp_path / "out").mkdir()
    texts = samples(lengths=lengths)
    found = calibrate(view, texts, tmp_path / "out", SILENT, device="cpu", threads=1, layer_inputs=True)
    for name, values in by_hand(base, adapter, texts).items():
        stats = found.vectors(name)
        assert stats.count == sum(lengths)
        np.testing.assert_allclose(stats.mean_square, values, rtol=2e-4)
        assert stats.input_quantiles is not None
        assert np.isfinite(stats.input_quantiles).all()
    assert [len(rows) for rows in found.layer_inputs(1)] == list(lengths)


def test_inputs_that_were_not_kept(tmp_path: Path) -> None:
    view = open_checkpoint(str(make_checkpoint(tmp_path / "base")))
    (tmp_path / "out").mkdir()
    found = calibrate(view, samples(), tmp_path / "out", SILENT, device="cpu", threads=1)
    with pytest.raises(DataError) as caught:
        next(found.layer_inputs(0))
    assert caught.value.code == "no-layer-inputs"


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "gpt_neox"])
def test_the_model_is_that_of_transformers(name: str, tmp_path: Path) -> None:
    """Experts are stacked and parameters renamed on the way from the files into the model."""
    expected = make_model(ARCHITECTURES[name], tmp_path)
    found = build_model(open_checkpoint(tmp_path), dtype="float32", device="cpu", rounded=False)
    states = expected.state_dict()
    assert states.keys() == found.state_dict().keys()
    assert all(torch.equal(value, states[key]) for key, value in found.state_dict().items())


def test_a_base_that_lacks_an_expert(tmp_path: Path) -> None:
    make_model(ARCHITECTURES["qwen3_moe"], tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.0.mlp.experts.3.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        build_model(open_checkpoint(tmp_path), dtype="float32", device="cpu", rounded=False)
    assert caught.value.code == "missing-tensors"
