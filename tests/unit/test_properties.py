"""What holds for every input: readers of strangers' files either read them as others do, or raise one of our errors."""

from __future__ import annotations

import json
import re
import shutil
import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save
from tokenizers import Tokenizer, models

from lora2edge.adapters import read_adapter
from lora2edge.backends.gguf.model import plan_model
from lora2edge.backends.gguf.vocabulary import read_vocabulary
from lora2edge.checkpoint import open_checkpoint, read_header, vocabulary_size
from lora2edge.checkpoint.fields import FIELDS, check_fields
from lora2edge.checkpoint.untrusted import compile_pattern, parse_json
from lora2edge.contracts import TokenizerFiles
from lora2edge.errors import AdapterError, CheckpointError, InputError, Refusals
from tests.damage import ADAPTER_CONFIG, CONFIG, GENERATION, INDEX, TOKENIZER, TOKENIZER_CONFIG, edit_json
from tests.tiny import make_adapter, make_checkpoint

SLOWEST_SECONDS = 2.0
few = settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.filter_too_much],
)
many = settings(few, max_examples=400)

WORDS = ("", "none", "LORA", "CAUSAL_LM", "q_proj", "q_proj.weight", "linear", "yarn", "longrope", "llama3", "type",
         "rope_type", "factor", "rope_theta", "full_attention", "sliding_attention", "Qwen2ForCausalLM", "gptq",
         "model.safetensors", "../model.safetensors", "/etc/passwd", "\x00", "\ud800", "(", ".*", "eval")  # fmt: skip
NUMBERS = st.integers() | st.sampled_from([0, -1, 1, 2, 4, 64, 1 << 31, 1 << 63, 1 << 64, 10**400]) | st.floats()
SCALARS = st.none() | st.booleans() | NUMBERS | st.text(max_size=8) | st.sampled_from(WORDS)
NAMES = st.text(max_size=6) | st.sampled_from(WORDS)
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=4), max_leaves=8
)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sound")
    base = make_checkpoint(root / "base", "qwen2")
    make_checkpoint(root / "sharded", "qwen2", shards=3)
    make_adapter(root / "adapter", base, targets=["q_proj", "down_proj"])
    return root


@pytest.fixture
def base(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound / "base", tmp_path / "base"))


@pytest.fixture
def sharded(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound / "sharded", tmp_path / "sharded"))


@pytest.fixture
def adapter(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound / "adapter", tmp_path / "adapter"))


def check_error(error: InputError) -> None:
    """One of ours, with its parts, fit for a terminal and for JSON in UTF-8."""
    for single in error.errors if isinstance(error, Refusals) else (error,):
        assert single.what and single.why
        assert re.fullmatch("[a-z0-9-]+", single.code)
    assert json.dumps(error.as_dict(), ensure_ascii=False).encode("utf-8")


def put(path: Path, original: bytes, key: str, value: Any) -> None:
    """The object `original` with `key` set to `value`, in `path`."""
    path.write_bytes(original)
    edit_json(path, lambda data: data.update({key: value}))


# ---------------------------------------------------------------- safetensors


def compare(path: Path, raw: bytes) -> bool:
    """Reads `raw` as a header. Where it passes, safetensors must say the same; returns whether it passed."""
    path.write_bytes(raw)
    try:
        header = read_header(path)
    except CheckpointError as error:
        assert error.code == "bad-safetensors"
        check_error(error)
        return False
    theirs = {
        name: (found["dtype"], found["shape"], bytes(found["data"])) for name, found in safetensors.deserialize(raw)
    }
    ours = {
        tensor.info.name: (
            tensor.info.dtype, list(tensor.info.shape), raw[tensor.offset : tensor.offset + tensor.length],
        )
        for tensor in header.tensors
    }  # fmt: skip
    assert ours == theirs
    return True


@many
@given(raw=st.binary(max_size=300))
def test_any_bytes_are_no_header(raw: bytes, tmp_path: Path) -> None:
    compare(tmp_path / "x.safetensors", raw)


@many
@given(header=JSON, data=st.binary(max_size=16))
def test_any_json_as_header(header: Any, data: bytes, tmp_path: Path) -> None:
    text = json.dumps(header).encode()
    compare(tmp_path / "x.safetensors", struct.pack("<Q", len(text)) + text + data)


