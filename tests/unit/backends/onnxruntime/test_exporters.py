"""Graphs of other exporters: kept where their logits are the merged model's, refused where not.

`OPTIMUM_PYTHON=PATH pytest -m peer` runs optimum-onnx too; exporters.py says how to make an interpreter that has it.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora2edge.adapters import MergedCheckpoint, merge, read_adapter
from lora2edge.artifact import write_manifest
from lora2edge.backends.onnxruntime import OnnxRuntimeBackend, export_run
from lora2edge.backends.onnxruntime.export_examples import longest_example, make_examples
from lora2edge.backends.onnxruntime.export_graph import count_products, load_graph, quantize_dynamic
from lora2edge.backends.onnxruntime.exporters import builder_architectures
from lora2edge.backends.onnxruntime.finalize import finalize
from lora2edge.checkpoint import open_checkpoint
from lora2edge.contracts import Checkpoint, Machine, SessionOptions
from lora2edge.errors import GateError, InputError, UnsupportedError
from lora2edge.progress import SILENT
from lora2edge.target import Target
from tests.tiny import bpe_tokenizer, make_adapter, make_checkpoint, randomize

Granite = tuple[MergedCheckpoint, Path, Path]
VOCAB = 384
MACHINE = Machine(2, 8 << 30, 8 << 30, None)
GRANITE = {
    "embedding_multiplier": 3.0, "attention_multiplier": 0.2, "residual_multiplier": 0.5, "logits_scaling": 2.0,
}  # fmt: skip
DECODER = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "tie_word_embeddings": False,
}  # fmt: skip
ENCODER = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "num_labels": 3, "pad_token_id": 0,
}  # fmt: skip


def make(folder: Path, model: str, config: str, settings: dict[str, Any]) -> Path:
    """A checkpoint folder of any architecture."""
    import transformers

    made = getattr(transformers, model)(getattr(transformers, config)(**settings)).float().eval()
    randomize(made, 0)
    made.save_pretrained(folder)
    bpe_tokenizer(VOCAB - 8).save_pretrained(folder)
    return folder


def target(precision: str, *, device: Any = "cpu", **options: Any) -> Target:
    return Target(name="t", backend="onnxruntime", precision=precision, device=device, options=options)


def lower(view: Checkpoint, wanted: Target, out: Path) -> Any:
    out.mkdir()
    return OnnxRuntimeBackend().lower(view, wanted, None, out, SILENT)


def refused(view: Checkpoint, wanted: Target) -> InputError:
    with pytest.raises(InputError) as caught:
        OnnxRuntimeBackend().check(view, wanted, MACHINE)
    return caught.value


@pytest.fixture(scope="module")
def granite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Granite]:
    """An architecture of the builder's and not of ours: the merged view, its base and its adapter."""
    root = tmp_path_factory.mktemp("granite")
    base = make(root / "base", "GraniteForCausalLM", "GraniteConfig", {**DECODER, **GRANITE})
    adapter = make_adapter(root / "adapter", base)
    view = merge(open_checkpoint(base), [read_adapter(str(adapter))])
    yield view, base, adapter
    view.close()


@pytest.fixture(scope="module")
def live(granite: Granite) -> Any:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    _, base, adapter = granite
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()


@pytest.fixture(scope="module")
def electra(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkpoint]:
    folder = tmp_path_factory.mktemp("electra") / "base"
    view = open_checkpoint(
        make(folder, "ElectraForSequenceClassification", "ElectraConfig", {**ENCODER, "embedding_size": 32})
    )
    yield view
    view.close()


PROMPTS = [[5, 9, 7], list(range(20, 60)), [30, 31, 32, 33, 34, 35, 36, 37]]


def expected(model: Any, ids: list[int]) -> Any:
    import torch

    with torch.inference_mode():
        return model(input_ids=torch.tensor([ids])).logits[0].numpy()


