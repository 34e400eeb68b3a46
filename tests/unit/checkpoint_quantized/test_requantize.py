"""A 16-bit base as 4-bit training saw it: against bitsandbytes and transformers on the CPU."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from lora2edge.checkpoint import BnbSettings, linear_names, open_checkpoint, requantized
from lora2edge.checkpoint.quantized.blocks import (
    block_maxima,
    double_quantized,
    dynamic_code,
    nearest_codes,
    scale_blocks,
)
from lora2edge.contracts import CheckpointRef
from lora2edge.errors import CheckpointError
from tests.tiny import make_checkpoint

bnb = pytest.importorskip("bitsandbytes")

TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
PLAIN = BnbSettings(double_quant=False)


def through_bitsandbytes(weight: torch.Tensor, chosen: BnbSettings) -> tuple[torch.Tensor, Any]:
    """What its own CPU code gives back, float32, and the state. One long row, as in test_bnb.pack."""
    packed, state = bnb.functional.quantize_4bit(
        weight.to(TORCH[chosen.dtype]),
        blocksize=chosen.blocksize,
        compress_statistics=chosen.double_quant,
        quant_type=chosen.quant_type,
    )
    state.shape = torch.Size((1, weight.numel()))
    return bnb.functional.dequantize_4bit(packed, state).reshape(weight.shape).float(), state


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("plain") / "base", "qwen2", hidden=96, intermediate=136)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("blocksize", [64, 128])
def test_rows_are_those_of_bitsandbytes(quant_type: Any, dtype: str, blocksize: int, base: Path) -> None:
    chosen = BnbSettings(quant_type, double_quant=False, dtype=dtype, blocksize=blocksize)
    view = requantized(open_checkpoint(base), chosen)
    stored = load_file(base / "model.safetensors")
    assert len(view.settings.names or ()) == 14
    for name, info in view.tensors.items():
        weight = stored[name]
        quantized = name in (view.settings.names or ())
        expected = (through_bitsandbytes(weight, chosen)[0] if quantized else weight.float()).numpy()
        assert info.dtype == (dtype if quantized else "BF16")
        assert (view.stored(name) is None) == quantized
        assert view.delta(name, 0, 1) is None
        height = info.shape[0]
        for start, stop in ((0, height), (height // 3, height // 2), (height - 1, height), (5, 5)):
            rows = view.rows(name, start, stop)
            np.testing.assert_array_equal(rows, expected[start:stop])
            rows[:] = 0


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_double_quantization_is_that_of_bitsandbytes(quant_type: Any, dtype: str, tmp_path: Path) -> None:
    """Bit-equal where torch's mean of the scales is the correctly rounded one; else within one digit of it."""
    folder = make_checkpoint(tmp_path / "base", "llama", hidden=256, intermediate=384, layers=2)
    chosen = BnbSettings(quant_type, dtype=dtype, kernel="cpu")
    view = requantized(open_checkpoint(folder), chosen)
    equal = 0
    for name in view.settings.names or ():
        weight = load_file(folder / "model.safetensors")[name]
        expected, state = through_bitsandbytes(weight, chosen)
        rows = view.rows(name, 0, weight.shape[0])
        flat = weight.to(TORCH[dtype]).float().numpy().reshape(-1)
        if state.offset.item() == np.float32(block_maxima(flat, 64).mean(dtype=np.float64)):
            equal += 1
            np.testing.assert_array_equal(rows, expected.numpy())
        else:
            np.testing.assert_allclose(rows, expected.numpy(), rtol=2**-7 if dtype == "BF16" else 2**-10, atol=0)
        np.testing.assert_array_equal(view.rows(name, 7, 21), rows[7:21])
    assert equal >= 7