DTYPES = st.sampled_from(["F32", "BF16", "F16", "I8", "F4", "F6_E2M3", "F33", "BOOL", "C64"])
SIZES = st.integers(0, 5) | st.sampled_from([1 << 31, 1 << 62, 1 << 63, -1, 1.0, True, "2"])
ENTRIES = st.fixed_dictionaries(
    {"dtype": DTYPES, "shape": st.lists(SIZES, max_size=3), "data_offsets": st.lists(SIZES, min_size=1, max_size=3)},
    optional={"more": SCALARS},
)


@many
@given(
    tensors=st.dictionaries(st.sampled_from(["a", "b", "c", "", "\x00", "__metadata__"]), ENTRIES | JSON, max_size=3),
    size=st.integers(0, 32),
)
@example(tensors={"a": {"dtype": "F4", "shape": [3], "data_offsets": [0, 1]}}, size=1)
@example(tensors={"a": {"dtype": "F32", "shape": [0, 1 << 62, 1 << 62], "data_offsets": [0, 0]}}, size=0)
def test_any_entries_as_header(tensors: dict[str, Any], size: int, tmp_path: Path) -> None:
    text = json.dumps(tensors).encode()
    compare(tmp_path / "x.safetensors", struct.pack("<Q", len(text)) + text + bytes(size))


@many
@given(
    shapes=st.dictionaries(
        st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=20).filter(
            lambda name: name != "__metadata__"
        ),
        st.tuples(
            st.lists(st.integers(0, 4), max_size=4),
            st.sampled_from(["float32", "float16", "float64", "int64", "int32", "uint8", "bool"]),
        ),
        min_size=1,  # of none, safetensors 0.8 writes a header that it cannot read itself
        max_size=5,
    ),
    metadata=st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3),
)
def test_what_safetensors_writes_is_read_as_safetensors_reads_it(
    shapes: dict[str, tuple[list[int], str]], metadata: dict[str, str], tmp_path: Path
) -> None:
    for text in (*metadata, *metadata.values()):
        assume(not any("\ud800" <= character <= "\udfff" for character in text))
    raw = save({name: np.ones(shape, dtype) for name, (shape, dtype) in shapes.items()}, metadata)
    path = tmp_path / "x.safetensors"
    assert compare(path, raw)
    assert read_header(path).metadata == metadata


# ---------------------------------------------------------------- JSON files


@many
@given(value=JSON)
def test_json_is_read_as_python_reads_it(value: Any) -> None:
    text = json.dumps(value)
    try:
        expected = json.loads(text)
    except ValueError:  # thousands of digits
        return
    assert json.dumps(parse_json(text.encode())) == json.dumps(expected)


@many
@given(raw=st.binary(max_size=100))
def test_any_bytes_are_no_config(raw: bytes, base: Path) -> None:
    (base / CONFIG).write_bytes(raw)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(base)
    check_error(caught.value)


@pytest.mark.parametrize("name", [CONFIG, GENERATION, TOKENIZER_CONFIG])
@few
@given(data=st.data())
def test_any_value_in_a_checkpoint(name: str, data: st.DataObject, base: Path, sound: Path) -> None:
    """Where the checkpoint opens, a plan can be made of its config or is refused."""
    key = data.draw(st.sampled_from(sorted(FIELDS[name])))
    put(base / name, (sound / "base" / name).read_bytes(), key, data.draw(JSON))
    try:
        checkpoint = open_checkpoint(base)
    except InputError as error:
        check_error(error)
        return
    checkpoint.close()
    try:
        plan_model(checkpoint.config, checkpoint.tensors)
    except InputError as error:
        check_error(error)


@few
@given(changes=st.dictionaries(st.sampled_from(sorted(FIELDS[CONFIG])), JSON, max_size=4))
def test_any_rotary_settings(changes: dict[str, Any], sound: Path) -> None:
    """Values that have the right kind, however odd, never break the plan."""
    checkpoint = open_checkpoint(sound / "base")
    config = {**checkpoint.config, **changes}
    checkpoint.close()
    try:
        check_fields(config, CONFIG, "bad-config", CheckpointError)
        plan_model(config, checkpoint.tensors)
    except InputError as error:
        check_error(error)