def test_granite_is_written_by_the_builder(granite: Granite, live: Any, tmp_path: Path) -> None:
    import onnxruntime_genai

    view, _, _ = granite
    backend, wanted, out = OnnxRuntimeBackend(), target("fp32", optimum_python="/here/python"), tmp_path / "out"
    estimate = backend.check(view, wanted, MACHINE)
    assert "onnxruntime-genai's builder" in estimate.notes[0] and estimate.max_length == 64
    lowered = lower(view, wanted, out)
    assert lowered.notes["exporter"]["checked"]["bound"] == 1e-4
    assert lowered.versions["onnxruntime-genai"] and str(tmp_path) not in str(lowered)
    names = {path.name for path in out.iterdir()}
    assert {"model.onnx", "model.onnx.data", "genai_config.json", "config.json", "tokenizer.json"} <= names
    assert not [path for path in out.iterdir() if path.is_dir()], "scratch is left"
    assert backend.damage(view, out, SILENT) == []
    facts = {"versions": lowered.versions, "notes": lowered.notes}
    write_manifest(out, view, wanted, facts, key="", calibration=None, merge_base=None)
    assert "/here" not in (out / "manifest.json").read_text()
    for packed in (False, True):
        if packed:
            finalize(out)
        with backend.open(out, wanted, SessionOptions("cpu", 1, 2, 64)) as session:  # type: ignore[attr-defined]
            found = list(session.logits(PROMPTS, [range(len(ids)) for ids in PROMPTS]))
            answers = [list(session.generate(ids, max_new=8, stop=[])) for ids in PROMPTS]
        for ids, logits in zip(PROMPTS, found, strict=True):
            reference = expected(live, ids)
            assert np.abs(logits - reference).max() < 1e-5 * np.abs(reference).max()
    model = onnxruntime_genai.Model(str(out))
    for ids, answer in zip(PROMPTS, answers, strict=True):
        settings = onnxruntime_genai.GeneratorParams(model)
        settings.set_search_options(max_length=len(ids) + 8, do_sample=False)
        generator = onnxruntime_genai.Generator(model, settings)
        generator.append_tokens(np.array([ids], np.int32))
        steps = []
        while not generator.is_done() and len(steps) < 8:
            generator.generate_next_token()
            steps.append(int(generator.get_next_tokens()[0]))
        assert steps and steps == answer[: len(steps)]
        sequence = [*ids]
        for token in answer:
            assert int(expected(live, sequence)[-1].argmax()) == token
            sequence.append(token)


def test_int4_has_integer_products(granite: Granite, live: Any, tmp_path: Path) -> None:
    view, _, _ = granite
    wanted, out = target("int4", block=32), tmp_path / "out"
    lowered = lower(view, wanted, out)
    assert lowered.notes["tensor_types"] == {"int4 in blocks of 32": 10, "int8 in blocks of 32": 1}
    with OnnxRuntimeBackend().open(out, wanted, SessionOptions("cpu", 1, 1, 64)) as session:  # type: ignore[attr-defined]
        (found,) = session.logits([PROMPTS[1]], [range(40)])
    reference = expected(live, PROMPTS[1])
    error = np.linalg.norm(found - reference) / np.linalg.norm(reference)
    assert 1e-4 < error < 0.4, "rounded, and the same model"


