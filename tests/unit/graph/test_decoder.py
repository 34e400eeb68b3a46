"""The description of a decoder: every tensor has a place, every place a tensor, and what is not known is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora2edge.checkpoint import open_checkpoint
from lora2edge.contracts import TensorInfo
from lora2edge.errors import InputError, Refusals, TargetError, UnsupportedError
from lora2edge.graph.builder import ChannelFormat
from lora2edge.graph.decoder import Decoder, describe_decoder
from lora2edge.graph.ort_decoder import write_ort_decoder
from tests.tiny import ARCHES, make_checkpoint
from tests.unit.graph.decoders import error_of, lower, reference, reference_logits


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {arch: make_checkpoint(folder / arch, arch) for arch in ARCHES}


def describe(base: Path, tensors: dict[str, TensorInfo | None] | None = None, **changes: Any) -> Decoder:
    """The checkpoint with other settings; tensors are added, or left out where None is given."""
    checkpoint = open_checkpoint(base)
    config = {key: value for key, value in {**checkpoint.config, **changes}.items() if value != "absent"}
    merged = {**checkpoint.tensors, **(tensors or {})}
    return describe_decoder(config, {name: info for name, info in merged.items() if info is not None})


def codes(base: Path, tensors: dict[str, TensorInfo | None] | None = None, **changes: Any) -> list[str]:
    with pytest.raises(InputError) as refused:
        describe(base, tensors, **changes)
    errors = refused.value.errors if isinstance(refused.value, Refusals) else (refused.value,)
    return [error.code for error in errors]


def info(name: str, *shape: int) -> dict[str, TensorInfo | None]:
    return {name: TensorInfo(name, shape, "F32", "model.safetensors")}


@pytest.mark.parametrize("arch", ARCHES)
def test_every_matrix_is_listed_once(bases: dict[str, Path], arch: str) -> None:
    checkpoint = open_checkpoint(bases[arch])
    decoder = describe_decoder(checkpoint.config, checkpoint.tensors)
    found = {matrix.name: (matrix.rows, matrix.columns) for matrix in decoder.matrices}
    assert len(found) == len(decoder.matrices)
    assert found == {name: info.shape for name, info in checkpoint.tensors.items() if len(info.shape) == 2}
    roles = [matrix.role for matrix in decoder.matrices if matrix.layer == 1]
    assert roles == (
        ["qkv", "o", "gate_up", "down"] if arch == "phi3" else ["qkv", "qkv", "qkv", "o", "gate", "up", "down"]
    )
    assert decoder.is_tied
    assert [matrix.role for matrix in decoder.matrices if matrix.layer is None] == ["head"]
    assert hash(decoder) == hash(describe(bases[arch]))


def test_geometry(bases: dict[str, Path]) -> None:
    decoder = describe(bases["gemma2"])
    assert (decoder.heads, decoder.kv_heads, decoder.head_dim, decoder.hidden) == (4, 2, 16, 64)
    assert (decoder.context_length, decoder.vocab_rows, decoder.architecture) == (512, 768, "gemma2")
    assert [layer.window for layer in decoder.layers] == [16, None]
    untied = describe(bases["llama"], info("lm_head.weight", 768, 64), tie_word_embeddings=False)
    assert [(matrix.name, matrix.role) for matrix in untied.matrices if matrix.layer is None] == [
        ("model.embed_tokens.weight", "embedding"),
        ("lm_head.weight", "head"),
    ]


def test_what_transformers_takes_where_the_config_is_silent(bases: dict[str, Path]) -> None:
    import transformers

    assert describe(bases["mistral"], sliding_window="absent").layers[0].window == 4096
    assert describe(bases["qwen2"], sliding_window=8).layers[1].window is None
    windows = describe(bases["qwen2"], sliding_window=8, use_sliding_window=True, layer_types="absent").layers
    assert [layer.window for layer in windows] == [None, None]  # max_window_layers is 28
    silent = describe(bases["gemma3"], layer_types="absent", sliding_window_pattern=2).layers
    assert [layer.window for layer in silent] == [16, None]
    gemma = describe(bases["gemma2"], attn_logit_softcapping="absent", final_logit_softcapping="absent")
    config = transformers.Gemma2Config()
    assert gemma.attention_softcap == config.attn_logit_softcapping
    assert gemma.logit_softcap == config.final_logit_softcapping
    assert describe(bases["gemma2"], final_logit_softcapping=None).logit_softcap is None
    assert describe(bases["llama"], architectures="absent") == describe(bases["llama"])


@pytest.mark.parametrize("tied", [True, False])
def test_a_resized_vocabulary(tmp_path: Path, tied: bool) -> None:
    """Rows are those of the embedding, whatever config.json says of them."""
    base = make_checkpoint(tmp_path / "base", "qwen2", dtype="float32", tied=tied, vocab=771)
    stale = tmp_path / "stale"
    shutil.copytree(base, stale)
    config = json.loads((base / "config.json").read_text())
    (stale / "config.json").write_text(json.dumps({**config, "vocab_size": 768}))
    lowered = lower(stale, tmp_path / "onnx")
    ids = np.array([[770, 769, 3, 768, 12]])
    logits, _ = lowered.all(ids)
    assert logits.shape == (1, 5, 771)
    assert error_of(logits, reference_logits(reference(base), ids)) < 1e-5


def test_a_stored_copy_of_a_tied_head(tmp_path: Path) -> None:
    """It is left out, and named: the caller compares it with the embedding."""
    from safetensors.numpy import load_file, save_file

    base = make_checkpoint(tmp_path / "base", "qwen2", dtype="float32")
    tensors = load_file(base / "model.safetensors")
    assert "lm_head.weight" not in tensors
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    lowered = lower(base, tmp_path / "onnx")
    assert lowered.decoder.tied_copy == ("lm_head.weight", "model.embed_tokens.weight")
    assert "lm_head.weight" not in {matrix.name for matrix in lowered.decoder.matrices}
    ids = np.array([[1, 2, 3]])
    assert error_of(lowered.all(ids)[0], reference_logits(reference(base), ids)) < 1e-5
    assert describe(base, {"lm_head.weight": None}).tied_copy is None


def test_tensors_and_places(bases: dict[str, Path]) -> None:
    base = bases["qwen2"]
    assert codes(base, info("model.layers.0.self_attn.o_proj.bias", 64)) == ["onnx-tensor"]
    assert codes(base, info("model.layers.2.mlp.up_proj.weight", 128, 64)) == ["onnx-tensor"]
    assert codes(base, {"model.layers.1.self_attn.q_proj.bias": None}) == ["onnx-tensor-missing"]
    assert codes(base, info("model.norm.weight", 65)) == ["onnx-shape"]
    assert codes(base, info("model.embed_tokens.weight", 768, 60)) == ["onnx-shape"]
    assert codes(base, tie_word_embeddings=False) == ["onnx-tensor-missing"]
    assert codes(bases["llama"], attention_bias=True) == ["onnx-tensor-missing"]
    assert codes(base, {"model.norm.weight": None} | info("x", 3)) == ["onnx-tensor", "onnx-tensor-missing"]
    frequencies = info("model.layers.0.self_attn.rotary_emb.inv_freq", 8)
    assert describe(base, frequencies) == describe(base)


def test_architectures_that_are_not_known(bases: dict[str, Path]) -> None:
    assert codes(bases["qwen2"], architectures=["Qwen2MoeForCausalLM"]) == ["onnx-architecture"]
    with pytest.raises(UnsupportedError, match="no graph for Qwen9ForCausalLM") as refused:
        describe(bases["qwen2"], architectures=["Qwen9ForCausalLM"])
    assert "nearest: Qwen" in refused.value.hint
    assert codes(bases["qwen2"], architectures="absent", model_type="olmo") == ["onnx-architecture"]


@pytest.mark.parametrize(
    ("arch", "changes", "expected"),
    [
        ("llama", {"hidden_act": "relu"}, ["onnx-config"]),
        ("gemma2", {"hidden_activation": "quick_gelu"}, ["onnx-config"]),
        ("gemma3", {"attn_logit_softcapping": 50.0}, ["onnx-config"]),
        ("gemma3", {"use_bidirectional_attention": True}, ["onnx-config"]),
        ("llama", {"is_causal": False}, ["onnx-config"]),
        ("mistral", {"layer_types": ["full_attention", "sliding_attention"]}, ["onnx-config"]),
        ("qwen2", {"layer_types": ["full_attention"]}, ["onnx-config"]),
        ("qwen3", {"layer_types": ["full_attention", "chunked_attention"]}, ["onnx-config"]),
        ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, ["config-key"]),
        (
            "qwen2",
            {"layer_types": "absent", "use_sliding_window": True, "sliding_window": 8, "max_window_layers": None},
            ["config-key"],
        ),
        ("gemma2", {"sliding_window": None}, ["config-key"]),
        ("gemma3", {"layer_types": "absent", "sliding_window_pattern": "LLG"}, ["config-key"]),
        ("mistral", {"architectures": ["LlamaForCausalLM"]}, ["config-key"]),
        ("llama", {"model_type": "mistral"}, ["config-key"]),
        ("llama", {"num_key_value_heads": 3}, ["config-key"]),
        ("llama", {"num_hidden_layers": 1_000_000}, ["config-key"]),
        ("llama", {"hidden_size": "absent"}, ["config-key"]),
        ("llama", {"rms_norm_eps": "absent"}, ["config-key"]),
        ("llama", {"max_position_embeddings": 0}, ["config-key"]),
        ("llama", {"hidden_act": "relu", "rope_parameters": {"rope_type": "dynamic"}}, ["onnx-config", "onnx-rope"]),
    ],
)
def test_settings_that_are_refused(
    bases: dict[str, Path], arch: str, changes: dict[str, Any], expected: list[str]
) -> None:
    assert codes(bases[arch], **changes) == expected


def test_what_the_dialect_refuses(bases: dict[str, Path]) -> None:
    decoder = describe(bases["qwen2"])
    with pytest.raises(UnsupportedError, match="heads are 12 wide"):
        write_ort_decoder(dataclasses.replace(decoder, head_dim=12), {})
    with pytest.raises(TargetError) as refused:
        write_ort_decoder(decoder, {decoder.matrices[0].name: ChannelFormat()}, float_type="float16")
    assert refused.value.code == "onnx-format"


def test_a_shorter_context_makes_shorter_tables(bases: dict[str, Path]) -> None:
    decoder = describe(bases["qwen2"])
    long, short = (write_ort_decoder(dataclasses.replace(decoder, context_length=length), {}) for length in (512, 128))
    assert long.data_bytes - short.data_bytes == pytest.approx(2 * (512 - 128) * 8 * 4, abs=8192)
