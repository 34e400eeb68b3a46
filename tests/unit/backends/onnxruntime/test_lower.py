"""What lowering to ONNX Runtime writes: codes, files, quality, the damage that is told, and what is refused."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, DefaultWeightOnlyQuantizer
from transformers import AutoModelForCausalLM

from lora2edge import journal
from lora2edge.adapters import open_view
from lora2edge.backends.onnxruntime import OnnxRuntimeBackend
from lora2edge.backends.onnxruntime.options import choose_format, read_options
from lora2edge.backends.onnxruntime.rounding import BlockEncoder, nearest_blocks, nearest_channels, split_row
from lora2edge.checkpoint import open_checkpoint
from lora2edge.contracts import Checkpoint, CheckpointRef, Lowered, Machine, SessionOptions
from lora2edge.errors import InputError, Lora2EdgeError
from lora2edge.graph import write
from lora2edge.graph.builder import BlockFormat, FloatFormat
from lora2edge.progress import SILENT, Silent
from lora2edge.quantize import GptqOptions, RoundingLog, factorize
from lora2edge.target import Target
from tests.blas import thread_calls
from tests.tiny import make_adapter, make_checkpoint
from tests.unit.backends.even import VOCAB, calibrated, make_even

MACHINE = Machine(cores=2, ram_bytes=8 << 30, disk_bytes=8 << 30, cuda=None, operations_per_second=1e11)


def target(precision: str, device: Any = "cpu", **options: Any) -> Target:
    return Target(name="test", backend="onnxruntime", precision=precision, device=device, options=options)


def lower(view: Checkpoint, out: Path, precision: str, calibration: Any = None, **options: Any) -> Lowered:
    out.mkdir(parents=True)
    return OnnxRuntimeBackend().lower(view, target(precision, **options), calibration, out, SILENT)


def logits(out: Path, ids: list[int]) -> Any:
    session: Any = OnnxRuntimeBackend().open(out, target("int4"), SessionOptions("cpu", 1, 1, 256))
    try:
        (found,) = session.logits([ids], [list(range(len(ids)))])
        return found
    finally:
        session.close()


def expected_logits(folder: Path, ids: list[int]) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].numpy()


def divergence(folder: Path, out: Path) -> float:
    """Mean KL(transformers ‖ artifact), nats per token."""
    ids = np.random.default_rng(0).integers(0, VOCAB, 200).tolist()
    right, found = (
        torch.log_softmax(torch.from_numpy(np.array(values)).double(), -1)
        for values in (expected_logits(folder, ids), logits(out, ids))
    )
    return float((right.exp() * (right - found)).sum(-1).mean())


# ---------------------------------------------------------------- codes


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block", [16, 32, 128])
def test_nearest_is_onnxruntimes_own(bits: Any, block: int) -> None:
    generator = np.random.default_rng(bits * block)
    weights = generator.standard_normal((48, 512)).astype(np.float32) * np.exp(generator.standard_normal((48, 1)))
    weights = weights.astype(np.float32)
    weights[3] = 0
    weights[4, :block] = 0
    config = DefaultWeightOnlyQuantConfig(block_size=block, is_symmetric=True, bits=bits)
    codes, scales, _ = DefaultWeightOnlyQuantizer(config).qbits_block_quant(np.ascontiguousarray(weights.T))
    ours, steps = nearest_blocks(weights, BlockFormat(bits, block), "float32")
    assert np.array_equal(steps, scales)
    assert np.array_equal(ours, codes)


def test_a_row_is_what_was_encoded() -> None:
    """What the encoder of GPTQ writes, read back, is on its grid and as near as rounding can be."""
    generator = np.random.default_rng(0)
    weights = generator.standard_normal((24, 256)).astype(np.float32)
    inputs = generator.standard_normal((600, 256)).astype(np.float32)
    factor = factorize(inputs.T @ inputs / len(inputs), len(inputs), GptqOptions())
    for bits in (4, 8):
        form = BlockFormat(bits, 64)
        encoder = BlockEncoder({"w": form}, FloatFormat(), {"w": 256}, "float32")
        data = encoder.encode("w", weights, factor, RoundingLog())
        values = encoder.decode("w", data)
        codes, scales = split_row(data, form)
        steps = values.reshape(24, 4, 64) / scales[..., None]
        assert np.allclose(steps, np.rint(steps), atol=1e-4)
        plain = nearest_blocks(weights, form, "float32")
        assert codes.shape == plain[0].shape
        assert scales.shape == plain[1].shape
        error = np.linalg.norm((values - weights) @ inputs.T) / np.linalg.norm(weights @ inputs.T)
        assert error < {4: 0.1, 8: 0.006}[bits]


def test_channels_are_symmetric() -> None:
    weights = np.array([[1, -2, 0.5], [0, 0, 0], [3, 1, -1]], np.float32)
    codes, scales = nearest_channels(weights)
    assert codes.tolist() == [[64, -127, 32], [0, 0, 0], [127, 42, -42]]
    assert np.allclose(scales, [2 / 127, 0, 3 / 127])


# ---------------------------------------------------------------- whole lowerings


@pytest.fixture(scope="module")
def even(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("even")
    folder = make_even(root / "base", "qwen2", tied=True)
    view = open_checkpoint(folder)
    return folder, view, calibrated(view, root / "calibration")


def test_gptq_loses_less_than_nearest(even: Any, tmp_path: Path) -> None:
    folder, view, calibration = even
    found = lower(view, tmp_path / "gptq", "int4", calibration)
    plain = lower(view, tmp_path / "nearest", "int4", calibration, rounding="nearest")
    assert found.notes["rounding"]["method"] == "gptq"
    assert found.notes["rounding"]["by_method"] == {"gptq": found.notes["rounding"]["tensors"]}
    assert plain.notes["rounding"] == {"method": "nearest"}
    assert found.notes["tensor_types"] == {"int4 in blocks of 128": 14, "int8 in blocks of 128": 1}
    sizes = [(tmp_path / side / "model.onnx.data").stat().st_size for side in ("gptq", "nearest")]
    assert sizes[0] == sizes[1]
    assert divergence(folder, tmp_path / "gptq") < 0.8 * divergence(folder, tmp_path / "nearest")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("precision", "options", "most"),
    [
        ("fp32", {}, 1e-9),
        ("int8", {}, 5e-3),
        ("int8-dynamic", {}, 2e-2),
        ("int4", {"head_bits": 16, "block": 32, "rounding": "gptq"}, 0.1),
        ("int4", {"head_bits": 4, "embedding_bits": 16, "overrides": {"*.down_proj.weight": 8}}, 0.3),
    ],
)
def test_every_precision(tied: bool, precision: str, options: Any, most: float, tmp_path: Path) -> None:
    folder = make_even(tmp_path / "base", "llama", tied=tied)
    view = open_checkpoint(folder)
    calibration = calibrated(view, tmp_path / "calibration") if precision == "int4" else None
    lower(view, tmp_path / "out", precision, calibration, **options)
    assert divergence(folder, tmp_path / "out") < most
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"model.onnx", "model.onnx.data", "config.json", "genai_config.json", "tokenizer.json"} <= files
    assert not any(name.startswith(("rounded", "hidden", ".")) for name in files)


def test_merged_adapter_and_the_damage_told(tmp_path: Path) -> None:
    """The delta that is kept, against the weights that ONNX Runtime itself multiplies with."""
    base = make_checkpoint(tmp_path / "base", "llama", hidden=128, tied=False)
    adapter = make_adapter(tmp_path / "adapter", base)
    view = open_view(CheckpointRef.of(base, adapter))
    for precision, options in (("int4", {"overrides": {"*.o_proj.weight": 32}}), ("int8-dynamic", {})):
        out = tmp_path / precision
        lower(view, out, precision, **options)
        damage = {entry.name: entry for entry in OnnxRuntimeBackend().damage(view, out, SILENT)}
        matrices = [name for name, info in view.tensors.items() if len(info.shape) == 2]
        assert set(damage) == set(matrices)
        for name in ("model.layers.1.mlp.down_proj.weight", "model.layers.0.self_attn.o_proj.weight"):
            exact, stored = view.rows(name, 0, 128), multiplied_with(out, name)
            assert np.isclose(damage[name].relative_error, np.linalg.norm(stored - exact) / np.linalg.norm(exact))
            delta = view.delta(name, 0, 128)
            assert delta is not None
            kept = ((stored - exact + delta) * delta).sum() / (delta**2).sum()
            assert np.isclose(damage[name].delta_kept or 0, kept, atol=1e-5)
        assert damage["model.layers.1.mlp.down_proj.weight"].type.startswith("int")


def multiplied_with(out: Path, name: str) -> Any:
    """The matrix of a tensor, by running the nodes that multiply with it on the unit vectors: `[rows, columns]`."""
    proto = onnx.load(out / "model.onnx", load_external_data=False)
    sources = json.loads({item.key: item.value for item in proto.metadata_props}["lora2edge.sources"])
    (stored,) = [initializer for initializer, parts in sources.items() if parts[0][0] == name]
    product = next(node for node in proto.graph.node if stored in node.input)
    scales = stored.replace(".codes", ".scales")
    initializers = {tensor.name: tensor for tensor in proto.graph.initializer}
    columns = {"FusedMatMul": 1, "MatMulInteger": 0}.get(product.op_type)
    shape = list(initializers[stored].dims)
    width = shape[columns] if columns is not None else 2 * shape[1] * shape[2]
    feed = np.eye(width, dtype=np.float32)
    if product.op_type == "MatMulInteger":
        node = onnx.helper.make_node("DequantizeLinear", [stored, scales], ["y"], axis=1)
        needed, inputs = [stored, scales], []
    else:
        node = onnx.NodeProto()
        node.CopyFrom(product)
        del node.input[:]
        node.input.extend(["x", *list(product.input)[1:3]])
        node.output[0] = "y"
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 1
        needed = [item for item in list(product.input)[1:3] if item]
        inputs = [onnx.helper.make_tensor_value_info("x", 1, [None, width])]
    graph = onnx.helper.make_graph(
        [node], "one", inputs, [onnx.helper.make_empty_tensor_value_info("y")], [initializers[item] for item in needed]
    )
    model = onnx.helper.make_model(graph, opset_imports=proto.opset_import, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(out))
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": feed} if inputs else {})
    return found.T


def test_the_same_bytes_again_and_from_any_folder(even: Any, tmp_path: Path) -> None:
    folder, view, calibration = even
    for side in ("one", "two"):
        lower(view, tmp_path / side, "int4", calibration)
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / side).iterdir()} for side in ("one", "two"))
    assert one == two
    (tmp_path / "elsewhere").mkdir()
    moved = Path(shutil.move(tmp_path / "one", tmp_path / "elsewhere" / "moved"))
    assert divergence(folder, moved) == divergence(folder, tmp_path / "two")


def test_codes_do_not_depend_on_the_threads_of_the_matrix_products(even: Any, tmp_path: Path) -> None:
    _, view, calibration = even
    get, put = thread_calls()
    before = get()
    try:
        for threads in (1, 2):
            put(threads)
            lower(view, tmp_path / f"{threads}", "int4", calibration)
    finally:
        put(before)
    one, two = ((tmp_path / side / "model.onnx.data").read_bytes() for side in "12")
    assert one == two


class Interrupted(Silent):
    """Ends the work with Ctrl-C after so many weights, and counts those that were done before it began."""

    def __init__(self, after: int) -> None:
        self.left, self.first = after, -1

    def advance(self, amount: int = 1) -> None:
        self.first = amount if self.first < 0 else self.first
        self.left -= amount
        if self.left < 0:
            raise KeyboardInterrupt


def test_an_interrupted_lowering_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a tensor that an earlier run finished, however little of the next one is there."""
    monkeypatch.setattr(journal, "SYNC_SECONDS", 0.0)
    monkeypatch.setattr(write, "SLAB_ELEMENTS", 1 << 10)
    view = open_checkpoint(make_checkpoint(tmp_path / "base", "qwen2", hidden=128))
    lower(view, tmp_path / "whole", "int8")
    first = Interrupted(300_000)
    with pytest.raises(KeyboardInterrupt), journal.resumable_folder(tmp_path / "out", "key") as folder:
        OnnxRuntimeBackend().lower(view, target("int8"), None, folder, first)
    second = Interrupted(1 << 40)
    with journal.resumable_folder(tmp_path / "out", "key") as folder:
        OnnxRuntimeBackend().lower(view, target("int8"), None, folder, second)
    assert second.first >= 768 * 128  # the embedding
    assert (tmp_path / "out" / "model.onnx.data").read_bytes() == (tmp_path / "whole" / "model.onnx.data").read_bytes()


