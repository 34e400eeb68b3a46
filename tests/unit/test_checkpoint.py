"""Reading checkpoints: against safetensors and torch, and with everything broken that can be."""

from __future__ import annotations

import gc
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models

from lora2edge.checkpoint import (
    decode,
    encode_rows,
    one_blas_thread,
    open_checkpoint,
    read_header,
    vocabulary_size,
)
from lora2edge.checkpoint.layers import find_missing
from lora2edge.errors import CheckpointError, Refusals
from tests.blas import thread_calls
from tests.damage import join_header, split_header
from tests.tiny import make_checkpoint

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("made") / "base", "qwen2", shards=3)


@pytest.fixture
def base(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "base"))


@pytest.fixture
def single(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "single", "qwen2", tied=False)


def refused(folder: Path | str) -> CheckpointError:
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(folder)
    assert error.value.what
    assert error.value.hint
    return error.value


def edit_json(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data, ensure_ascii=False))


# ---------------------------------------------------------------- floats


def test_every_bfloat16_is_decoded_as_torch_does() -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    ours = decode(bits.view(np.uint8), "BF16")
    theirs = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(ours, theirs)


def test_bfloat16_rounding_is_that_of_torch() -> None:
    """Every exponent and sign with mantissas at, just below and just above each kind of tie; infinities, NaN."""
    high = np.arange(1 << 16, dtype=np.uint32) << 16
    lows = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    values = (high[:, None] | lows).reshape(-1).view(np.float32)
    ours = encode_rows(values, "BF16")
    theirs = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    nan = np.isnan(values)
    np.testing.assert_array_equal(ours[~nan], theirs[~nan])
    assert np.isnan(decode(ours[nan].view(np.uint8), "BF16")).all()


@pytest.mark.parametrize(
    ("dtype", "torch_dtype"), [("F16", torch.float16), ("F32", torch.float32), ("F64", torch.float64)]
)
def test_other_floats(dtype: str, torch_dtype: torch.dtype) -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 1e3
    ours = encode_rows(values.numpy(), dtype)
    np.testing.assert_array_equal(ours, values.to(torch_dtype).numpy())
    np.testing.assert_array_equal(decode(ours.view(np.uint8), dtype), values.to(torch_dtype).float().numpy())


