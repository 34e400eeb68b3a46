"""Every architecture: the graph in ONNX Runtime and onnxruntime-genai gives transformers' logits and tokens."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora2edge.graph.builder import BlockFormat
from tests.tiny import make_checkpoint
from tests.unit.graph.decoders import (
    InPlace,
    Lowered,
    error_of,
    genai_tokens,
    greedy,
    lower,
    open_session,
    pad,
    reference,
    reference_logits,
    reference_tokens,
)

CLOSE = 1e-5
"""Of the largest logit."""
_GEMMA = {"query_pre_attn_scalar": 24, "sliding_window": 8}
MODELS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "llama": ("llama", {"tied": False}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True, "kv_heads": 4}),
    "llama, heads of 24": ("llama", {"head_dim": 24}),
    "mistral": ("mistral", {"tied": False}),
    "mistral with a window": ("mistral", {"sliding_window": 8}),
    "qwen2": ("qwen2", {}),
    "qwen2, a window in some layers": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", {"head_dim": 32, "attention_bias": True}),
    "qwen3, layer_types": (
        "qwen3",
        {
            "use_sliding_window": True,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "gemma2": ("gemma2", {**_GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma2 without caps": (
        "gemma2",
        {**_GEMMA, "attn_logit_softcapping": None, "final_logit_softcapping": None, "tied": False},
    ),
    "gemma3": ("gemma3", {**_GEMMA, "layers": 7}),
    "gemma3, layer_types": (
        "gemma3",
        {**_GEMMA, "layer_types": ["full_attention", "sliding_attention"], "final_logit_softcapping": 3.0},
    ),
    "phi3": ("phi3", {"tied": False}),
    "phi3 with a window": ("phi3", {"sliding_window": 8}),
    "phi3, three quarters rotated": (
        "phi3",
        {"hidden": 256, "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.75}},
    ),
}
TOKENS = 40
FAMILIES = ("llama", "mistral with a window", "qwen2", "qwen3", "gemma2", "gemma3", "phi3")


class Case:
    """A model in transformers and its graph, made when they are first asked for."""

    def __init__(self, folder: Path, name: str) -> None:
        arch, settings = MODELS[name]
        self.base = make_checkpoint(folder / "base", arch, dtype="float32", **settings)
        self.model = reference(self.base)
        self.lowered: Lowered = lower(self.base, folder / "onnx")
        self.ids = np.random.default_rng(1).integers(0, 700, (2, TOKENS))
        self.expected = reference_logits(self.model, self.ids)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, Case] = {}

    def case(name: str) -> Case:
        if name not in made:
            made[name] = Case(tmp_path_factory.mktemp("decoder"), name)
        return made[name]

    return case


@pytest.mark.parametrize("name", MODELS)
def test_prefill(cases: Any, name: str) -> None:
    case = cases(name)
    logits, _ = case.lowered.all(case.ids)
    assert error_of(logits, case.expected) < CLOSE


@pytest.mark.parametrize("name", MODELS)
def test_steps_and_chunks_on_a_cache_in_place(cases: Any, name: str) -> None:
    """Past and present in one buffer that holds more rows than are used; windows are passed by chunks and steps."""
    case = cases(name)
    step, done, found = InPlace(case.lowered, 1, TOKENS + 5), 0, []
    for new in (5, 9, 12, *[1] * 14):
        ids = case.ids[:1, done : done + new]
        done += new
        found.append(step(ids, [done], [range(new)]))
    assert done == TOKENS
    assert error_of(np.concatenate(found, 1), case.expected[:1]) < CLOSE


@pytest.mark.parametrize("name", MODELS)
def test_steps_and_chunks_on_arrays(cases: Any, name: str) -> None:
    case = cases(name)
    found, past = case.lowered.all(case.ids[:1, :20])
    more, past = case.lowered.all(case.ids[:1, 20:33], past=past)
    last, past = case.lowered.all(case.ids[:1, 33:34], past=past)
    assert next(iter(past.values())).shape[2] == 34
    assert error_of(np.concatenate([found, more, last], 1), case.expected[:1, :34]) < CLOSE


@pytest.mark.parametrize("name", MODELS)
def test_a_ragged_batch(cases: Any, name: str) -> None:
    """Padded on the right, then decoded together: each row as if it were alone."""
    case = cases(name)
    lengths = np.array([13, 30, 1])
    ids, _ = pad([case.ids[row % 2, :length] for row, length in enumerate(lengths)])
    step = InPlace(case.lowered, 3, TOKENS)
    logits = step(ids, lengths)
    for _ in range(4):
        expected = np.stack([case.expected[row % 2, length - 1] for row, length in enumerate(lengths)])
        assert error_of(logits[:, 0], expected) < CLOSE
        ids = np.array([[case.ids[row % 2, length]] for row, length in enumerate(lengths)])
        lengths = lengths + 1
        logits = step(ids, lengths)


def test_logits_are_taken_where_they_are_asked_for(cases: Any) -> None:
    case = cases("qwen2")
    expected = case.expected
    last, _ = case.lowered(case.ids)
    assert error_of(last, expected[:, -1:]) < CLOSE
    shared, _ = case.lowered(case.ids, positions=[[3, -1, 0]])
    assert error_of(shared, expected[:, [3, TOKENS - 1, 0]]) < CLOSE
    own, _ = case.lowered(case.ids, lengths=[25, TOKENS], positions=[[-1, 2], [7, -1]])
    assert error_of(own[0], expected[0, [24, 2]]) < CLOSE
    assert error_of(own[1], expected[1, [7, TOKENS - 1]]) < CLOSE


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_tokens(cases: Any, name: str) -> None:
    """50 prompts in plain ONNX Runtime and in onnxruntime-genai, opened from the same folder."""
    case = cases(name)
    prompts = np.random.default_rng(2).integers(0, 700, (50, 16)).tolist()
    expected = reference_tokens(case.model, prompts, 8)
    assert len({tuple(tokens) for tokens in expected}) > 25
    assert greedy(case.lowered, prompts, 8) == expected
    end = case.lowered.decoder.vocab_rows - 1  # where genai stops
    until = [tokens[: tokens.index(end)] if end in tokens else tokens for tokens in expected]
    assert genai_tokens(case.lowered.folder, prompts, 8) == until


def test_a_window_is_not_off_by_one(cases: Any, tmp_path: Path) -> None:
    """One token more or less in the window shows, so that the comparisons above can fail."""
    import onnx

    case = cases("mistral with a window")
    for window in (7, 9):
        model = onnx.load(case.lowered.folder / "model.onnx", load_external_data=False)
        for node in model.graph.node:
            for attribute in node.attribute:
                if attribute.name == "local_window_size":
                    assert attribute.i == 8
                    attribute.i = window
        folder = tmp_path / str(window)
        folder.mkdir()
        (folder / "model.onnx").write_bytes(model.SerializeToString())
        (folder / "model.onnx.data").write_bytes((case.lowered.folder / "model.onnx.data").read_bytes())
        changed = Lowered(folder, case.lowered.decoder, case.lowered.checkpoint, open_session(folder))
        logits, _ = changed.all(case.ids)
        assert error_of(logits[:, :7], case.expected[:, :7]) < CLOSE
        assert error_of(logits, case.expected) > 1e-2


@pytest.mark.parametrize("form", [None, BlockFormat(8, 32)], ids=str)
def test_half_precision(tmp_path: Path, form: BlockFormat | None) -> None:
    """float16 graphs are CUDA's; the CPU runs them through casts, which is enough to compare."""
    base = make_checkpoint(tmp_path / "base", "gemma2", dtype="float32", query_pre_attn_scalar=24)
    ids = np.random.default_rng(1).integers(0, 700, (1, 20))
    lowered = lower(base, tmp_path / "onnx", form, float_type="float16")
    step = InPlace(lowered, 1, 30)
    found = [step(ids[:, :15], [15], [range(15)]), *(step(ids[:, t : t + 1], [t + 1]) for t in range(15, 20))]
    assert found[0].dtype == np.float32
    assert lowered.dtype == "float16"
    expected = reference_logits(reference(base), ids)
    assert error_of(np.concatenate(found, 1), expected) < (0.05 if form else 0.01)


def test_bfloat16_has_no_kernels_on_a_cpu(tmp_path: Path) -> None:
    """The types of such a graph agree: what ONNX Runtime misses are kernels."""
    base = make_checkpoint(tmp_path / "base", "gemma3")
    with pytest.raises(Exception, match="NOT_IMPLEMENTED"):
        lower(base, tmp_path / "onnx", float_type="bfloat16")