def test_what_longrope_asks_of_a_runtime_is_told(tmp_path: Path) -> None:
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    base = make_checkpoint(tmp_path / "base", "phi3", rope_parameters=rope, original_max_position_embeddings=64)
    view = open_checkpoint(base)
    (note,) = lower(view, tmp_path / "out", "int8").notes["notes"]
    assert "filled again at 65 tokens" in note
    assert note in OnnxRuntimeBackend().check(view, target("int8"), MACHINE).notes


@pytest.mark.parametrize("tied", [True, False])
def test_bits_of_an_embedding_that_is_the_output_layer(tied: bool, tmp_path: Path) -> None:
    view = open_checkpoint(make_checkpoint(tmp_path / "base", "qwen2", hidden=128, tied=tied))
    notes = lower(view, tmp_path / "out", "int8", embedding_bits=4).notes
    assert bool(notes["notes"]) is tied
    assert notes["tensor_types"].get("int4 in blocks of 128", 0) == (not tied)


def test_how_genai_samples(tmp_path: Path) -> None:
    """As generation_config.json says: 0 is a value, and what is silent is transformers' own."""
    base = make_checkpoint(tmp_path / "base", "qwen2", hidden=128)
    config = json.loads((base / "config.json").read_text())
    del config["model_type"]
    (base / "config.json").write_text(json.dumps(config))
    own = {"do_sample": False, "repetition_penalty": 1.0, "temperature": 1.0, "top_k": 50, "top_p": 1.0}
    for number, said in enumerate(
        ({}, {"do_sample": True, "temperature": 0.0, "top_k": 0, "top_p": 0.8}, {"top_k": None})
    ):
        (base / "generation_config.json").write_text(json.dumps(said))
        lower(open_checkpoint(base), tmp_path / f"{number}", "int8")
        written = json.loads((tmp_path / f"{number}" / "genai_config.json").read_text())
        assert {key: written["search"][key] for key in own} == {
            **own,
            **{k: v for k, v in said.items() if v is not None},
        }
        assert written["model"]["type"] == "qwen2"
    (base / "generation_config.json").write_text(json.dumps({"temperature": "warm"}))
    with pytest.raises(InputError) as caught:
        lower(open_checkpoint(base), tmp_path / "refused", "int8")
    assert "temperature" in str(caught.value)


