"""The tokenizer section: what llama.cpp makes of it against the tokenizers library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from lora2edge.backends.gguf.container import write_header
from lora2edge.backends.gguf.pretokenizers import pre_tokenizer_name
from lora2edge.backends.gguf.tokens import open_vocabulary
from lora2edge.backends.gguf.vocabulary import TokenizerSection, read_vocabulary
from lora2edge.contracts import TokenizerFiles
from lora2edge.errors import CheckpointError, UnsupportedError
from tests.tiny import QUESTIONS, bpe_tokenizer, spm_tokenizer

TEXTS = [text for pair in QUESTIONS for text in pair] + [
    "  two  spaces\n\n\tand a tab",
    "3333 33",
    "naïve Ångström 🚀",
    "x",
]
PREFIXED = {
    "type": "Sequence",
    "normalizers": [
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    ],
}


@pytest.fixture
def bpe(tmp_path: Path) -> Path:
    bpe_tokenizer().save_pretrained(tmp_path / "bpe")
    return tmp_path / "bpe"


@pytest.fixture
def spm(tmp_path: Path) -> Path:
    spm_tokenizer().save_pretrained(tmp_path / "spm")
    return tmp_path / "spm"


def edit(folder: Path, name: str = "tokenizer.json", **values: Any) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((folder / name).read_text())
    data.update(values)
    (folder / name).write_text(json.dumps(data))
    return data


def section(folder: Path, rows: int = 768, config: dict[str, Any] | None = None) -> TokenizerSection:
    return read_vocabulary(TokenizerFiles({path.name: path for path in folder.iterdir()}), config or {}, rows)


def value(found: TokenizerSection, key: str) -> Any:
    return found.metadata[f"tokenizer.{key}"][1]


@pytest.mark.parametrize("kind", ["bpe", "spm", "spm-prefixed"])
def test_ids_are_those_of_the_tokenizers_library(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    folder = request.getfixturevalue(kind.split("-")[0])
    if kind == "spm-prefixed":
        edit(folder, normalizer=PREFIXED)
    found = section(folder)
    path = tmp_path / "vocabulary.gguf"
    with path.open("wb") as file:
        write_header(file, {"general.architecture": ("str", "llama"), **found.metadata}, ())
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    with open_vocabulary(path) as vocabulary:
        for text in TEXTS:
            assert vocabulary.tokenize(text, special=True) == tokenizer.encode(text, add_special_tokens=False).ids


def test_special_ids_and_filling(bpe: Path) -> None:
    found = section(bpe, rows=800, config={"bos_token_id": 5})
    tokens, types = value(found, "ggml.tokens"), value(found, "ggml.token_type")
    assert len(tokens) == len(set(tokens)) == 800
    assert (tokens[799], types[799]) == ("[PAD799]", 5)
    ends = {text: tokens.index(text) for text in ("<|im_end|>", "<|endoftext|>", "<|im_start|>")}
    assert {types[index] for index in ends.values()} == {3}
    assert value(found, "ggml.eos_token_id") == ends["<|im_end|>"]
    assert value(found, "ggml.padding_token_id") == ends["<|endoftext|>"]
    assert value(found, "ggml.bos_token_id") == 5
    assert (value(found, "ggml.add_bos_token"), value(found, "ggml.add_eos_token")) == (False, False)
    assert (found.pre_tokenizer, found.normalizer) == ("qwen2", "NFC")


def test_a_filler_is_no_word_of_the_vocabulary(bpe: Path) -> None:
    data = json.loads((bpe / "tokenizer.json").read_text())
    first = min(data["model"]["vocab"], key=lambda text: -len(text))
    data["model"]["vocab"]["[PAD799]"] = data["model"]["vocab"].pop(first)
    data["model"]["merges"] = [pair for pair in data["model"]["merges"] if first not in ("".join(pair), *pair)]
    (bpe / "tokenizer.json").write_text(json.dumps(data))
    tokens = value(section(bpe, rows=800), "ggml.tokens")
    assert len(set(tokens)) == 800


def test_bos_is_added_where_the_files_say_so(spm: Path) -> None:
    template = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<bos>", "type_id": 0}}, {}]}
    assert value(section(spm), "ggml.add_bos_token") is False
    edit(spm, post_processor={"type": "Sequence", "processors": [{"type": "ByteLevel"}, template]})
    assert value(section(spm), "ggml.add_bos_token") is True
    edit(spm, "tokenizer_config.json", add_bos_token=False)
    assert value(section(spm), "ggml.add_bos_token") is False


def test_chat_templates(bpe: Path) -> None:
    template = (bpe / "chat_template.jinja").read_text()
    assert value(section(bpe), "chat_template") == template
    named = [{"name": "default", "template": "D"}, {"name": "tool-use", "template": "T"}]
    edit(bpe, "tokenizer_config.json", chat_template=named)
    assert value(section(bpe), "chat_template") == template
    (bpe / "chat_template.jinja").unlink()
    found = section(bpe)
    assert (value(found, "chat_template"), value(found, "chat_template.tool_use")) == ("D", "T")
    assert value(found, "chat_templates") == ["tool_use"]


def test_an_end_that_llama_cpp_does_not_know_is_told(bpe: Path) -> None:
    (bpe / "generation_config.json").write_text(json.dumps({"eos_token_id": [759, 757, 40, 41]}))
    found = section(bpe)
    assert value(found, "ggml.eot_token_id") == 40
    assert any("will not stop at" in note for note in found.notes)


def test_no_end_token_is_refused(bpe: Path) -> None:
    edit(bpe, "tokenizer_config.json", eos_token=None)
    with pytest.raises(UnsupportedError, match="no end token"):
        section(bpe)
    assert value(section(bpe, config={"eos_token_id": [7, 8]}), "ggml.eos_token_id") == 7


def test_phi3_names_and_stripping(spm: Path) -> None:
    assert not section(spm).strips_like_phi3
    data = json.loads((spm / "tokenizer.json").read_text())
    data["added_tokens"][4]["rstrip"] = True
    edit(spm, added_tokens=data["added_tokens"])
    assert any("drops spaces" in note for note in section(spm).notes)


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("bpe", {"model": {"type": "Unigram", "vocab": []}}),
        ("bpe", {"normalizer": {"type": "NFKC"}}),
        ("spm", {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFKC"}]}}),
        ("spm", {"normalizer": None}),
        ("spm", {"pre_tokenizer": {"type": "Whitespace"}}),
        ("bpe", {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}}),
        ("bpe", {"pre_tokenizer": {"type": "Whitespace"}}),
        ("bpe", {"pre_tokenizer": None}),
    ],
)
def test_what_llama_cpp_would_not_do_is_refused(kind: str, values: Any, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(kind)
    edit(folder, **values)
    with pytest.raises(UnsupportedError):
        section(folder)


def test_missing_bytes_dropout_and_no_merges_are_refused(bpe: Path, spm: Path) -> None:
    model = json.loads((spm / "tokenizer.json").read_text())["model"]
    model["vocab"]["<0xZZ>"] = model["vocab"].pop("<0xE0>")
    edit(spm, model=model)
    with pytest.raises(UnsupportedError, match="255 of the 256"):
        section(spm)
    model = json.loads((bpe / "tokenizer.json").read_text())["model"]
    for change in ({"dropout": 0.1}, {"merges": []}, {"end_of_word_suffix": "</w>"}):
        edit(bpe, model={**model, **change})
        with pytest.raises(UnsupportedError):
            section(bpe)


def test_a_vocabulary_that_does_not_fit_gives_both_numbers(bpe: Path) -> None:
    with pytest.raises(CheckpointError, match=r"700 rows"):
        section(bpe, rows=700)


def test_unreadable_files_are_no_traceback(bpe: Path) -> None:
    (bpe / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError):
        section(bpe)
    (bpe / "tokenizer.json").unlink()
    with pytest.raises(UnsupportedError, match=r"no tokenizer\.json"):
        section(bpe)


def byte_level(regex: bool = False) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "use_regex": regex}


def split(regex: str, behavior: str = "Isolated", invert: bool = False) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": behavior, "invert": invert}


LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.mark.parametrize(
    ("steps", "ignore_merges", "name"),
    [
        ([byte_level(True)], False, "gpt-2"),
        ([{"type": "Digits", "individual_digits": True}, byte_level(True)], False, "smollm"),
        ([split(LLAMA3), byte_level()], True, "llama-bpe"),
        ([split(LLAMA3, "Removed", True), byte_level()], True, "llama-bpe"),
        ([split(LLAMA3), byte_level()], False, "dbrx"),
        ([split(LLAMA3.replace(r"\r\n", "\r\n")), byte_level()], True, "llama-bpe"),
        ([split(LLAMA3.replace("{1,3}", "")), byte_level()], False, "qwen2"),
    ],
)
def test_pre_tokenizers_are_known_by_their_structure(steps: list[Any], ignore_merges: bool, name: str) -> None:
    stored = {"type": "Sequence", "pretokenizers": steps}
    assert pre_tokenizer_name({"pre_tokenizer": stored, "model": {"ignore_merges": ignore_merges}}) == name


@pytest.mark.parametrize(
    "steps",
    [
        [split(LLAMA3, "MergedWithNext"), byte_level()],
        [split(LLAMA3.replace("{1,3}", "{1,4}")), byte_level()],
        [split(LLAMA3.replace("{1,3}", "")), split(LLAMA3), byte_level()],
        [split(LLAMA3)],
        [byte_level(True), split(LLAMA3)],
    ],
)
def test_an_unknown_pre_tokenizer_is_refused(steps: list[Any]) -> None:
    with pytest.raises(UnsupportedError) as caught:
        pre_tokenizer_name({"pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}, "model": {}})
    assert caught.value.code == "gguf-pre-tokenizer"
