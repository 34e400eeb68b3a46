"""Files with GPTQ's codes: what llama.cpp makes of them, what they gain, and what becomes of unsound inputs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import peft
import pytest
import safetensors.torch
import torch
import transformers

from lora2edge.adapters import MergedCheckpoint, open_view
from lora2edge.backends.gguf import GgufBackend
from lora2edge.backends.gguf.rounding import BlockEncoder
from lora2edge.calibration import StoredCalibration
from lora2edge.checkpoint import StoredCheckpoint, open_checkpoint
from lora2edge.contracts import CheckpointRef, Machine, Sample, SessionOptions
from lora2edge.errors import InputError, TargetError
from lora2edge.texts import Renderer, read_items
from tests.tiny import make_checkpoint
from tests.unit.backends.even import calibrated, make_even, texts
from tests.unit.backends.gguf.lowering import divergence, lower, target


def dequantized(file: Path) -> dict[str, Any]:
    """GGUF name → type and values, by gguf-py."""
    reader = gguf.GGUFReader(file)
    return {
        tensor.name: (
            tensor.tensor_type.name,
            gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape[::-1]),
        )
        for tensor in reader.tensors
    }


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi3"])
def test_same_types_and_size_and_less_divergence(arch: str, tmp_path: Path) -> None:
    """llama.cpp's logits against transformers', of the file that llama.cpp rounded and of ours."""
    folder = make_even(tmp_path / "base", arch)
    view = open_checkpoint(folder)
    calibration = calibrated(view, tmp_path / "calibration")
    found = lower(view, tmp_path / "ours", "q4_k_m", calibration)
    lower(view, tmp_path / "theirs", "q4_k_m", calibration, rounding="llama.cpp")
    ours, theirs = (tmp_path / side / "model.gguf" for side in ("ours", "theirs"))
    assert ours.stat().st_size == theirs.stat().st_size
    types = [{name: kind for name, (kind, _) in dequantized(file).items()} for file in (ours, theirs)]
    assert types[0] == types[1]
    assert {path.name for path in (tmp_path / "ours").iterdir()} == {"model.gguf", "imatrix.gguf"}
    rounding = found.notes["rounding"]
    assert rounding["method"] == "gptq"
    assert rounding["by_method"] == {"gptq": rounding["tensors"]}
    assert divergence(folder, tmp_path / "ours") < 0.8 * divergence(folder, tmp_path / "theirs")


@pytest.mark.parametrize("precision", ["q4_0", "q8_0", "q3_k_m", "q5_k_m", "q6_k"])
def test_every_file_type(precision: str, tmp_path: Path) -> None:
    folder = make_even(tmp_path / "base", "llama", tied=False)
    view = open_checkpoint(folder)
    calibration = calibrated(view, tmp_path / "calibration")
    lower(view, tmp_path / "ours", precision, calibration, rounding="gptq")
    lower(view, tmp_path / "theirs", precision, calibration, rounding="llama.cpp", imatrix=True)
    ours, theirs = (dequantized(tmp_path / side / "model.gguf") for side in ("ours", "theirs"))
    assert [kind for kind, _ in ours.values()] == [kind for kind, _ in theirs.values()]
    for name, (kind, values) in ours.items():
        rounded = name != "token_embd.weight" and "norm" not in name and kind != "F32"
        assert np.array_equal(values, theirs[name][1]) is not rounded, name
    assert divergence(folder, tmp_path / "ours") < 0.85 * divergence(folder, tmp_path / "theirs")


def test_rows_are_where_llama_cpp_looks_for_them(tmp_path: Path) -> None:
    """8-bit codes are near the weights whatever chose them: the interleaved heads, too."""
    view = open_checkpoint(make_even(tmp_path / "base", "llama", tied=False))
    lower(view, tmp_path / "ours", "q8_0", calibrated(view, tmp_path / "calibration"), rounding="gptq")
    lower(view, tmp_path / "exact", "f32")
    exact = dequantized(tmp_path / "exact" / "model.gguf")
    for name, (_, values) in dequantized(tmp_path / "ours" / "model.gguf").items():
        assert np.linalg.norm(values - exact[name][1]) < 0.02 * np.linalg.norm(exact[name][1]), name


@pytest.mark.parametrize("tied", [True, False])
def test_ends_in_16_bits(tied: bool, tmp_path: Path) -> None:
    view = open_checkpoint(make_even(tmp_path / "base", "llama", tied=tied))
    ends = {"output_tensor_type": "f16"} if tied else {"output_tensor_type": "f16", "token_embedding_type": "bf16"}
    lower(view, tmp_path / "ours", "q4_0", calibrated(view, tmp_path / "calibration"), **ends)
    types = {name: kind for name, (kind, _) in dequantized(tmp_path / "ours" / "model.gguf").items()}
    assert types["token_embd.weight"] == ("F16" if tied else "BF16")
    assert types.get("output.weight") == (None if tied else "F16")
    assert types["blk.0.attn_q.weight"] == "Q4_0"


def test_a_stored_copy_of_the_tied_head(tmp_path: Path) -> None:
    """config.json ties the head and the file has it once more: the same bytes as without the copy."""
    folder = make_checkpoint(tmp_path / "base", "llama", tied=True)
    copied = shutil.copytree(folder, tmp_path / "copied")
    tensors = safetensors.torch.load_file(copied / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    safetensors.torch.save_file(tensors, copied / "model.safetensors", metadata={"format": "pt"})
    for name, path in {"once": folder, "twice": copied}.items():
        view = open_checkpoint(path)
        lower(view, tmp_path / name, "q4_0", calibrated(view, tmp_path / f"calibration-{name}"))
    once, twice = ((tmp_path / name / "model.gguf").read_bytes() for name in ("once", "twice"))
    assert once == twice


def test_rows_that_no_block_divides(tmp_path: Path) -> None:
    """Nothing is rounded, and nothing but the artifact is left."""
    view = open_checkpoint(make_checkpoint(tmp_path / "base", "qwen2", hidden=72, intermediate=136))
    assert not GgufBackend().check(view, target("q4_0"), Machine(2, 8 << 30, 8 << 30, None)).layer_inputs
    found = lower(view, tmp_path / "out", "q4_0", calibrated(view, tmp_path / "calibration"))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"model.gguf", "imatrix.gguf"}
    assert found.notes["rounding"]["tensors"] == 0


@pytest.mark.parametrize("options", [{"output_tensor_type": "iq4_xs"}, {"token_embedding_type": "iq4_nl"}], ids=str)
def test_an_embedding_with_a_codebook(options: dict[str, str], tmp_path: Path) -> None:
    """GPTQ cannot choose its codes, and the layers are rounded for the rows that are in the file."""
    tied = "output_tensor_type" in options
    view = open_checkpoint(make_even(tmp_path / "base", "llama", tied=tied))
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        embedding = BlockEncoder.embedding
        patch.setattr(BlockEncoder, "embedding", lambda *given: seen.append(embedding(*given)) or seen[-1])
        lower(view, tmp_path / "out", "q4_k_m", calibrated(view, tmp_path / "calibration"), **options)
    kind, values = dequantized(tmp_path / "out" / "model.gguf")["token_embd.weight"]
    assert kind == next(iter(options.values())).upper()
    stored = {row.tobytes() for row in values}
    assert len(seen[0]) > 100
    assert all(row.tobytes() in stored for row in seen[0])


def refused(view: StoredCheckpoint, precision: str, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        GgufBackend().check(view, target(precision, **options), Machine(2, 8 << 30, 8 << 30, None))
    assert caught.value.code == "gguf-option"
    return f"{caught.value.what}; {caught.value.why}; {caught.value.hint}"


def test_options_that_do_not_go_together(tmp_path: Path) -> None:
    view = open_checkpoint(make_checkpoint(tmp_path / "base", "qwen2", tied=True))
    assert "IQ4_XS" in refused(view, "iq4_xs", rounding="gptq")
    assert "f16" in refused(view, "f16", rounding="gptq")
    assert "imatrix" in refused(view, "q4_0", rounding="gptq", imatrix=False)
    assert "gptq, llama.cpp" in refused(view, "q4_0", rounding="nearest")
    assert "output layer" in refused(view, "q4_0", token_embedding_type="f16")
    assert "q8_0" in refused(view, "f16", output_tensor_type="q8_0")
    assert "multiple" in refused(view, "q4_0", output_tensor_type="q6_k")
    with pytest.raises(TargetError) as caught:
        lower(view, tmp_path / "out", "q4_0", rounding="gptq")
    assert caught.value.code == "gptq-without-data"


@pytest.mark.parametrize(
    ("precision", "options", "wanted"),
    [
        ("q4_k_m", {}, True),
        ("q6_k", {}, True),
        ("q3_k_m", {}, False),
        ("q8_0", {}, False),
        ("iq4_xs", {}, False),
        ("q4_0", {"imatrix": False}, False),
        ("q4_0", {"rounding": "llama.cpp"}, False),
        ("q3_k_m", {"rounding": "gptq"}, True),
    ],
)
def test_the_plan_says_whether_layer_inputs_are_kept(
    precision: str, options: dict[str, Any], wanted: bool, tmp_path: Path
) -> None:
    view = open_checkpoint(make_checkpoint(tmp_path / "base", "llama"))
    machine = Machine(2, 8 << 30, 8 << 30, None)
    found = GgufBackend().check(view, target(precision, **options), machine)
    plain = GgufBackend().check(view, target(precision, **{**options, "rounding": "llama.cpp"}), machine)
    assert found.layer_inputs is wanted
    assert (found.ram_bytes > plain.ram_bytes) is (found.scratch_bytes > 0) is wanted
    assert found.disk_bytes == plain.disk_bytes


def test_the_plan_counts_hidden_states_of_the_models_width(tmp_path: Path) -> None:
    """Two layers' and a layer's inputs, in float32, beside the rounded tensors; the attention may be narrower."""
    view = open_checkpoint(make_checkpoint(tmp_path / "base", "qwen3", hidden=128, heads=2, kv_heads=1, head_dim=32))
    machine = Machine(2, 8 << 30, 8 << 30, None)
    found = GgufBackend().check(view, target("q4_0"), machine)
    tokenizer = sum(Path(path).stat().st_size for path in view.tokenizer.files.values())
    widest = view.tensors["model.layers.0.mlp.down_proj.weight"].shape[1]
    assert found.scratch_bytes == found.disk_bytes - tokenizer + 4 * 32768 * (5 * 128 + widest)


def test_without_calibration_text_llama_cpp_rounds(tmp_path: Path) -> None:
    view = open_checkpoint(make_checkpoint(tmp_path / "base", "llama"))
    found = lower(view, tmp_path / "default", "q4_0")
    lower(view, tmp_path / "named", "q4_0", rounding="llama.cpp")
    files = [(tmp_path / side / "model.gguf").read_bytes() for side in ("default", "named")]
    assert files[0] == files[1]
    assert found.notes["rounding"] == {"method": "llama.cpp", "why": "no calibration text"}


# ---------------------------------------------------------------- trained weights

EXAMPLE = Path(__file__).parents[4] / "examples" / "medical"


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> tuple[MergedCheckpoint, StoredCalibration]:
    view = open_view(CheckpointRef.of(EXAMPLE / "base", EXAMPLE / "adapter"))
    folder = tmp_path_factory.mktemp("example") / "calibration"
    return view, calibrated(view, folder, example_samples(view, "calibration", 160))


def example_samples(view: MergedCheckpoint, part: str, count: int) -> list[Sample]:
    renderer = Renderer(view.tokenizer)
    return [renderer.sample(item) for item in read_items(EXAMPLE / "data" / f"{part}.jsonl")[:count]]


@pytest.mark.parametrize("precision", ["q4_0", "q4_k_m"])
def test_the_shipped_example(example: Any, precision: str, tmp_path: Path) -> None:
    """KL of llama.cpp's answers to PEFT's live adapter: what the default promises against llama.cpp's own rounding."""
    view, calibration = example
    base = transformers.AutoModelForCausalLM.from_pretrained(EXAMPLE / "base", dtype=torch.float32)
    live = peft.PeftModel.from_pretrained(base, EXAMPLE / "adapter").eval()
    tests = example_samples(view, "test", 150)
    kl, flips = {}, {}
    for rounding in ("gptq", "llama.cpp"):
        lower(view, tmp_path / rounding, precision, calibration, rounding=rounding)
        session = GgufBackend().open(tmp_path / rounding, target(precision), SessionOptions("cpu", 1, 1, 512))
        ids, positions = [sample.ids for sample in tests], [sample.positions for sample in tests]
        told = []
        for sample, logits in zip(tests, session.logits(ids, positions), strict=True):
            with torch.no_grad():
                expected = torch.log_softmax(live(torch.tensor([sample.ids])).logits[0, sample.positions].double(), -1)
            found = torch.log_softmax(torch.from_numpy(logits).double(), -1)
            told.append(((expected.exp() * (expected - found)).sum(-1), expected.argmax(-1) != found.argmax(-1)))
        session.close()
        kl[rounding] = torch.cat([item for item, _ in told]).mean()
        flips[rounding] = torch.cat([item for _, item in told]).sum()
    assert kl["gptq"] < 0.65 * kl["llama.cpp"]
    assert flips["gptq"] <= flips["llama.cpp"]