def test_a_stored_copy_of_a_tied_head(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    base = make_checkpoint(tmp_path / "base", "qwen2", hidden=128)
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    lower(open_checkpoint(base), tmp_path / "out", "int8")
    tensors["lm_head.weight"][5, 5] += 1
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError) as caught:
        lower(open_checkpoint(base), tmp_path / "other", "int8")
    assert caught.value.code == "tied-head"


def test_a_weight_that_is_not_finite(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    base = make_checkpoint(tmp_path / "base", "qwen2", hidden=128)
    tensors = load_file(base / "model.safetensors")
    for number, value in enumerate((float("nan"), float("inf"), float("-inf"))):
        tensors["model.layers.1.mlp.down_proj.weight"][7, 9] = value
        save_file(tensors, base / "model.safetensors", {"format": "pt"})
        for precision in ("fp32", "int8", "int8-dynamic", "int4"):
            with pytest.raises(InputError) as caught:
                lower(open_checkpoint(base), tmp_path / f"{precision}{number}", precision)
            assert caught.value.code == "weight-not-finite"
            assert "down_proj" in caught.value.what


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("precision", "options", "code", "said"),
    [
        ("int5", {}, "onnx-precision", "int8-dynamic"),
        ("fp16", {}, "onnx-cpu-precision", "cast"),
        ("bf16", {}, "onnx-cpu-precision", "bfloat16"),
        ("int4", {"blocks": 32}, "onnx-option", "blocks"),
        ("int4", {"block": 48}, "onnx-option", "block"),
        ("int4", {"head_bits": 5}, "onnx-option", "head_bits"),
        ("int4", {"overrides": {"*.nothing": 8}}, "onnx-option", "*.nothing"),
        ("fp32", {"rounding": "gptq"}, "onnx-option", "gptq"),
        ("int8", {"percentile": 99.9}, "onnx-option", "int8-static"),
        ("int4", {"block": 256}, "onnx-block", "{block: 128}"),
        ("int8-static", {}, "onnx-static-decoder", "precision: int8"),
    ],
)
def test_refusals(precision: str, options: Any, code: str, said: str, tmp_path: Path) -> None:
    view = open_checkpoint(make_checkpoint(tmp_path / "base", "qwen2", hidden=128, intermediate=384))
    with pytest.raises(InputError) as caught:
        OnnxRuntimeBackend().check(view, target(precision, **options), MACHINE)
    found = getattr(caught.value, "errors", (caught.value,))
    assert [error.code for error in found] == [code]
    assert said in str(found[0])