def test_scales_of_a_gpu_are_the_nearest_codes() -> None:
    """bitsandbytes' CPU library looks codes up on a grid; the formula that its other back ends have is nearest."""
    absmax = np.random.default_rng(0).uniform(0.5, 4, 70_000).astype(np.float32)
    offset = np.float32(absmax.mean(dtype=np.float64))
    centred = torch.from_numpy(absmax - offset)
    blocks = torch.nn.functional.pad(centred, (0, -len(centred) % 256)).reshape(-1, 256)
    largest = blocks.abs().max(dim=1, keepdim=True).values
    code = bnb.functional.create_dynamic_map()
    np.testing.assert_array_equal(dynamic_code(), code.numpy())
    index = torch.bucketize((blocks * (1 / largest)).clamp(-1, 1), (code[:-1] + code[1:]) / 2)
    expected = ((code[index] * largest).reshape(-1)[: len(absmax)] + offset).numpy()
    nearest = double_quantized(absmax, "cuda")
    np.testing.assert_array_equal(nearest, expected)
    grid = double_quantized(absmax, "cpu")
    assert 0 < (grid != nearest).mean() < 0.01


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(1, 350).map(lambda half: 2 * half),
    scale=st.sampled_from([1e-30, 1e-6, 0.02, 1.0, 1e4]),
    zeros=st.floats(0, 1),
    quant_type=st.sampled_from(["nf4", "fp4"]),
    seed=st.integers(0, 99),
)
def test_any_values(count: int, scale: float, zeros: float, quant_type: str, seed: int) -> None:
    """Zero blocks, short last blocks, tiny and large scales. bitsandbytes compiles its code for odd numbers anew."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(count, generator=generator) * scale
    weight[torch.rand(count, generator=generator) < zeros] = 0
    packed, state = bnb.functional.quantize_4bit(weight, quant_type=quant_type, blocksize=64)
    expected = bnb.functional.dequantize_4bit(packed, replace_shape(state, count)).reshape(-1)[:count]
    values = weight.numpy()
    absmax = block_maxima(values, 64)
    ours = scale_blocks(nearest_codes(values, absmax, quant_type, 64), absmax, 64)
    np.testing.assert_array_equal(ours, expected.numpy())


def replace_shape(state: Any, count: int) -> Any:
    state.shape = torch.Size((1, count))
    return state


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi3"])
@pytest.mark.parametrize("tied", [True, False])
def test_names_are_the_layers_that_transformers_quantizes(arch: str, tied: bool, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    folder = make_checkpoint(tmp_path / "base", arch, tied=tied, layers=1)
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(load_in_4bit=True), dtype=torch.bfloat16, device_map="cpu"
    )
    live = {f"{name}.weight" for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"}
    assert set(linear_names(open_checkpoint(folder))) == live


def test_the_model_that_transformers_quantizes_when_it_loads(tmp_path: Path) -> None:
    """load_in_4bit on the 16-bit folder, dequantized by transformers: every weight bit-equal to the view's."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    folder = make_checkpoint(tmp_path / "base", "qwen3", hidden=128, intermediate=256)
    chosen = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=chosen, dtype=torch.bfloat16, device_map="cpu"
    ).dequantize()
    view = requantized(open_checkpoint(folder), BnbSettings(kernel="cpu"))
    state = model.state_dict()
    for name, info in view.tensors.items():
        np.testing.assert_array_equal(view.rows(name, 0, info.shape[0]), state[name].float().numpy(), name)


def test_another_process_opens_the_same_view(base: Path) -> None:
    view = requantized(open_checkpoint(base), BnbSettings("fp4", dtype="F16", kernel="cpu"))
    ref = CheckpointRef.from_json(view.ref.to_json())
    assert ref == view.ref
    assert ref.requantized is not None
    again = requantized(open_checkpoint(ref.base), BnbSettings.from_json(ref.requantized))
    assert again.settings == view.settings
    name = linear_names(view)[3]
    np.testing.assert_array_equal(again.rows(name, 3, 40), view.rows(name, 3, 40))
    assert again.fingerprint() == view.fingerprint()
    assert view.fingerprint() != view.base.fingerprint()
    assert CheckpointRef.from_json({"base": "x", "adapters": []}) == CheckpointRef("x")


def test_threads_share_the_scales(base: Path) -> None:
    view = requantized(open_checkpoint(base), BnbSettings())
    name = linear_names(view)[0]
    expected = requantized(open_checkpoint(base), BnbSettings()).rows(name, 0, 96)
    found: dict[int, np.ndarray] = {}
    threads = [
        threading.Thread(target=lambda at=at: found.update({at: view.rows(name, at, at + 8)})) for at in range(0, 96, 8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    np.testing.assert_array_equal(np.concatenate([found[at] for at in sorted(found)]), expected)


def test_names_that_are_no_matrices(base: Path) -> None:
    checkpoint = open_checkpoint(base)
    for name in ("model.norm.weight", "model.layers.9.mlp.up_proj.weight"):
        with pytest.raises(CheckpointError) as error:
            requantized(checkpoint, replace(PLAIN, names=(name,)))
        assert error.value.code == "bad-quantization-settings"
        assert name in error.value.what


@pytest.mark.parametrize(
    "wrong", [{"quant_type": "int4"}, {"blocksize": 63}, {"dtype": "I8"}, {"kernel": "rocm"}, {"blocksize": "64"}]
)
def test_settings_that_are_none(wrong: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError) as error:
        BnbSettings(**wrong)
    assert error.value.code == "bad-quantization-settings"


def test_not_a_number_stays_one() -> None:
    absmax = np.array([1, np.nan, 2], np.float32)
    for kernel in ("cuda", "cpu"):
        assert np.isnan(double_quantized(absmax, kernel)).all()