def test_a_window_that_the_builder_forgets(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base", "mistral", dtype="float32", sliding_window=150, layers=1)
    view, wanted, out = open_checkpoint(base), target("fp32", exporter="genai"), tmp_path / "out"
    with pytest.raises(GateError) as caught:
        lower(view, wanted, out)
    error = caught.value
    assert error.code == "export-wrong" and error.exit_code == 3
    assert "of 158" in error.what and "a prompt of 128 tokens: " in error.why
    assert "exporter: lora2edge" in error.hint
    assert not list(out.iterdir()), "nothing is kept"
    view.close()


def test_the_builder_s_failure_is_told(granite: Granite, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(export_run, "_BUILDER", "no_such_builder")
    out = tmp_path / "out"
    with pytest.raises(UnsupportedError) as caught:
        lower(granite[0], target("fp32"), out)
    assert caught.value.code == "export-failed" and "No module named" in caught.value.why
    assert not list(out.iterdir())


def test_the_builder_s_architectures_are_read_from_its_source() -> None:
    known = builder_architectures()
    assert {"GraniteForCausalLM", "SmolLM3ForCausalLM", "OlmoForCausalLM", "MistralForCausalLM"} <= known
    assert not {"Olmo2ForCausalLM", "GPT2LMHeadModel", "PhiMoEForCausalLM"} & known


def test_what_is_not_installed_is_named(granite: Granite, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnx_ir" else find(name))
    error = refused(granite[0], target("fp32"))
    assert error.code == "onnx-architecture" and "onnx_ir is not installed" in error.why
    assert error.hint == "pip install 'lora2edge[torch,onnxruntime-genai]'"


def test_nobody_knows_it(tmp_path: Path) -> None:
    view = open_checkpoint(make(tmp_path / "base", "Olmo2ForCausalLM", "Olmo2Config", DECODER))
    for options in ({}, {"exporter": "genai"}):
        error = refused(view, target("fp32", **options))
        assert error.code == "onnx-architecture" and "Olmo2ForCausalLM" in error.what
        assert "LlamaForCausalLM" in error.why and "GraniteForCausalLM" in error.why
    assert refused(view, target("fp32", exporter="lora2edge")).code == "onnx-architecture"
    assert refused(view, target("fp32", exporter="optimum")).code == "exporter-option"
    view.close()


def test_the_builder_has_a_time_limit(granite: Granite, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(export_run, "_LIMIT_S", 0.01)
    out = tmp_path / "out"
    with pytest.raises(InputError) as caught:
        lower(granite[0], target("fp32"), out)
    assert caught.value.code == "export-timeout" and not list(out.iterdir())


@pytest.mark.parametrize(
    ("wanted", "code"),
    [
        (target("int8-dynamic"), "exporter-precision"),
        (target("fp16", device="cuda"), "exporter-device"),
        (target("int4", rounding="gptq"), "exporter-option"),
        (target("int4", overrides={"*": 8}), "exporter-option"),
        (target("int4", head_bits=16), "exporter-option"),
        (target("int4", exporter="lora2edge"), "onnx-architecture"),
        (target("int4", exporter="nobody"), "onnx-option"),
    ],
)
def test_what_the_builder_cannot_follow(granite: Granite, wanted: Target, code: str) -> None:
    error = refused(granite[0], wanted)
    assert getattr(error, "errors", (error,))[0].code == code


def test_classifiers_need_an_interpreter(electra: Checkpoint) -> None:
    error = refused(electra, target("int8-dynamic"))
    assert error.code == "onnx-architecture" and "bert" in error.why and "transformers below 4.58" in error.why
    assert "optimum-onnx" in error.hint and "optimum_python" in error.hint
    assert refused(electra, target("fp32", optimum_python="nowhere/python")).code == "optimum-python"
    assert refused(electra, target("fp32", optimum_python="/bin/false")).code == "optimum-python"
    error = refused(electra, target("int4", optimum_python="nowhere/python"))
    assert {single.code for single in error.errors} == {"exporter-precision", "optimum-python"}  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("config", "longest"),
    [
        ({"max_position_embeddings": 4096}, 128),
        ({"max_position_embeddings": 4096, "sliding_window": 1024}, 1032),
        ({"max_position_embeddings": 4096, "sliding_window": 1024, "use_sliding_window": False}, 128),
        ({"max_position_embeddings": 4096, "sliding_window": 8192}, 128),
        ({"max_position_embeddings": 4096, "rope_scaling": {"original_max_position_embeddings": 2048}}, 2056),
        ({"max_position_embeddings": 16}, 16),
    ],
)
def test_the_longest_prompt_is_beyond_the_window(config: dict[str, Any], longest: int) -> None:
    assert longest_example(config) == longest


def test_pairs_of_texts_are_among_the_examples(electra: Checkpoint) -> None:
    examples = make_examples(electra)
    assert [len(example.ids) for example in examples] == [5, 24, 62]
    assert all(set(example.types) == {0, 1} and 0 not in example.ids for example in examples)
    assert examples == make_examples(electra)


def test_layers_become_integers_and_the_head_stays_float(tmp_path: Path) -> None:
    """Two products with one matrix, one of them under another name, and a Gemm."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    random = np.random.default_rng(0)
    weights = {"w": random.standard_normal((8, 8)), "v": random.standard_normal((8, 3))}
    nodes = [
        helper.make_node("Identity", ["w"], ["w2"], "identity"),
        helper.make_node("MatMul", ["x", "w"], ["a"], "first"),
        helper.make_node("MatMul", ["a", "w2"], ["b"], "second"),
        helper.make_node("MatMul", ["b", "b"], ["c"], "attention"),
        helper.make_node("Gather", ["c", "zero"], ["row"], "row", axis=0),
        helper.make_node("Gemm", ["row", "v"], ["logits"], "head"),
    ]
    constants = [numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()]
    constants.append(numpy_helper.from_array(np.array(0, np.int64), "zero"))
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [8, 3])],
        constants,
    )
    exact, made = tmp_path / "exact.onnx", tmp_path / "made.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), exact)
    assert count_products(load_graph(exact)) == {"float32": 3}
    quantize_dynamic(exact, made)
    assert count_products(load_graph(made)) == {"float32": 1, "int8 by rows": 2}
    del graph.node[1:3]
    graph.node.insert(1, helper.make_node("MatMul", ["x", "x"], ["b"], "attention2"))
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), exact)
    with pytest.raises(UnsupportedError) as caught:
        quantize_dynamic(exact, made)
    assert caught.value.code == "export-precision"


@pytest.mark.peer
@pytest.mark.parametrize(
    ("name", "task", "settings"),
    [
        ("Electra", "ForSequenceClassification", {"embedding_size": 32}),
        ("MPNet", "ForSequenceClassification", {}),
        ("Albert", "ForTokenClassification", {"embedding_size": 16}),
    ],
)
def test_classifiers_are_written_by_optimum(name: str, task: str, settings: dict[str, Any], tmp_path: Path) -> None:
    import torch
    import transformers

    python = os.environ.get("OPTIMUM_PYTHON")
    if not python:
        pytest.fail("set OPTIMUM_PYTHON to an interpreter that has optimum-onnx")
    base = make(tmp_path / "base", f"{name}{task}", f"{name}Config", {**ENCODER, **settings})
    model = getattr(transformers, f"{name}{task}").from_pretrained(base).eval()
    view, backend = open_checkpoint(base), OnnxRuntimeBackend()
    for precision, bound in (("fp32", 1e-5), ("int8-dynamic", 0.3)):
        wanted, out = target(precision, optimum_python=python), tmp_path / precision
        lowered = lower(view, wanted, out)
        assert lowered.versions["transformers"].startswith("4.") and backend.damage(view, out, SILENT) == []
        assert ("int8 by rows" in lowered.notes["tensor_types"]) == (precision == "int8-dynamic")
        with backend.open(out, wanted, SessionOptions("cpu", 1, 1, 48)) as session:  # type: ignore[attr-defined]
            texts = [session.encode("a cough for three days"), session.encode("chest pain", "and a fever of 39")]
            found = session.classify(texts)
        for text, logits in zip(texts, found, strict=True):
            more = {"token_type_ids": torch.tensor([text.types])} if text.types else {}
            with torch.inference_mode():
                reference = model(input_ids=torch.tensor([text.ids]), **more).logits[0].numpy()
            assert np.abs(logits - reference).max() <= bound * np.abs(reference).max()
    view.close()