# ---------------------------------------------------------------- planted faults


def planted(tmp_path: Path, change: Any = None, **shape: Any) -> StoredCheckpoint:
    """A checkpoint in which `change(model)` broke something."""
    folder = make_even(tmp_path / "base", "llama", **shape)
    if change:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            change(model)
        model.save_pretrained(folder)
    return open_checkpoint(folder)


def finite_file(view: StoredCheckpoint, tmp_path: Path, samples: list[Sample] | None = None) -> dict[str, Any]:
    """Lowers; all values and llama.cpp's logits are finite. Returns what the manifest says of the rounding."""
    found = lower(view, tmp_path / "out", "q4_k_m", calibrated(view, tmp_path / "calibration", samples))
    for name, (_, values) in dequantized(tmp_path / "out" / "model.gguf").items():
        assert np.isfinite(values).all(), name
    assert np.isfinite(divergence(view.path, tmp_path / "out", length=40))
    json.dumps(found.notes, allow_nan=False)
    return {**found.notes["rounding"], "notes": found.notes["notes"]}


def test_an_input_channel_that_is_always_zero(tmp_path: Path) -> None:
    def change(model: Any) -> None:
        for layer in model.model.layers:
            layer.mlp.up_proj.weight[7] = 0

    told = finite_file(planted(tmp_path, change), tmp_path)
    dead = {entry["tensor"]: entry["dead_channels"] for entry in told["unusual"] if entry["dead_channels"]}
    assert dead == {f"blk.{i}.ffn_down.weight": 1 for i in range(2)}
    assert any("always zero" in note for note in told["notes"])


