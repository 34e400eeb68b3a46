"""The published configurations of well-known models: each is described as transformers reads it, and has a graph."""

from __future__ import annotations

import importlib

import numpy as np
import pytest

from lora2edge.contracts import TensorInfo
from lora2edge.graph.builder import BlockFormat
from lora2edge.graph.decoder import Decoder, describe_decoder
from lora2edge.graph.decoder_families import FAMILIES
from lora2edge.graph.ort_decoder import write_ort_decoder
from tests.public import public_models, read_model, tensor_shapes

KNOWN = [name for name in public_models() if read_model(name)["config"].get("architectures", [""])[0] in FAMILIES]


def describe(name: str) -> Decoder:
    infos = {key: TensorInfo(key, shape, "BF16", "model.safetensors") for key, shape in tensor_shapes(name).items()}
    return describe_decoder(read_model(name)["config"], infos)


def test_there_are_models_of_every_family() -> None:
    assert {describe(name).architecture for name in KNOWN} == {family.name for family in FAMILIES.values()}


@pytest.mark.parametrize("name", KNOWN)
def test_a_published_model(name: str) -> None:
    """Windows and rotary embeddings up to the last position."""
    import torch
    from transformers import AutoConfig

    decoder = describe(name)
    config = AutoConfig.for_model(**read_model(name)["config"])
    folder = config.model_type.removesuffix("_text")
    module = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    embedding = next(item for key, item in vars(module).items() if key.endswith("RotaryEmbedding"))(config)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * len(decoder.layers)
    window = getattr(config, "sliding_window", None) if decoder.architecture != "llama" else None
    assert [layer.window for layer in decoder.layers] == [
        window if kind == "sliding_attention" else None for kind in kinds
    ]
    for kind, layer in dict(zip(kinds, decoder.layers, strict=True)).items():
        more = {"layer_type": kind} if decoder.architecture == "gemma3_text" else {}
        for position in (1, decoder.context_length - 1):
            cosines, sines = embedding(torch.zeros(1, 1), torch.tensor([[position]]), **more)
            is_long = bool(layer.rope.long_frequencies) and position >= layer.rope.switch
            row = position + (layer.rope.switch if is_long else 0)
            half = layer.rope.dimensions // 2
            for found, expected in ((layer.rope.cosines, cosines), (layer.rope.sines, sines)):
                np.testing.assert_allclose(found(row, row + 1)[0], expected[0, 0, :half].numpy(), atol=2e-5, rtol=0)
    graph = write_ort_decoder(decoder, {matrix.name: BlockFormat(4, 128) for matrix in decoder.matrices})
    weights = sum(matrix.rows * matrix.columns for matrix in decoder.matrices)
    assert weights * 4.25 / 8 < graph.data_bytes < weights * 4.25 / 8 + 0.15e9