@settings(few, max_examples=300)
@given(data=st.data())
def test_any_value_in_an_adapter_config(data: st.DataObject, adapter: Path, sound: Path) -> None:
    original = (sound / "adapter" / ADAPTER_CONFIG).read_bytes()
    key = data.draw(st.sampled_from(sorted({*FIELDS[ADAPTER_CONFIG], *json.loads(original)})))
    value = data.draw(JSON)
    put(adapter / ADAPTER_CONFIG, original, key, value)
    try:
        found = read_adapter(adapter)
    except InputError as error:
        check_error(error)
        return
    found.close()
    assert json.dumps(found.config[key]) == json.dumps(value)
    check_fields(found.config, ADAPTER_CONFIG, "bad-adapter-config", AdapterError)


@few
@given(
    weight_map=JSON
    | st.dictionaries(
        st.sampled_from(["lm_head.weight", "model.norm.weight", "more"]),
        st.sampled_from(["model-00001-of-00004.safetensors", "model.safetensors", "x" * 300]) | SCALARS,
    )
)
def test_any_weight_map(weight_map: Any, sharded: Path, sound: Path) -> None:
    put(sharded / INDEX, (sound / "sharded" / INDEX).read_bytes(), "weight_map", weight_map)
    try:
        open_checkpoint(sharded).close()
    except InputError as error:
        check_error(error)


# ---------------------------------------------------------------- tokenizer


@few
@given(data=st.data())
def test_any_value_in_a_tokenizer(data: st.DataObject, base: Path, sound: Path) -> None:
    whole = json.loads((sound / "base" / TOKENIZER).read_bytes())
    value = data.draw(JSON)
    holder = data.draw(st.sampled_from([whole, whole["model"], whole["added_tokens"][0], whole["pre_tokenizer"]]))
    holder[data.draw(st.sampled_from(sorted(holder)))] = value
    (base / TOKENIZER).write_text(json.dumps(whole, indent=data.draw(st.sampled_from([None, 2]))))
    try:
        assert vocabulary_size(base / TOKENIZER) > 0
    except CheckpointError as error:
        assert error.code == "bad-tokenizer"
        check_error(error)
        return
    try:
        read_vocabulary(TokenizerFiles({TOKENIZER: base / TOKENIZER}), {"eos_token_id": 1}, 768)
    except InputError as error:
        check_error(error)


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)


@many
@given(
    vocabulary=st.dictionaries(TEXTS, st.integers(0, 5000), min_size=1, max_size=8),
    added=st.lists(TEXTS.filter(bool), max_size=3),
    style=st.sampled_from([{}, {"indent": 2}, {"ensure_ascii": False}, {"separators": (",", ":")}]),
)
def test_ids_are_counted_as_tokenizers_counts_them(
    vocabulary: dict[str, int], added: list[str], style: dict[str, Any], tmp_path: Path
) -> None:
    whole = Tokenizer(models.WordLevel(vocabulary, unk_token=next(iter(vocabulary))))
    whole.add_special_tokens(added)
    path = tmp_path / TOKENIZER
    path.write_text(json.dumps(json.loads(whole.to_str()), **style), encoding="utf-8")
    counted = Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True)
    assert vocabulary_size(path) == max(counted.values()) + 1


# ---------------------------------------------------------------- patterns


@settings(few, max_examples=500)
@given(pattern=st.text("a.*+?()|{}12,", max_size=24) | st.from_regex(r"(\(?[a.][*+?]?\|?[a.]?\)?[*+?]?){1,8}"))
@example(pattern="(a|a)" * 16)
@example(pattern="a?" * 19 + "!")
@example(pattern="(a*)(a*)(a*)(a*)!")
def test_patterns_that_pass_are_matched_at_once(pattern: str) -> None:
    try:
        compile_pattern(pattern)
        whole = re.compile(rf"(.*\.)?({pattern})$")
    except (ValueError, re.error):
        return
    began = time.process_time()
    whole.match("a" * 60 + "." + "a" * 20 + "!?")
    assert time.process_time() - began < SLOWEST_SECONDS