def test_blocks_and_rows_of_zeros(tmp_path: Path) -> None:
    def change(model: Any) -> None:
        model.model.layers[1].mlp.down_proj.weight[:, :256] = 0
        model.model.layers[0].self_attn.o_proj.weight[3] = 0

    told = finite_file(planted(tmp_path, change), tmp_path)
    zero = {entry["tensor"]: entry["zero_groups"] for entry in told["unusual"]}
    assert zero == {"blk.0.attn_output.weight": 8}  # beside weights, a block of zeros takes part in the correction
    assert not dequantized(tmp_path / "out" / "model.gguf")["blk.0.attn_output.weight"][1][3].any()


@pytest.mark.parametrize(
    "samples",
    [texts(1, length=1), texts(1, length=2), texts(3, length=4), [texts(1, length=20)[0]] * 5],
    ids=["one token", "two tokens", "shorter than a block", "one text, five times"],
)
def test_little_text(samples: list[Sample], tmp_path: Path) -> None:
    """XᵀX of rank one, or of few: damping makes it positive definite."""
    told = finite_file(planted(tmp_path), tmp_path, samples)
    assert told["by_method"] == {"gptq": told["tensors"]}


def test_one_token_for_all_text(tmp_path: Path) -> None:
    """XᵀX of rank one but for positions."""
    item = texts(1)[0].item
    told = finite_file(planted(tmp_path), tmp_path, [Sample((5,) * 30, 1, item)] * 4)
    assert told["by_method"] == {"gptq": told["tensors"]}


def test_no_text(tmp_path: Path) -> None:
    item = texts(1)[0].item
    with pytest.raises(InputError) as caught:
        calibrated(planted(tmp_path), tmp_path / "calibration", [Sample((), 0, item)])
    assert caught.value.code == "calibration-gap"


def test_activations_that_are_not_finite(tmp_path: Path) -> None:
    def change(model: Any) -> None:
        model.model.layers[0].mlp.up_proj.weight.fill_(1e30)
        model.model.layers[0].mlp.gate_proj.weight.fill_(1e30)

    with pytest.raises(InputError) as caught:
        calibrated(planted(tmp_path, change), tmp_path / "calibration")
    assert caught.value.code == "calibration-not-finite"
    assert "model.layers.0.mlp.down_proj.weight" in caught.value.what