def test_the_largest_block_that_divides_every_row(tmp_path: Path) -> None:
    view = open_checkpoint(make_checkpoint(tmp_path / "base", "qwen2", hidden=64, intermediate=96))
    found = lower(view, tmp_path / "out", "int8")
    assert found.notes["tensor_types"] == {"int8 in blocks of 32": 15}


def test_of_several_overrides_the_longest_counts() -> None:
    """Their order cannot: the cache's keys and the manifest sort them."""
    name = "model.layers.0.mlp.down_proj.weight"
    pairs = [("*", 8), ("*.mlp.*", 32), ("*.down_proj.weight", 4), (f"{name}*", 32), (name, 16)]
    wanted = [BlockFormat(8, 32), FloatFormat("float32"), BlockFormat(4, 32), FloatFormat("float32")]
    for count, form in enumerate([*wanted, FloatFormat("float16")], 1):
        for given in (pairs[:count], pairs[:count][::-1]):
            precision, options = read_options(target("int4", overrides=dict(given)))
            assert choose_format(name, "down", precision, options, 32) == form, given


def test_cuda_on_a_build_without_it(tmp_path: Path, without_cuda: None) -> None:
    view = open_checkpoint(make_checkpoint(tmp_path / "base", "qwen2", hidden=128))
    with pytest.raises(InputError) as caught:
        OnnxRuntimeBackend().check(view, target("fp16", device="cuda"), MACHINE)
    assert caught.value.code == "no-provider"
    assert "onnxruntime-gpu" in str(caught.value)


