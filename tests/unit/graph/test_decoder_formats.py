"""Integer weights: the graph computes what transformers computes with the weights that the integers stand for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora2edge.checkpoint import open_checkpoint
from lora2edge.graph.builder import BlockFormat, ChannelFormat, FloatFormat, Format
from lora2edge.graph.decoder import describe_decoder
from tests.tiny import make_checkpoint
from tests.unit.graph.decoders import InPlace, Lowered, Nearest, error_of, lower, reference, reference_logits

INT4, INT8 = BlockFormat(4, 32), BlockFormat(8, 32)
MODELS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "qwen2": ("qwen2", {}),
    "llama": ("llama", {"tied": False, "attention_bias": True, "mlp_bias": True}),
    "gemma3": ("gemma3", {}),
    "phi3": ("phi3", {"tied": False}),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {
        name: make_checkpoint(folder / name, arch, dtype="float32", hidden=96, heads=6, kv_heads=3, **settings)
        for name, (arch, settings) in MODELS.items()
    }


def rounded_model(lowered: Lowered, base: Path, formats: Mapping[str, Format], *, dynamic: bool = False) -> Any:
    """transformers' model with the weights that the integers stand for."""
    import torch

    model, rounder = reference(base), Nearest(lowered.checkpoint)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in formats:
                parameter.copy_(torch.tensor(rounder.rounded(name, formats[name])))
    if dynamic:
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_pre_hook(lambda module, inputs: (dynamic_levels(inputs[0]),))
    return model


def dynamic_levels(x: Any) -> Any:
    """ONNX's DynamicQuantizeLinear, and back."""
    low, high = x.min().clamp(max=0), x.max().clamp(min=0)
    step = (high - low) / 255
    zero = (-low / step).round().clamp(0, 255)
    return ((x / step).round() + zero).clamp(0, 255).sub(zero) * step


def everywhere(base: Path, form: Format, **others: Format) -> dict[str, Format]:
    """`form` for every matrix but those of the roles in `others`."""
    checkpoint = open_checkpoint(base)
    decoder = describe_decoder(checkpoint.config, checkpoint.tensors)
    return {matrix.name: others.get(matrix.role, form) for matrix in decoder.matrices}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("form", [INT4, INT8, BlockFormat(4, 64), BlockFormat(8, 128), BlockFormat(4, 16)], ids=str)
def test_blocks(bases: dict[str, Path], tmp_path: Path, name: str, form: Format) -> None:
    """96 columns: blocks of 64 and 128 have a tail, in products and in embeddings."""
    formats = everywhere(bases[name], form)
    lowered = lower(bases[name], tmp_path / "onnx", formats)
    ids = np.random.default_rng(3).integers(0, 700, (2, 20))
    expected = reference_logits(rounded_model(lowered, bases[name], formats), ids)
    assert error_of(lowered.all(ids)[0], expected) < 1e-5
    assert error_of(expected, reference_logits(reference(bases[name]), ids)) > 1e-3


@pytest.mark.parametrize("name", MODELS)
def test_mixed_formats(bases: dict[str, Path], tmp_path: Path, name: str) -> None:
    """A head, and query, key and value, each in its own format: float16 stored, 4, 8 bits and none."""
    base = bases[name]
    formats = everywhere(base, INT4, head=INT8, down=FloatFormat("float16"), embedding=INT8, o=FloatFormat("bfloat16"))
    formats = {key: value for key, value in formats.items() if "layers.1.self_attn.k_proj" not in key}
    formats |= {key: INT8 for key in formats if "v_proj" in key}
    lowered = lower(base, tmp_path / "onnx", formats)
    ids = np.random.default_rng(3).integers(0, 700, (2, 20))
    model = rounded_model(lowered, base, formats)
    import torch

    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if isinstance(form := formats.get(key), FloatFormat):
                parameter.copy_(parameter.to(getattr(torch, form.dtype)).float())
    expected = reference_logits(model, ids)
    step = InPlace(lowered, 1, 30)
    found = [step(ids[:1, :15], [15], [range(15)]), *(step(ids[:1, t : t + 1], [t + 1]) for t in range(15, 20))]
    assert error_of(np.concatenate(found, 1), expected[:1]) < 1e-5


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["qwen2", "llama"])
def test_a_head_of_16_bits(bases: dict[str, Path], tmp_path: Path, name: str, dtype: Any) -> None:
    """In a float32 graph; a tied one is stored once."""
    import torch

    base = bases[name]
    formats = everywhere(base, INT4, head=FloatFormat(dtype), embedding=FloatFormat(dtype))
    lowered = lower(base, tmp_path / "onnx", formats)
    model = rounded_model(lowered, base, formats)
    with torch.no_grad():
        for parameter in (model.get_input_embeddings().weight, model.lm_head.weight):
            parameter.copy_(parameter.to(getattr(torch, dtype)).float())
    ids = np.random.default_rng(3).integers(0, 700, (2, 20))
    assert error_of(lowered.all(ids)[0], reference_logits(model, ids)) < 1e-5


@pytest.mark.parametrize("name", MODELS)
def test_dynamic_activations(bases: dict[str, Path], tmp_path: Path, name: str) -> None:
    """int8 per row, activations of 8 bits: a value that lies between two levels may fall to either side."""
    base = bases[name]
    formats = everywhere(base, ChannelFormat())
    lowered = lower(base, tmp_path / "onnx", formats)
    ids = np.random.default_rng(3).integers(0, 700, (1, 20))
    found = lowered.all(ids)[0]
    expected = reference_logits(rounded_model(lowered, base, formats, dynamic=True), ids)
    plain = reference_logits(rounded_model(lowered, base, formats), ids)
    assert error_of(found, expected) < 2e-3 < error_of(found, plain) < 5e-2


def test_int8_activations_of_accuracy_level_4(bases: dict[str, Path], tmp_path: Path) -> None:
    base = bases["llama"]
    formats = everywhere(base, INT4)
    lowered = lower(base, tmp_path / "onnx", formats, accuracy_level=4)
    ids = np.random.default_rng(3).integers(0, 700, (2, 20))
    expected = reference_logits(rounded_model(lowered, base, formats), ids)
    assert error_of(lowered.all(ids)[0], expected) < 5e-2


def test_a_tied_head_is_stored_once(bases: dict[str, Path], tmp_path: Path) -> None:
    """Product and embedding read the same bytes, whatever their format."""
    sizes = {"float32": 4, "int4": 0.5 + 4 / 32, "int8": 1}
    for (word, weight), form in zip(sizes.items(), (FloatFormat(), INT4, ChannelFormat()), strict=True):
        formats: dict[str, Format] = {"model.embed_tokens.weight": form}
        lowered = lower(bases["qwen2"], tmp_path / word, formats)
        others = sum(info.size for name, info in lowered.checkpoint.tensors.items() if "embed" not in name)
        tables = 2 * lowered.decoder.context_length * lowered.decoder.head_dim // 2
        size = (lowered.folder / "model.onnx.data").stat().st_size
        assert size == pytest.approx(4 * (others + tables) + 768 * 96 * weight, abs=20_000)
