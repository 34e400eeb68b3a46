"""Adapters whose tokenizer has no tokenizer.json: the base's tokens, or a refusal."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from lora2edge.checkpoint import merge_tokenizer_files, tokenizer_files
from lora2edge.contracts import TokenizerFiles
from lora2edge.errors import AdapterError
from tests.tiny import make_checkpoint

TEMPLATE = "TRAINED {{ messages[0]['content'] }}"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> TokenizerFiles:
    return TokenizerFiles(tokenizer_files(make_checkpoint(tmp_path_factory.mktemp("slow") / "base")))


@pytest.fixture
def slow(base: TokenizerFiles, tmp_path: Path) -> Path:
    """The base's own tokenizer as a slow one saves it."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    whole = json.loads(base.files["tokenizer.json"].read_text())
    added = {str(token.pop("id")): token for token in whole["added_tokens"]}
    config = json.loads(base.files["tokenizer_config.json"].read_text())
    write(folder / "vocab.json", whole["model"]["vocab"])
    write(folder / "tokenizer_config.json", {**config, "added_tokens_decoder": added})
    write(folder / "added_tokens.json", {token["content"]: int(number) for number, token in added.items()})
    return folder


def write(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data), encoding="utf-8")


def edit(path: Path, **changes: Any) -> None:
    write(path, {**(json.loads(path.read_text()) if path.exists() else {}), **changes})


def load(files: TokenizerFiles, folder: Path) -> Any:
    folder.mkdir()
    for name, path in files.files.items():
        (folder / name).write_bytes(path.read_bytes())
    return AutoTokenizer.from_pretrained(folder)


def test_the_bases_own_tokens_change_nothing(base: TokenizerFiles, slow: Path) -> None:
    assert merge_tokenizer_files(base, slow) == base


def test_the_template_is_taken(base: TokenizerFiles, slow: Path, tmp_path: Path) -> None:
    theirs = load(base, tmp_path / "base")
    edit(slow / "tokenizer_config.json", chat_template=TEMPLATE)
    ours = load(merge_tokenizer_files(base, slow), tmp_path / "merged")
    assert ours.chat_template == TEMPLATE
    text = "Hello <|im_start|>you<|im_end|> 12"
    assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    assert ours.get_vocab() == theirs.get_vocab()


def test_a_template_alone_is_taken(base: TokenizerFiles, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    assert load(merge_tokenizer_files(base, folder), tmp_path / "merged").chat_template == TEMPLATE


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda slow: edit(slow / "added_tokens.json", **{"<|new|>": 760}), "<|new|>"),
        (lambda slow: edit(slow / "vocab.json", **{"new": 761}), "'new'"),
        (lambda slow: edit(slow / "tokenizer_config.json", pad_token="<|new|>"), "<|new|>"),
        (lambda slow: edit(slow / "special_tokens_map.json", additional_special_tokens=["<|new|>"]), "<|new|>"),
        (lambda slow: edit(slow / "tokenizer_config.json", add_bos_token=True), "add_bos_token"),
        (lambda slow: write(slow / "tokenizer_config.json", {"chat_template": TEMPLATE}), "eos_token"),
        (lambda slow: (slow / "tokenizer.model").write_bytes(b"a sentencepiece model"), "tokenizer.model"),
        (lambda slow: (slow / "vocab.txt").write_text("one\ntwo\n"), "vocab.txt"),
        (lambda slow: (slow / "vocab.json").write_text("[1]"), "vocab.json"),
    ],
)
def test_other_tokens_are_refused(
    base: TokenizerFiles, slow: Path, spoil: Callable[[Path], object], named: str
) -> None:
    spoil(slow)
    with pytest.raises(AdapterError) as caught:
        merge_tokenizer_files(base, slow)
    assert caught.value.code == "adapter-tokenizer" and named in caught.value.what


def test_a_base_without_tokenizer_takes_all_of_it(base: TokenizerFiles, slow: Path) -> None:
    empty = TokenizerFiles({"generation_config.json": base.files["generation_config.json"]})
    names = {"vocab.json", "tokenizer_config.json", "added_tokens.json", "generation_config.json"}
    assert merge_tokenizer_files(empty, slow).files.keys() == names
