"""Every kind of rotary embedding, from configs of transformers 4 and 5, beside transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora2edge.checkpoint import open_checkpoint
from lora2edge.errors import CheckpointError, InputError, UnsupportedError
from lora2edge.graph.decoder import describe_decoder
from tests.tiny import make_checkpoint
from tests.unit.graph.decoders import (
    InPlace,
    error_of,
    genai_tokens,
    greedy,
    lower,
    pad,
    reference,
    reference_logits,
    reference_tokens,
)

CLOSE = 1e-5
TOKENS = 100
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0}
_LONG = {
    "rope_type": "longrope",
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [2.0 + 0.3 * i for i in range(8)],
}
ROPES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "theta": ("qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}),
    "linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 20000.0}}),
    "llama3": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 128,
                "rope_theta": 10000.0,
            }
        },
    ),
    "yarn": ("qwen3", {"rope_parameters": _YARN}),
    "yarn, attention_factor": ("llama", {"rope_parameters": {**_YARN, "attention_factor": 0.8}}),
    "yarn, mscale": (
        "mistral",
        {
            "rope_parameters": {
                **_YARN,
                "mscale": 0.7,
                "mscale_all_dim": 0.3,
                "truncate": False,
                "beta_fast": 8.0,
                "beta_slow": 2.0,
            }
        },
    ),
    "longrope, short": ("phi3", {"rope_parameters": _LONG, "original_max_position_embeddings": 256}),
    "longrope, long": ("phi3", {"rope_parameters": _LONG, "original_max_position_embeddings": 64}),
    "longrope, part of a head": (
        "phi3",
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "partial_rotary_factor": 0.5,
                "short_factor": [1.0, 1.5, 2.0, 2.5],
                "long_factor": [2.0, 3.5, 4.0, 5.5],
                "attention_factor": 1.3,
            },
            "original_max_position_embeddings": 64,
        },
    ),
    "longrope, llama": ("llama", {"rope_parameters": {**_LONG, "original_max_position_embeddings": 64, "factor": 8.0}}),
    "two ropes": (
        "gemma3",
        {
            "layer_types": ["full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
            },
        },
    ),
}


def as_transformers_4(base: Path, folder: Path) -> Path:
    """The same checkpoint with its rope written as transformers 4 did."""
    shutil.copytree(base, folder)
    config = json.loads((folder / "config.json").read_text())
    params = config.pop("rope_parameters")
    if "full_attention" in params:
        config["rope_local_base_freq"] = params["sliding_attention"]["rope_theta"]
        params = params["full_attention"]
    config["rope_theta"] = params.pop("rope_theta")
    if "partial_rotary_factor" in params:
        config["partial_rotary_factor"] = params.pop("partial_rotary_factor")
    if params.get("rope_type", "default") != "default":
        if config["model_type"] == "phi3":
            params.pop("original_max_position_embeddings", None)
        if config["model_type"] != "gemma3_text":
            params["type"] = params.pop("rope_type")
        config["rope_scaling"] = params
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def describe(base: Path, **changes: Any) -> Any:
    checkpoint = open_checkpoint(base)
    config = {key: value for key, value in {**checkpoint.config, **changes}.items() if value != "absent"}
    return describe_decoder(config, checkpoint.tensors)


@pytest.mark.parametrize("name", ROPES)
def test_a_rope(tmp_path: Path, name: str) -> None:
    arch, settings = ROPES[name]
    base = make_checkpoint(tmp_path / "base", arch, dtype="float32", **settings)
    model, lowered = reference(base), lower(base, tmp_path / "onnx")
    ids = np.random.default_rng(4).integers(0, 700, (1, TOKENS))
    expected = reference_logits(model, ids)
    assert error_of(lowered.all(ids)[0], expected) < CLOSE
    old = as_transformers_4(base, tmp_path / "old")
    assert error_of(reference_logits(reference(old), ids), expected) < CLOSE
    assert describe(old) == lowered.decoder
    if arch == "phi3":
        for word in ("su", "yarn"):
            params = {**lowered.checkpoint.config["rope_parameters"], "rope_type": word}
            assert describe(base, rope_parameters=params) == lowered.decoder
    # Without the scaling the model is another.
    plain = describe(base, rope_parameters="absent", rope_scaling="absent", rope_theta=9000.0)
    assert plain.layers[0].rope != lowered.decoder.layers[0].rope
    short = reference_logits(model, ids[:, :50])
    step = InPlace(lowered, 1, TOKENS)
    found = [step(ids[:, :30], [30], [range(30)]), *(step(ids[:, t : t + 1], [t + 1]) for t in range(30, 50))]
    assert error_of(np.concatenate(found, 1), short) < CLOSE
    chunk, past = lowered.all(ids[:, :20])
    assert error_of(np.concatenate([chunk, lowered.all(ids[:, 20:50], past=past)[0]], 1), short) < CLOSE
    prompts = np.random.default_rng(5).integers(0, 700, (50, 70)).tolist()
    tokens = reference_tokens(model, prompts, 5)
    assert greedy(lowered, prompts, 5) == tokens
    end = lowered.decoder.vocab_rows - 1  # where genai stops
    assert genai_tokens(lowered.folder, prompts, 5) == [row[: row.index(end)] if end in row else row for row in tokens]


@pytest.mark.parametrize("name", ROPES)
def test_frequencies(tmp_path: Path, name: str) -> None:
    """Those of transformers, to the last place or the one before."""
    arch, settings = ROPES[name]
    base = make_checkpoint(tmp_path / "base", arch, dtype="float32", **settings)
    embedding = reference(base).model.rotary_emb
    for layer, kind in zip(describe(base).layers, ("full_attention", "sliding_attention"), strict=True):
        prefix = f"{kind}_" if name == "two ropes" else ""
        expected = getattr(embedding, f"{prefix}inv_freq").numpy()
        np.testing.assert_array_max_ulp(np.float32(layer.rope.frequencies), expected, 2)
        assert layer.rope.scale == pytest.approx(getattr(embedding, f"{prefix}attention_scaling"), rel=1e-12)


def test_longrope_goes_by_each_rows_length(tmp_path: Path) -> None:
    """In a batch of a short and a long row, each is as if it were alone; transformers goes by the longest."""
    arch, settings = ROPES["longrope, long"]
    base = make_checkpoint(tmp_path / "base", arch, dtype="float32", **settings)
    model, lowered = reference(base), lower(base, tmp_path / "onnx")
    ids = np.random.default_rng(4).integers(0, 700, (3, TOKENS))
    lengths = np.array([64, 40, 65])
    step = InPlace(lowered, 3, TOKENS)
    logits = step(pad([row[:length] for row, length in zip(ids, lengths, strict=True)])[0], lengths, [[5, -1]])
    for row, length in enumerate(lengths):
        expected = reference_logits(model, ids[row : row + 1, :length])
        assert error_of(logits[row], expected[0, [5, -1]]) < CLOSE


def test_longrope_that_grows_past_its_switch(tmp_path: Path) -> None:
    """On the old cache as transformers' forward on its old cache; filled again, as transformers generates."""
    import torch

    arch, settings = ROPES["longrope, long"]
    base = make_checkpoint(tmp_path / "base", arch, dtype="float32", **settings)
    model, lowered = reference(base), lower(base, tmp_path / "onnx")
    assert lowered.decoder.recompute_length == 64
    ids = np.random.default_rng(4).integers(0, 700, (1, 70))
    step = InPlace(lowered, 1, TOKENS)
    found = [step(ids[:, :62], [62]), *(step(ids[:, t : t + 1], [t + 1]) for t in range(62, 70))]
    with torch.no_grad():
        out = model(torch.tensor(ids[:, :62]), use_cache=True)
        expected = [out.logits[:, -1:]]
        for position in range(62, 70):
            out = model(torch.tensor(ids[:, position : position + 1]), past_key_values=out.past_key_values)
            expected.append(out.logits)
        tokens = model.generate(
            torch.tensor(ids[:, :62]), max_new_tokens=10, min_new_tokens=10, do_sample=False, eos_token_id=None
        )[0].tolist()
    assert error_of(np.concatenate(found, 1), torch.cat(expected, 1).numpy()) < CLOSE
    step, sequence = InPlace(lowered, 1, TOKENS), ids[0, :62].tolist()
    logits = step([sequence], [62])
    while len(sequence) < 72:
        sequence.append(int(logits[0, -1].argmax()))
        new = sequence if len(sequence) == lowered.decoder.recompute_length + 1 else sequence[-1:]
        logits = step([new], [len(sequence)])
    assert sequence == tokens


