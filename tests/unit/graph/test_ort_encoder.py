"""Graphs of encoders, run by ONNX Runtime, against transformers."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora2edge.adapters import open_view
from lora2edge.contracts import CheckpointRef
from lora2edge.errors import UnsupportedError
from lora2edge.graph.builder import BlockFormat, ChannelFormat, FloatFormat, Format
from lora2edge.graph.encoder import Encoder, Linear
from lora2edge.graph.ranges import ActivationRange, find_ranges
from tests.tiny import bpe_tokenizer, randomize, shake_adapter
from tests.unit.graph.encoders import (
    FAMILIES,
    PAD,
    TASKS,
    dequantized,
    error,
    make_encoder,
    open_graph,
    ragged,
    reference,
    run_graph,
    write_checkpoint,
    write_encoder,
)

CHOSEN = ("bert", "roberta", "distilbert", "deberta-v3", "deberta, own position matrices")
Models = Callable[[str, str], tuple[Any, Path]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    made: dict[tuple[str, str], tuple[Any, Path]] = {}

    def find(family: str, task: str) -> tuple[Any, Path]:
        if (family, task) not in made:
            folder = tmp_path_factory.mktemp("encoder")
            made[family, task] = make_encoder(folder, family, task), folder
        return made[family, task]

    return find


def integers(form: Format) -> Callable[[Linear], Format | None]:
    """All matrices but the head's."""
    return lambda matrix: None if matrix.role in ("pooler", "classifier") else form


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_float_logits(
    models: Models, family: str, task: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model, folder = models(family, task)
    encoder = write_encoder(folder, tmp_path)
    capfd.readouterr()
    session = open_graph(tmp_path / "model.onnx")
    most = encoder.max_length
    for lengths, pairs in (([1], False), ([11], False), ([most], True), ([most, 3, 17, 1, 40], True)):
        batch = ragged(lengths, pairs=pairs)
        expected = reference(model, batch, encoder.has_token_types)
        assert error(run_graph(session, batch), expected, batch["attention_mask"]) < 1e-5
    captured = capfd.readouterr()
    assert "[W:onnxruntime" not in captured.err + captured.out
    assert ("token_type_ids" in [value.name for value in session.get_inputs()]) == encoder.has_token_types


def test_token_types_and_padding_are_told_apart(models: Models, tmp_path: Path) -> None:
    """The references above would not see inputs that have no effect."""
    _, folder = models("bert", "sequence")
    write_encoder(folder, tmp_path)
    session = open_graph(tmp_path / "model.onnx")
    plain, pairs = (run_graph(session, ragged([12], pairs=pairs)) for pairs in (False, True))
    assert np.abs(plain - pairs).max() > 1e-2
    alone, batched = ragged([5]), ragged([5, 30])
    batched["input_ids"][0, 5:] = 7
    assert np.abs(run_graph(session, alone) - run_graph(session, batched)[:1]).max() < 1e-5


@pytest.mark.parametrize("family", ["roberta", "xlm-roberta"])
def test_a_padding_token_inside_a_text_has_no_position(models: Models, family: str, tmp_path: Path) -> None:
    model, folder = models(family, "token")
    encoder = write_encoder(folder, tmp_path)
    batch = ragged([20, 9])
    batch["input_ids"][0, 6] = PAD
    expected = reference(model, batch, encoder.has_token_types)
    assert error(run_graph(open_graph(tmp_path / "model.onnx"), batch), expected, batch["attention_mask"]) < 1e-5


@pytest.mark.parametrize("family", CHOSEN)
def test_a_text_longer_than_the_positions_fails(models: Models, family: str, tmp_path: Path) -> None:
    _, folder = models(family, "token")
    encoder = write_encoder(folder, tmp_path)
    session = open_graph(tmp_path / "model.onnx", tmp_path / "optimized.onnx")
    for more in (1, 2, 30):
        with pytest.raises(Exception, match=r"ONNXRuntimeError"):
            run_graph(session, ragged([encoder.max_length + more]))


@pytest.mark.parametrize("family", CHOSEN)
def test_float16(models: Models, family: str, tmp_path: Path) -> None:
    """The same graph in half precision, which the CPU provider runs through casts; bytes beside it are refused."""
    model, folder = models(family, "token")
    encoder = write_encoder(folder, tmp_path, float_type="float16")
    batch = ragged([30, 4], pairs=True)
    found = run_graph(open_graph(tmp_path / "model.onnx", tmp_path / "optimized.onnx"), batch)
    assert found.dtype == np.float32
    assert error(found, reference(model, batch, encoder.has_token_types), batch["attention_mask"]) < 5e-3
    with pytest.raises(UnsupportedError) as caught:
        write_encoder(folder, tmp_path, integers(ChannelFormat()), float_type="float16")
    assert caught.value.code == "onnx-precision"


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("family", CHOSEN)
@pytest.mark.parametrize("form", [BlockFormat(8, 16), BlockFormat(4, 32)], ids=["8 bits", "4 bits"])
def test_block_weights(models: Models, family: str, task: str, form: BlockFormat, tmp_path: Path) -> None:
    """accuracy_level 1 multiplies in float32: what is left is the weights, to the last bit. 4 rounds activations to
    8 bits per block, an error of at most 1/254 of a block's largest value for each product."""
    model, folder = models(family, task)
    encoder = write_encoder(folder, tmp_path, integers(form), accuracy_level=1)
    batch = ragged([encoder.max_length, 3, 17], pairs=True)
    expected = reference(rounded(model, encoder, form), batch, encoder.has_token_types)
    mask = batch["attention_mask"]
    assert error(run_graph(open_graph(tmp_path / "model.onnx"), batch), expected, mask) < 1e-5
    write_encoder(folder, tmp_path, integers(form))
    assert 1e-6 < error(run_graph(open_graph(tmp_path / "model.onnx"), batch), expected, mask) < 0.06


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("family", CHOSEN)
@pytest.mark.parametrize("is_static", [False, True], ids=["dynamic", "static"])
def test_int8(models: Models, family: str, task: str, is_static: bool, tmp_path: Path) -> None:
    """Against transformers with the codes' weights, and inputs rounded to bytes as the ONNX specification has it.

    Where float32 in another order puts a value on the other side of the middle between two bytes, it differs by one:
    of the thousands here a few may, which shows as 1/255 of a range in one of a product's terms.
    """
    model, folder = models(family, task)
    encoder = write_encoder(folder, tmp_path)
    ranges = None
    if is_static:
        texts = [ragged([encoder.max_length, 3, 40], pairs=True, seed=seed) for seed in range(3)]
        ranges = find_ranges(tmp_path / "model.onnx", texts, threads=1)
    write_encoder(folder, tmp_path, integers(ChannelFormat()), activations=ranges)
    session = open_graph(tmp_path / "model.onnx", tmp_path / "optimized.onnx")
    check_unsigned(tmp_path / "optimized.onnx", encoder, is_static)
    # Dynamic ranges are those of the batch with its padding, which DeBERTa in transformers sets to zero.
    batch = ragged([13, 13] if not is_static and "deberta" in family else [21, 4, 13], pairs=True, seed=9)
    expected = reference(with_bytes(rounded(model, encoder, ChannelFormat()), encoder, ranges), batch,
                         encoder.has_token_types)  # fmt: skip
    found = run_graph(session, batch)
    assert error(found, expected, batch["attention_mask"]) < 2e-3
    # Random weights of 32 columns average little away, and a text's values may leave the ranges of three batches.
    exact = reference(model, batch, encoder.has_token_types)
    assert 2e-3 < error(found, exact, batch["attention_mask"]) < 0.2


def rounded(model: Any, encoder: Encoder, form: Format) -> Any:
    """transformers' model with the weights that the codes stand for."""
    import torch

    model = copy.deepcopy(model)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for matrix in encoder.matrices:
            if integers(form)(matrix):
                weight = parameters[matrix.name]
                weight.copy_(torch.from_numpy(dequantized(weight.numpy(), form)))
    return model


def with_bytes(model: Any, encoder: Encoder, ranges: dict[str, ActivationRange] | None) -> Any:
    """`model` whose matrices are given inputs rounded to unsigned bytes, by QuantizeLinear's or DynamicQuantizeLinear's
    formulas."""
    import torch

    modules = dict(model.named_modules())
    first_only = ("query", "attention-output", "up", "down") if encoder.task == "sequence-classification" else ()
    positions = encoder.relative.embeddings.rows if encoder.relative else None

    def rounding(matrix: Linear) -> Callable[[Any, tuple[Any, ...]], Any]:
        def hook(_: Any, inputs: tuple[Any, ...]) -> Any:
            x = inputs[0]
            if x.shape[:2] == (1, positions):  # relative embeddings: weights, which nothing rounds
                return None
            counted = x[:, :1] if matrix.layer == len(encoder.layers) - 1 and matrix.role in first_only else x
            low, high = (ranges[matrix.name].low, ranges[matrix.name].high) if ranges else (
                float(counted.min()), float(counted.max()))  # fmt: skip
            low, high = np.float32(min(low, 0)), np.float32(max(high, 0))
            scale = (high - low) / np.float32(255)
            zero = float(np.rint(-low / scale))
            return (((x / float(scale)).round() + zero).clamp(0, 255) - zero) * float(scale)

        return hook

    for matrix in encoder.matrices:
        if matrix.role not in ("pooler", "classifier") and not matrix.role.startswith("position"):
            modules[matrix.name.removesuffix(".weight")].register_forward_pre_hook(rounding(matrix))
    with torch.no_grad():
        return model


def check_unsigned(path: Path, encoder: Encoder, is_static: bool) -> None:
    """In the graph that ONNX Runtime made of ours, every matrix is multiplied with unsigned bytes."""
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    kinds = Counter(node.op_type for node in graph.node)
    products = [m for m in encoder.matrices if m.role not in ("pooler", "classifier", "position-key", "position-query")]
    assert kinds["MatMulIntegerToFloat"] + kinds["DynamicQuantizeMatMul"] == len(products)
    assert kinds["MatMulNBits"] == kinds["MatMulInteger"] == kinds["DequantizeLinear"] == 0
    constants = {tensor.name: tensor.data_type for tensor in graph.initializer}
    made = {name: node for node in graph.node for name in node.output}
    for node in graph.node:
        if node.op_type == "MatMulIntegerToFloat":
            maker = made[node.input[0]]
            if maker.op_type == "Reshape":  # ONNX Runtime moves it behind the rounding
                maker = made[maker.input[0]]
            assert maker.op_type == ("QuantizeLinear" if is_static else "DynamicQuantizeLinear")
            assert constants[node.input[1]] == onnx.TensorProto.INT8
            if is_static:
                assert constants[maker.input[2]] == onnx.TensorProto.UINT8
    if is_static:
        assert kinds["DynamicQuantizeLinear"] == kinds["DynamicQuantizeMatMul"] == 0
    else:
        assert kinds["QuantizeLinear"] == 0
        assert kinds["DynamicQuantizeMatMul"] >= 3 * len(encoder.layers)


def test_formats_mix(models: Models, tmp_path: Path) -> None:
    """Each matrix as its own format says: block, channel and float side by side."""
    model, folder = models("bert", "sequence")
    forms: dict[str, Format] = {"query": BlockFormat(8, 16), "value": BlockFormat(4, 16), "up": FloatFormat("float16")}
    encoder = write_encoder(folder, tmp_path, lambda matrix: forms.get(matrix.role), accuracy_level=1)
    expected = copy.deepcopy(model)
    import torch

    parameters = dict(expected.named_parameters())
    with torch.no_grad():
        for matrix in encoder.matrices:
            weight = parameters[matrix.name]
            if matrix.role == "up":
                weight.copy_(weight.half().float())
            elif matrix.role in forms:
                weight.copy_(torch.from_numpy(dequantized(weight.numpy(), forms[matrix.role])))
    batch = ragged([20, 7])
    found = run_graph(open_graph(tmp_path / "model.onnx"), batch)
    assert error(found, reference(expected, batch, True), batch["attention_mask"]) < 1e-5


def test_norms_stay_apart_from_their_sums(models: Models, tmp_path: Path) -> None:
    """SkipLayerNormalization takes five times as long, and ONNX Runtime would make it."""
    import onnx

    _, folder = models("bert", "sequence")
    encoder = write_encoder(folder, tmp_path)
    open_graph(tmp_path / "model.onnx", tmp_path / "optimized.onnx")
    kinds = Counter(
        node.op_type for node in onnx.load(tmp_path / "optimized.onnx", load_external_data=False).graph.node
    )
    assert kinds["LayerNormalization"] == 1 + 2 * len(encoder.layers)
    assert kinds["SkipLayerNormalization"] == 0


@pytest.mark.parametrize("form", [FloatFormat(), ChannelFormat(), BlockFormat(8, 16), BlockFormat(4, 16)])
def test_relative_positions_are_computed_at_load(models: Models, form: Format, tmp_path: Path) -> None:
    import onnx

    _, folder = models("deberta-v3", "sequence")
    encoder = write_encoder(folder, tmp_path, integers(form))
    open_graph(tmp_path / "model.onnx", tmp_path / "optimized.onnx")
    graph = onnx.load(tmp_path / "optimized.onnx", load_external_data=False).graph
    known = {tensor.name for tensor in graph.initializer}
    assert not [node.name for node in graph.node if node.input and all(name in known for name in node.input if name)]
    assert encoder.relative is not None and encoder.relative.embeddings.name not in known


@pytest.mark.parametrize(
    ("family", "layers", "saved"),
    [
        ("bert", ["query", "output.dense"], ["classifier", "pooler"]),
        ("roberta", ["value", "intermediate.dense"], ["classifier"]),
        ("distilbert", ["q_lin", "lin2"], ["pre_classifier", "classifier"]),
        ("deberta-v3", ["query_proj", "key_proj"], ["pooler", "classifier"]),
    ],
)
def test_adapter_on_a_language_model(family: str, layers: list[str], saved: list[str], tmp_path: Path) -> None:
    """From a masked language model and a classifier's adapter, merged as it is written, against the live adapter."""
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    name, settings = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(vocab_size=384, max_position_embeddings=48, num_labels=3,
                                                    pad_token_id=PAD, **settings)  # fmt: skip
    base = getattr(transformers, f"{name}ForMaskedLM")(config)
    randomize(base, 0)
    base.save_pretrained(tmp_path / "base")
    bpe_tokenizer(376).save_pretrained(tmp_path / "base")
    torch.manual_seed(1)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=layers, modules_to_save=saved, task_type="SEQ_CLS")
    live = get_peft_model(model, lora).eval()
    shake_adapter(live)
    live.save_pretrained(tmp_path / "adapter")
    view = open_view(CheckpointRef.of(tmp_path / "base", tmp_path / "adapter"))
    encoder = write_checkpoint(view, tmp_path / "graph")
    view.close()
    batch = ragged([30, 4, 11], pairs=True)
    found = run_graph(open_graph(tmp_path / "graph" / "model.onnx"), batch)
    assert error(found, reference(live, batch, encoder.has_token_types), batch["attention_mask"]) < 1e-5