# ---------------------------------------------------------------- reading


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_rows_are_those_of_safetensors(dtype: str, tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base", "llama", dtype=dtype)
    checkpoint = open_checkpoint(base)
    theirs = load_file(base / "model.safetensors")
    assert set(checkpoint.tensors) == set(theirs)
    for name, info in checkpoint.tensors.items():
        assert info.shape == tuple(theirs[name].shape)
        stop = min(info.shape[0], 37)
        expected = theirs[name][5:stop].float().numpy()
        rows = checkpoint.rows(name, 5, stop)
        np.testing.assert_array_equal(rows, expected)
        rows[:] = 0
        np.testing.assert_array_equal(checkpoint.rows(name, 5, stop), expected)
        where = checkpoint.stored(name)
        assert where is not None
        raw = where.path.read_bytes()[where.offset : where.offset + where.length]
        np.testing.assert_array_equal(
            decode(np.frombuffer(raw, np.uint8), info.dtype)[:64], theirs[name].float().flatten()[:64]
        )


def test_shards_read_as_one(base: Path) -> None:
    checkpoint = open_checkpoint(base)
    weight_map = json.loads((base / INDEX).read_text())["weight_map"]
    assert len(set(weight_map.values())) >= 3
    assert {name: info.shard for name, info in checkpoint.tensors.items()} == weight_map
    for name, shard in weight_map.items():
        rows = checkpoint.rows(name, 0, checkpoint.tensors[name].shape[0])
        np.testing.assert_array_equal(rows, load_file(base / shard)[name].float().numpy())


def test_facts(base: Path) -> None:
    checkpoint = open_checkpoint(str(base))
    assert checkpoint.task == "causal-lm"
    assert checkpoint.config["model_type"] == "qwen2"
    assert set(checkpoint.tokenizer.files) == {
        "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json",
    }  # fmt: skip
    assert checkpoint.ref.base == str(base)
    assert checkpoint.module_names("model.norm.weight") == ["model.norm.weight"]
    with pytest.raises(IndexError):
        checkpoint.rows("model.norm.weight", 0, 65)
    checkpoint.close()


@pytest.mark.parametrize(
    ("architecture", "task"),
    [
        ("GPT2LMHeadModel", "causal-lm"),
        ("BertForSequenceClassification", "sequence-classification"),
        ("BertForTokenClassification", "token-classification"),
    ],
)
def test_task_comes_from_the_architecture(base: Path, architecture: str, task: str) -> None:
    edit_json(base / "config.json", lambda data: data.update(architectures=[architecture]))
    assert open_checkpoint(base).task == task


def test_fingerprint_and_hashes(base: Path) -> None:
    checkpoint = open_checkpoint(base)
    before = checkpoint.fingerprint()
    assert open_checkpoint(base).fingerprint() == before
    hashes = checkpoint.file_hashes()
    assert set(hashes) == {path.name for path in base.iterdir()}
    (base / "chat_template.jinja").write_text("changed")
    after = open_checkpoint(base)
    assert after.fingerprint() != before
    assert {name for name, value in after.file_hashes().items() if value != hashes[name]} == {"chat_template.jinja"}


def test_hub_cache_is_known_by_its_blobs(base: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    shutil.move(base, blobs)
    snapshot.mkdir()
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(file)
    shards = open_checkpoint(snapshot).fingerprint()["shards"]
    assert shards == {name: {"blob": name} for name in shards}


def test_non_float_tensor_is_refused_when_read(single: Path) -> None:
    weights = load_file(single / "model.safetensors")
    weights["model.position_ids"] = torch.arange(8)
    save_file(weights, single / "model.safetensors")
    checkpoint = open_checkpoint(single)
    with pytest.raises(CheckpointError) as error:
        checkpoint.rows("model.position_ids", 0, 8)
    assert error.value.code == "not-a-float"
    assert "I64" in error.value.what


def test_file_that_shrinks_while_it_is_read(single: Path) -> None:
    checkpoint = open_checkpoint(single)
    with (single / "model.safetensors").open("r+b") as file:
        file.truncate(5000)
    with pytest.raises(CheckpointError) as error:
        checkpoint.rows("lm_head.weight", 0, 700)
    assert error.value.code == "file-changed"


# ---------------------------------------------------------------- refusals


def test_missing_config(base: Path) -> None:
    (base / "config.json").unlink()
    assert refused(base).code == "no-checkpoint"


def test_neither_folder_nor_hub_id(base: Path) -> None:
    assert refused("/nowhere/at/all").code == "no-checkpoint"
    assert refused(base / "config.json").code == "no-checkpoint"


def test_hub_id_in_offline_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    error = refused("some-org/some-model-that-is-not-cached@main")
    assert error.code == "no-checkpoint"
    assert "hub" in error.why


def test_hub_id_in_the_cache(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache folder as huggingface_hub lays it out: the revision is found without a network."""
    cache, commit = tmp_path / "hub", "a" * 40
    repo = cache / "models--some-org--some-model"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "v1").write_text(commit)
    (repo / "snapshots").mkdir()
    shutil.copytree(base, repo / "snapshots" / commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    checkpoint = open_checkpoint("some-org/some-model@v1")
    assert checkpoint.path == repo / "snapshots" / commit
    assert (checkpoint.source.repo, checkpoint.source.revision) == ("some-org/some-model", "v1")
    assert refused("some-org/some-model@v2").code == "no-checkpoint"


def test_missing_shard(base: Path) -> None:
    shard = sorted(base.glob("*.safetensors"))[1]
    shard.unlink()
    error = refused(base)
    assert error.code == "missing-shard"
    assert shard.name in error.what


def test_many_missing_shards_are_counted(base: Path) -> None:
    names = {f"t{i}": f"s{i:05}.safetensors" for i in range(20_000)}
    edit_json(base / INDEX, lambda data: data["weight_map"].update(names))
    error = refused(base)
    assert error.code == "missing-shard"
    assert "s00000.safetensors, s00001.safetensors, s00002.safetensors and 19,997 more" in error.what


def test_index_that_points_outside(base: Path) -> None:
    edit_json(base / INDEX, lambda data: data["weight_map"].update({"x": "../../etc/passwd"}))
    assert refused(base).code == "missing-shard"


def test_index_names_a_tensor_that_the_shard_lacks(base: Path) -> None:
    edit_json(
        base / INDEX,
        lambda data: data["weight_map"].update({"model.extra": sorted(base.glob("*.safetensors"))[0].name}),
    )
    error = refused(base)
    assert error.code == "missing-tensor"
    assert "model.extra" in error.what


def test_broken_json(base: Path) -> None:
    (base / INDEX).write_text("{")
    assert refused(base).code == "bad-index"
    (base / "config.json").write_text("[]")
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(base)
    assert error.value.code == "bad-config"


def test_only_pickles(single: Path) -> None:
    (single / "model.safetensors").rename(single / "pytorch_model.bin")
    error = refused(single)
    assert error.code == "pickle-only"
    assert "safetensors" in error.hint


def test_no_weights(single: Path) -> None:
    (single / "model.safetensors").unlink()
    assert refused(single).code == "no-weights"


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes 4-bit"),
        ({"load_in_8bit": True}, "bitsandbytes 8-bit"),
        ({"quant_method": "hqq"}, "hqq"),
    ],
)
def test_quantized_base(base: Path, settings: dict[str, Any], word: str) -> None:
    edit_json(base / "config.json", lambda data: data.update(quantization_config=settings))
    error = refused(base)
    assert error.code == "quantized-base"
    assert word in error.what


def test_no_tokenizer(base: Path) -> None:
    (base / "tokenizer.json").unlink()
    error = refused(base)
    assert error.code == "no-tokenizer"
    assert "save_pretrained" in error.hint


def test_refusals_come_together(base: Path) -> None:
    (base / "tokenizer.json").unlink()
    edit_json(base / "config.json", lambda data: data.update(quantization_config={"quant_method": "awq"}))
    with pytest.raises(Refusals) as error:
        open_checkpoint(base)
    assert {item.code for item in error.value.errors} == {"no-tokenizer", "quantized-base"}


def test_vocabulary_larger_than_the_embedding(base: Path) -> None:
    edit_json(base / "tokenizer.json", lambda data: data["added_tokens"][0].update(id=768))
    error = refused(base)
    assert error.code == "vocabulary-too-large"
    assert "769 ids, the embedding 768 rows" in error.what


def test_unknown_task(base: Path) -> None:
    edit_json(base / "config.json", lambda data: data.update(architectures=["WhisperForConditionalGeneration"]))
    assert refused(base).code == "unknown-task"


def test_untied_checkpoint_without_a_head(base: Path) -> None:
    edit_json(base / "config.json", lambda data: data.update(tie_word_embeddings=False))
    error = refused(base)
    assert error.code == "missing-tensor"
    assert "head" in error.what


def llama_like(layers: int, *parts: str) -> set[str]:
    return {f"model.layers.{number}.{part}.weight" for number in range(layers) for part in parts} | {"lm_head.weight"}


@pytest.mark.parametrize(
    ("config", "names", "lacks"),
    [
        ({}, llama_like(4, "q", "k") - {"model.layers.2.k.weight"}, "model.layers.2.k.weight"),
        ({"num_hidden_layers": 4}, llama_like(3, "q", "k"), "model.layers.3"),
        ({"n_layer": 10**9}, llama_like(3, "q"), "model.layers.3, model.layers.4, model.layers.5 and 99,994 more"),
        ({}, {name for name in llama_like(4, "q", "k") if ".1." not in name}, "model.layers.1"),
        (
            {"num_hidden_layers": 4},
            llama_like(4, "experts.0.up", "experts.1.up") - {"model.layers.3.experts.1.up.weight"},
            "model.layers.3.experts.1.up.weight",
        ),
    ],
)
def test_layers_that_lack_a_tensor(config: dict[str, Any], names: set[str], lacks: str) -> None:
    error = find_missing(config, names)
    assert error is not None and error.code == "missing-tensors"
    assert error.what == f"the checkpoint lacks {lacks}"


@pytest.mark.parametrize(
    ("config", "names"),
    [
        ({"num_hidden_layers": 4}, llama_like(4, "q", "k")),
        # DeepSeek: dense first layers, and a layer more for the prediction of several tokens.
        (
            {"num_hidden_layers": 4, "first_k_dense_replace": 1},
            llama_like(5, "q", "experts.0.up") - {"model.layers.0.experts.0.up.weight"}
            | {"model.layers.0.up.weight", "model.layers.4.eh_proj.weight"},
        ),
        # T5: only the first block of each stack has the bias, and the decoder's blocks have another layer.
        (
            {"num_layers": 3, "num_decoder_layers": 2},
            {f"encoder.block.{i}.layer.{j}.wi.weight" for i in range(3) for j in range(2)}
            | {f"decoder.block.{i}.layer.{j}.wi.weight" for i in range(2) for j in range(3)}
            | {"encoder.block.0.layer.0.bias.weight", "decoder.block.0.layer.0.bias.weight"},
        ),
        # ALBERT: one layer runs twelve times.
        (
            {"num_hidden_layers": 12},
            {"albert.encoder.albert_layer_groups.0.albert_layers.0.ffn.weight", "albert.embeddings.weight"},
        ),
        # Jamba and others: attention in some layers, recurrence in the rest.
        ({"num_hidden_layers": 2}, {"model.layers.0.mamba.weight", "model.layers.1.q.weight"}),
        # Nemotron-NAS: layers without attention.
        (
            {"num_hidden_layers": 4, "block_configs": [{}] * 4},
            llama_like(4, "q", "mlp") - {"model.layers.2.q.weight"},
        ),
    ],
)
def test_layers_of_another_kind_lack_nothing(config: dict[str, Any], names: set[str]) -> None:
    assert find_missing(config, names) is None


def test_a_base_that_lacks_a_tensor_is_refused(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base", "qwen2", layers=3)
    header, data = split_header(base / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    start, stop = header.pop(name)["data_offsets"]
    for key, entry in header.items():
        if key != "__metadata__" and entry["data_offsets"][0] >= stop:
            entry["data_offsets"] = [at - (stop - start) for at in entry["data_offsets"]]
    join_header(base / "model.safetensors", header, data[:start] + data[stop:])
    error = refused(base)
    assert error.code == "missing-tensors" and name in error.what


# ---------------------------------------------------------------- headers


def header_file(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    ("header", "data", "length"),
    [
        ({"a": entry()}, bytes(8), 1 << 60),
        ({"a": entry()}, bytes(8), 4000),
        (b"{not json", b"", None),
        (b"[1]", b"", None),
        (b"[" * 100_000, b"", None),
        ({"a": entry()}, bytes(7), None),
        ({"a": entry()}, bytes(9), None),
        ({"a": entry(offsets=(0, 4))}, bytes(4), None),
        ({"a": entry(offsets=(8, 0))}, bytes(8), None),
        ({"a": entry(offsets=(-8, 0))}, bytes(8), None),
        ({"a": entry(shape=(-2,))}, bytes(8), None),
        ({"a": entry(shape=("2",))}, bytes(8), None),
        ({"a": entry(shape=(True, 2))}, bytes(8), None),
        ({"a": entry(dtype="F33")}, bytes(8), None),
        ({"a": entry(dtype=["F32"])}, bytes(8), None),
        ({"a": 7}, bytes(8), None),
        ({"a": {"dtype": "F32"}}, bytes(8), None),
        ({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12), None),
        ({"a": entry(), "b": entry(offsets=(12, 20))}, bytes(20), None),
    ],
)  # fmt: skip
def test_broken_headers(header: Any, data: bytes, length: int | None, tmp_path: Path) -> None:
    path = header_file(tmp_path / "x.safetensors", header, data, length)
    with pytest.raises(CheckpointError) as error:
        read_header(path)
    assert error.value.code == "bad-safetensors"


@given(noise=st.binary(max_size=200))
def test_noise_never_gives_a_traceback(noise: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "noise.safetensors"
    path.write_bytes(noise)
    with pytest.raises(CheckpointError):
        read_header(path)


def test_every_truncation_is_seen(single: Path) -> None:
    whole = (single / "model.safetensors").read_bytes()
    for kept in (0, 4, 8, 100, 2000, len(whole) - 1):
        (single / "model.safetensors").write_bytes(whole[:kept])
        assert refused(single).code == "bad-safetensors"


# ---------------------------------------------------------------- vocabulary


def test_vocabulary_size_is_that_of_tokenizers(made: Path, tmp_path: Path) -> None:
    spm = make_checkpoint(tmp_path / "spm", "gemma2")
    for path in (made / "tokenizer.json", spm / "tokenizer.json"):
        assert vocabulary_size(path) == max(Tokenizer.from_file(str(path)).get_vocab().values()) + 1


def test_vocabulary_of_awkward_tokens(tmp_path: Path) -> None:
    """Tokens that look like the file's own syntax."""
    tokens = [
        '"',
        "\\",
        '\\"',
        "vocab",
        '"vocab":{',
        "}",
        "model",
        "added_tokens",
        '"added_tokens":[',
        "\n",
        "医",
        "\u2028",
    ]
    path = tmp_path / "tokenizer.json"
    for kind in (
        models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="}"),
        models.BPE({token: i for i, token in enumerate(tokens)}, []),
        models.Unigram([(token, -1.0) for token in tokens], unk_id=0),
    ):
        tokenizer = Tokenizer(kind)
        for pretty in (True, False):
            tokenizer.save(str(path), pretty=pretty)
            assert vocabulary_size(path) == len(tokens)
        tokenizer.add_special_tokens(["<|end|>"])
        tokenizer.save(str(path))
        assert vocabulary_size(path) == len(tokens) + 1


@pytest.mark.parametrize("text", ["", "{}", '{"model": {"vocab": {"a": 1, "b"', '{"model": {"vocab": [["a", 1'])
def test_broken_tokenizer(text: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(text)
    with pytest.raises(CheckpointError) as error:
        vocabulary_size(path)
    assert error.value.code == "bad-tokenizer"


# ---------------------------------------------------------------- BLAS


def test_one_blas_thread_gives_the_threads_back() -> None:
    get, put = thread_calls()
    before = get()
    put(2)
    try:
        with one_blas_thread(), one_blas_thread():
            assert get() == 1
        assert get() == 2
    finally:
        put(before)


def test_files_are_closed_with_their_reader(tmp_path: Path) -> None:
    """Whoever reads many checkpoints in one process and forgets to close them runs out of files otherwise."""
    base = make_checkpoint(tmp_path / "base")
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(5):
        checkpoint = open_checkpoint(base)
        checkpoint.rows(next(iter(checkpoint.tensors)), 0, 1)
        del checkpoint
    gc.collect()
    assert len(list(Path("/proc/self/fd").iterdir())) <= before