@pytest.mark.parametrize(
    ("arch", "params"),
    [
        ("llama", {"rope_type": "dynamic", "factor": 2.0}),
        ("llama", {"rope_type": "proportional", "partial_rotary_factor": 0.5}),
        ("llama", {"rope_type": "su", "factor": 2.0}),
        ("qwen2", {"rope_type": "default", "mrope_section": [2, 3, 3]}),
        ("qwen2", {"rope_type": "mrope"}),
        ("qwen3", {"rope_type": "default", "partial_rotary_factor": 0.5}),
        ("qwen2", {"full_attention": {"rope_type": "default"}}),
        ("phi3", {"rope_type": "linear", "factor": 2.0}),
        ("phi3", {"rope_type": "default", "partial_rotary_factor": 0.01}),
        ("gemma3", {"rope_type": "linear", "factor": 8.0}),
        ("gemma3", {"full_attention": {"rope_type": "dynamic", "factor": 8.0}}),
    ],
)
def test_other_ropes_are_refused(tmp_path: Path, arch: str, params: dict[str, Any]) -> None:
    base = make_checkpoint(tmp_path / "base", arch)
    with pytest.raises(UnsupportedError) as refused:
        describe(base, rope_parameters=params)
    assert refused.value.code == "onnx-rope"


def test_a_type_that_transformers_ignores(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base", "gemma3")
    with pytest.raises(UnsupportedError, match="no rope_type"):
        describe(base, rope_parameters="absent", rope_scaling={"type": "linear", "factor": 8.0})


@pytest.mark.parametrize(
    ("arch", "params"),
    [
        ("llama", {"rope_type": "linear"}),
        ("llama", {"rope_type": "linear", "factor": -1.0}),
        ("llama", {"rope_type": "linear", "factor": True}),
        ("llama", {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0}),
        ("llama", {"rope_type": "default", "rope_theta": 0}),
        ("llama", {"rope_type": "yarn", "factor": 4.0, "attention_factor": "high"}),
        ("phi3", {"rope_type": "longrope", "short_factor": [1.0] * 7, "long_factor": [1.0] * 8}),
        ("phi3", {"rope_type": "longrope", "short_factor": [1.0] * 8}),
        ("phi3", {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [0.0] * 8}),
    ],
)
def test_parameters_that_make_no_rope(tmp_path: Path, arch: str, params: dict[str, Any]) -> None:
    base = make_checkpoint(tmp_path / "base", arch)
    with pytest.raises(InputError) as refused:
        describe(base, rope_parameters=params)
    assert isinstance(refused.value, CheckpointError)
    assert refused.value.code == "config-key"
