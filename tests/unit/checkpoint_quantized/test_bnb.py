"""NF4, FP4 and LLM.int8() checkpoints: against bitsandbytes itself, on the CPU."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lora2edge.checkpoint import encode_rows, open_checkpoint
from lora2edge.errors import CheckpointError
from tests.tiny import make_checkpoint
from tests.unit.checkpoint_quantized.folders import assert_rows, configure, rewrite

bnb = pytest.importorskip("bitsandbytes")

DOWN = "model.layers.0.mlp.down_proj.weight"
Q = "model.layers.1.self_attn.q_proj.weight"


def pack(name: str, weight: torch.Tensor, **options: Any) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The parts as bitsandbytes saves them, and what it dequantizes them to.

    It is given the matrix as one long row: on processors with AVX512, bitsandbytes 0.50 takes wrong block scales where
    a row is a multiple of 32 and no multiple of the blocksize.
    """
    packed, state = bnb.functional.quantize_4bit(weight.clone(), **options)
    parts = {name: packed, **{f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}}
    state.shape = torch.Size((1, weight.numel()))
    return parts, bnb.functional.dequantize_4bit(packed, state).reshape(weight.shape)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("plain") / "base", "qwen2", hidden=96, intermediate=136)


@pytest.fixture
def plain(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "base"))


NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
FOUR_BIT = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("blocksize", [64, 256])
def test_4bit_rows_are_those_of_bitsandbytes(
    quant_type: str, double: bool, dtype: torch.dtype, blocksize: int, plain: Path
) -> None:
    """Rows of 136 and 96 values: blocks run across rows, and the last one is short."""
    generator = torch.Generator().manual_seed(0)
    options = {"quant_type": quant_type, "compress_statistics": double, "blocksize": blocksize}
    changed, expected = {}, {}
    for name, shape in ((DOWN, (96, 136)), (Q, (96, 96))):
        weight = (torch.randn(shape, generator=generator) * 0.05).to(dtype)
        changed[name], expected[name] = pack(name, weight, **options)
    checkpoint = open_checkpoint(rewrite(plain, FOUR_BIT, changed))
    for name, value in expected.items():
        assert_rows(checkpoint, name, value)
        assert checkpoint.tensors[name].dtype == NAMES[dtype]
    checkpoint.close()


def test_many_nested_blocks(plain: Path) -> None:
    """More than 256 scales: rows begin and end in different blocks of double quantization."""
    name = "model.layers.0.mlp.up_proj.weight"
    parts, expected = pack(name, torch.randn(1111, 100).bfloat16(), quant_type="nf4", compress_statistics=True)
    checkpoint = open_checkpoint(rewrite(plain, FOUR_BIT, {name: parts}))
    assert_rows(checkpoint, name, expected)
    for start in range(0, 1111, 97):
        rows = checkpoint.rows(name, start, min(start + 97, 1111))
        np.testing.assert_array_equal(rows, expected[start : start + 97].float().numpy())


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32])
def test_other_storage_dtypes(storage: torch.dtype, plain: Path) -> None:
    """FSDP needs the packed weights to have a float dtype (bnb_4bit_quant_storage)."""
    parts, expected = pack(Q, torch.randn(96, 96).half(), quant_type="nf4", quant_storage=storage)
    assert parts[Q].dtype == storage
    assert_rows(open_checkpoint(rewrite(plain, FOUR_BIT, {Q: parts})), Q, expected)


def test_int8_rows_are_those_of_bitsandbytes(plain: Path) -> None:
    weight = torch.randn(96, 136).half()
    codes, scales, _ = bnb.functional.int8_vectorwise_quant(weight)
    module = DOWN.removesuffix(".weight")
    parts = {DOWN: codes, f"{module}.SCB": scales, f"{module}.weight_format": torch.tensor(0, dtype=torch.uint8)}
    folder = rewrite(plain, {"quant_method": "bitsandbytes", "load_in_8bit": True}, {DOWN: parts})
    checkpoint = open_checkpoint(folder)
    expected = bnb.functional.int8_vectorwise_dequant(codes, scales)
    assert expected.dtype == torch.float32
    assert_rows(checkpoint, DOWN, expected)
    assert checkpoint.tensors[DOWN].dtype == "BF16"
    assert f"{module}.SCB" not in checkpoint.tensors
    assert f"{module}.weight_format" not in checkpoint.tensors