def test_a_missing_onnx_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    view = open_checkpoint(make_checkpoint(tmp_path / "base", "qwen2", hidden=128))
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "onnx" else found(name, *rest))
    with pytest.raises(InputError) as caught:
        OnnxRuntimeBackend().check(view, target("int8"), MACHINE)
    assert caught.value.code == "missing-extra"
    assert "lora2edge[onnxruntime]" in caught.value.hint


@pytest.mark.parametrize("options", [{"rounding": "gptq"}])
def test_what_needs_calibration_text(options: Any, tmp_path: Path) -> None:
    view = open_checkpoint(make_checkpoint(tmp_path / "base", "qwen2", hidden=128))
    with pytest.raises(Lora2EdgeError) as caught:
        lower(view, tmp_path / "out", "int4", None, **options)
    assert caught.value.code == "gptq-without-data"
    found = lower(view, tmp_path / "plain", "int4")
    assert found.notes["rounding"] == {"method": "nearest", "why": "no calibration text"}


def test_the_plan_tells_sizes(tmp_path: Path) -> None:
    view = open_checkpoint(make_checkpoint(tmp_path / "base", "qwen2", hidden=128))
    backend = OnnxRuntimeBackend()
    for precision in ("fp32", "int8", "int8-dynamic", "int4"):
        estimate = backend.check(view, target(precision, rounding=None), MACHINE)
        out = tmp_path / precision
        lower(view, out, precision)
        size = sum(path.stat().st_size for path in out.iterdir())
        assert abs(estimate.disk_bytes / size - 1) < 0.1
        assert estimate.layer_inputs is (precision == "int4")
        assert estimate.max_length == 512


@pytest.mark.parametrize(
    ("precision", "code"), [("int8-dynamic", "onnx-cuda-precision"), ("bf16", "onnx-bfloat16-decoder")]
)
def test_what_is_refused_on_a_gpu(precision: str, code: str, tmp_path: Path) -> None:
    view = open_checkpoint(make_checkpoint(tmp_path / "base", "qwen2", hidden=128))
    with pytest.raises(InputError) as caught:
        OnnxRuntimeBackend().check(view, target(precision, device="cuda"), MACHINE)
    assert caught.value.code == code


def test_dynamic_answers_do_not_depend_on_each_other(tmp_path: Path) -> None:
    """One range holds for all activations of a call."""
    view = open_checkpoint(make_checkpoint(tmp_path / "base", "qwen2", hidden=128))
    lower(view, tmp_path / "out", "int8-dynamic")
    prompts = [np.random.default_rng(seed).integers(0, VOCAB, 4 + 9 * seed).tolist() for seed in range(6)]
    session: Any = OnnxRuntimeBackend().open(tmp_path / "out", target("int8-dynamic"), SessionOptions("cpu", 1, 4, 200))
    try:
        assert session.facts.slots == 1
        alone = [next(iter(session.logits([ids], [range(len(ids))]))) for ids in prompts]
        together = list(session.logits(prompts, [range(len(ids)) for ids in prompts]))
        assert all(np.array_equal(one, other) for one, other in zip(alone, together, strict=True))
    finally:
        session.close()


def test_float16_is_written_for_cuda(tmp_path: Path) -> None:
    """Not run here; the file holds half the bytes, and the types that a GPU's kernels take."""
    view = open_checkpoint(make_checkpoint(tmp_path / "base", "qwen2", hidden=128))
    for precision, kind in (("fp16", 10), ("int4", 10)):
        lower_to = target(precision, device="cuda")
        (tmp_path / precision).mkdir()
        OnnxRuntimeBackend().lower(view, lower_to, None, tmp_path / precision, SILENT)
        proto = onnx.load(tmp_path / precision / "model.onnx", load_external_data=False)
        pasts = [value.type.tensor_type.elem_type for value in proto.graph.input if "past" in value.name]
        assert set(pasts) == {kind}