def test_it_looks_like_the_plain_checkpoint(plain: Path, made: Path) -> None:
    weight = load_file(plain / "model.safetensors")[Q]
    parts, expected = pack(Q, weight, quant_type="nf4", compress_statistics=True)
    checkpoint = open_checkpoint(rewrite(plain, FOUR_BIT, {Q: parts}))
    original = open_checkpoint(made)
    assert checkpoint.config == original.config
    assert set(checkpoint.tensors) == set(original.tensors)
    for name, info in original.tensors.items():
        assert checkpoint.tensors[name] == info
        if name != Q:
            rows = checkpoint.rows(name, 0, info.shape[0])
            np.testing.assert_array_equal(rows, original.rows(name, 0, info.shape[0]))
            assert checkpoint.stored(name) is not None
    assert checkpoint.ref.base == str(plain)
    assert checkpoint.fingerprint() != original.fingerprint()
    assert checkpoint.file_hashes()["model.safetensors"] != original.file_hashes()["model.safetensors"]
    with pytest.raises(IndexError):
        checkpoint.rows(Q, 0, 97)
    assert (expected.float() - weight.float()).abs().max() > 0.01


@pytest.mark.parametrize(
    ("quantization", "dtype"),
    [
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}, torch.bfloat16),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, torch.float16),
        ({"load_in_8bit": True}, torch.float16),
    ],
)
@pytest.mark.parametrize("tied", [True, False])
def test_a_checkpoint_that_transformers_saved(
    quantization: dict[str, Any], dtype: torch.dtype, tied: bool, tmp_path: Path
) -> None:
    """Quantized, saved and loaded by transformers: the model filled from our view has the live model's logits."""
    from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

    made = make_checkpoint(tmp_path / "plain", "llama", tied=tied, dtype=str(dtype).removeprefix("torch."))
    settings = BitsAndBytesConfig(**quantization)
    packed = tmp_path / "packed"
    shutil.copytree(made, packed, ignore=shutil.ignore_patterns("model.safetensors"))
    model = AutoModelForCausalLM.from_pretrained(made, quantization_config=settings, dtype=dtype, device_map="cpu")
    model.save_pretrained(packed)
    live = AutoModelForCausalLM.from_pretrained(packed, dtype=dtype, device_map="cpu").eval()

    checkpoint = open_checkpoint(packed)
    assert "quantization_config" not in checkpoint.config
    plain = open_checkpoint(made)
    assert {name: info.shape for name, info in checkpoint.tensors.items()} == {
        name: info.shape for name, info in plain.tensors.items()
    }
    assert {info.dtype for info in checkpoint.tensors.values()} == {"BF16" if dtype == torch.bfloat16 else "F16"}

    ours = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(made), dtype=dtype).eval()
    rows = {name: torch.from_numpy(checkpoint.rows(name, 0, info.shape[0])) for name, info in plain.tensors.items()}
    missing, unexpected = ours.load_state_dict(rows, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    ours.tie_weights()
    linear = [name for name in plain.tensors if name.endswith("proj.weight")]
    assert len(linear) == 14
    with torch.no_grad():
        if "load_in_4bit" in quantization:
            for name in linear:
                torch.testing.assert_close(_live_weight(live, name, dtype), rows[name], rtol=0, atol=0)
        ids = torch.arange(3, 40)[None]
        expected = live.dequantize().float()(ids).logits
        torch.testing.assert_close(ours.float()(ids).logits, expected, rtol=1e-5, atol=1e-5)
        original = AutoModelForCausalLM.from_pretrained(made, dtype=torch.float32).eval()(ids).logits
    assert (original - expected).abs().max() > 1e-2


def _live_weight(model: torch.nn.Module, name: str, dtype: torch.dtype) -> torch.Tensor:
    """The weight that a live 4-bit layer computes with: its answer to the unit vectors.

    On processors with AVX512-BF16 it would round its block scales to bfloat16 first.
    """
    layer = model.get_submodule(name.removesuffix(".weight"))
    assert type(layer).__name__ == "Linear4bit"
    layer.support_avx512bf16_for_cpu = False
    layer.compute_dtype = dtype
    return layer(torch.eye(layer.in_features, dtype=dtype)).T.float()


# ---------------------------------------------------------------- damaged


def refused(folder: Path) -> CheckpointError:
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(folder)
    assert error.value.code == "damaged-quantization"
    assert error.value.what
    assert error.value.why
    assert error.value.hint
    return error.value


STATE = f"{Q}.quant_state.bitsandbytes__nf4"


def edit_state(parts: dict[str, torch.Tensor], **entries: Any) -> None:
    state = json.loads(parts[STATE].numpy().tobytes())
    text = json.dumps({**state, **entries}).encode()
    parts[STATE] = torch.frombuffer(bytearray(text), dtype=torch.uint8)


def garbage(parts: dict[str, torch.Tensor], text: bytes) -> None:
    parts[STATE] = torch.frombuffer(bytearray(text), dtype=torch.uint8)


DAMAGE: dict[str, Callable[[dict[str, torch.Tensor]], object]] = {
    "no weight": lambda parts: parts.pop(Q),
    "no absmax": lambda parts: parts.pop(f"{Q}.absmax"),
    "no quant_map": lambda parts: parts.pop(f"{Q}.quant_map"),
    "no nested_absmax": lambda parts: parts.pop(f"{Q}.nested_absmax"),
    "no nested_quant_map": lambda parts: parts.pop(f"{Q}.nested_quant_map"),
    "no quant_state": lambda parts: parts.pop(STATE),
    "short weight": lambda parts: parts.update({Q: parts[Q][:-1]}),
    "short absmax": lambda parts: parts.update({f"{Q}.absmax": parts[f"{Q}.absmax"][:-1]}),
    "long nested_absmax": lambda parts: parts.update({f"{Q}.nested_absmax": torch.ones(2)}),
    "short nested_quant_map": lambda parts: parts.update({f"{Q}.nested_quant_map": torch.ones(16)}),
    "absmax of integers": lambda parts: parts.update({f"{Q}.absmax": torch.ones(144, dtype=torch.int32)}),
    "another quant_map": lambda parts: parts.update({f"{Q}.quant_map": torch.linspace(-1, 1, 16)}),
    "unknown quant_type": lambda parts: parts.update({STATE.replace("nf4", "af4"): parts.pop(STATE)}),
    "two quant_types": lambda parts: edit_state(parts, quant_type="fp4"),
    "no JSON": lambda parts: garbage(parts, b"\xff\x00{"),
    "deep JSON": lambda parts: garbage(parts, b"[" * 60000),
    "JSON list": lambda parts: garbage(parts, b"[]"),
    "huge quant_state": lambda parts: garbage(parts, b" " * (1 << 17)),
    "blocksize 0": lambda parts: edit_state(parts, blocksize=0),
    "blocksize 1e30": lambda parts: edit_state(parts, blocksize=10**30),
    "blocksize text": lambda parts: edit_state(parts, blocksize="64"),
    "blocksize of another": lambda parts: edit_state(parts, blocksize=128),
    "shape too large": lambda parts: edit_state(parts, shape=[1 << 40, 1 << 40]),
    "shape negative": lambda parts: edit_state(parts, shape=[-96, -96]),
    "shape null": lambda parts: edit_state(parts, shape=None),
    "dtype int8": lambda parts: edit_state(parts, dtype="int8"),
    "nested_blocksize 0": lambda parts: edit_state(parts, nested_blocksize=0),
    "nested_blocksize true": lambda parts: edit_state(parts, nested_blocksize=True),
    "nested_offset NaN": lambda parts: edit_state(parts, nested_offset=float("nan")),
    "nested_offset list": lambda parts: edit_state(parts, nested_offset=[1]),
    "nested_dtype float16": lambda parts: edit_state(parts, nested_dtype="float16"),
}


@pytest.mark.parametrize("damage", list(DAMAGE))
def test_damaged_4bit(damage: str, plain: Path) -> None:
    parts, _ = pack(Q, torch.randn(96, 96).bfloat16(), quant_type="nf4", compress_statistics=True)
    other, _ = pack(DOWN, torch.randn(96, 136).bfloat16(), quant_type="nf4", compress_statistics=True)
    DAMAGE[damage](parts)
    error = refused(rewrite(plain, FOUR_BIT, {Q: parts, DOWN: other}))
    assert Q in error.what


@pytest.mark.parametrize(
    ("suffix", "value"),
    [
        ("SCB", None),
        ("SCB", torch.ones(95)),
        ("SCB", torch.ones(96, dtype=torch.int32)),
        ("weight_format", torch.tensor(1, dtype=torch.uint8)),
        ("weight_format", torch.zeros(7, dtype=torch.uint8)),
        ("weight", None),
        ("weight", torch.ones(96, 96)),
        ("weight", torch.ones(96, dtype=torch.int8)),
    ],
)
def test_damaged_int8(suffix: str, value: torch.Tensor | None, plain: Path) -> None:
    changed = {}
    for name in (Q, DOWN):
        module = name.removesuffix(".weight")
        codes = torch.zeros(96, 96 if name == Q else 136, dtype=torch.int8)
        format_ = torch.tensor(0, dtype=torch.uint8)
        changed[name] = {name: codes, f"{module}.SCB": torch.ones(96), f"{module}.weight_format": format_}
    part = f"{Q.removesuffix('.weight')}.{suffix}"
    changed[Q].pop(part)
    if value is not None:
        changed[Q][part] = value
    refused(rewrite(plain, {"quant_method": "bitsandbytes", "load_in_8bit": True}, changed))


def test_a_plain_weight_beside_its_packed_one(plain: Path) -> None:
    """`x.weight` cannot be there twice, but a state without packed bytes can."""
    parts, _ = pack(Q, torch.randn(96, 96).bfloat16(), quant_type="nf4")
    parts[Q] = torch.randn(96, 96).bfloat16()
    error = refused(rewrite(plain, FOUR_BIT, {Q: parts}))
    assert "18432" in error.why
    assert "4608" in error.why


@pytest.mark.parametrize("settings", [[1], "nf4", {"quant_method": ["gptq"]}, {"quant_method": 7}])
def test_config_with_wrong_types(settings: Any, plain: Path) -> None:
    configure(plain, quantization_config=settings)
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(plain)
    assert error.value.code in {"quantized-base", "bad-config"}


@pytest.mark.parametrize(
    "method", ["hqq", "aqlm", "eetq", "quanto", "mxfp4", "torchao", "higgs", "spqr", "vptq", "bitnet", "auto-round"]
)
def test_other_methods_are_refused_by_name(method: str, plain: Path) -> None:
    configure(plain, quantization_config={"quant_method": method})
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(plain)
    assert error.value.code == "quantized-base"
    assert method in error.value.what
    assert "--base" in error.value.hint


def test_gpt2_is_refused(plain: Path) -> None:
    parts, _ = pack(Q, torch.randn(96, 96).bfloat16(), quant_type="nf4")
    folder = rewrite(plain, FOUR_BIT, {Q: parts})
    configure(folder, model_type="gpt2")
    with pytest.raises(CheckpointError, match="bitsandbytes") as error:
        open_checkpoint(folder)
    assert "Conv1D" in error.value.why


def test_bytes_flipped_anywhere_in_the_state_never_crash(plain: Path) -> None:
    """Opens, or one CheckpointError; nothing else."""
    parts, _ = pack(Q, torch.randn(96, 96).bfloat16(), quant_type="nf4", compress_statistics=True)
    rewrite(plain, FOUR_BIT, {Q: parts})
    stored = load_file(plain / "model.safetensors")
    text = bytes(stored[STATE].numpy())
    rng = np.random.default_rng(0)
    refusals = 0
    for _ in range(60):
        broken = bytearray(text)
        for at in rng.integers(0, len(text), 2):
            broken[at] ^= 1 << int(rng.integers(0, 8))
        stored[STATE] = torch.frombuffer(broken, dtype=torch.uint8)
        save_file(stored, plain / "model.safetensors", {"format": "pt"})
        try:
            checkpoint = open_checkpoint(plain)
        except CheckpointError as error:
            assert error.hint
            refusals += 1
            continue
        rows = checkpoint.rows(Q, 0, checkpoint.tensors[Q].shape[0])
        assert encode_rows(rows, "BF16").size == 96 * 96
        checkpoint.close()
    assert refusals > 30
