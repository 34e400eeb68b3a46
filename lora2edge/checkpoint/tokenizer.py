"""Which tokenizer files belong together, and how many ids the vocabulary has."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from lora2edge.checkpoint.outline import read_outline
from lora2edge.checkpoint.slow_tokenizer import MOST_TOKENIZER_BYTES, SETTINGS, check_same_tokens
from lora2edge.checkpoint.source import read_json_file
from lora2edge.checkpoint.untrusted import read_bounded
from lora2edge.contracts import TokenizerFiles
from lora2edge.errors import CheckpointError

TOKENIZER_GROUP = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
)
"""Taken from one folder together: ids of one and texts of another would be silently wrong."""
GENERATION_FILES = ("generation_config.json",)
TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")

_PARSED = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.json", *GENERATION_FILES)
_TEXTS = ("chat_template.jinja",)
_MOST_TEMPLATE_BYTES = 1_000_000


def tokenizer_files(folder: Path) -> dict[str, Path]:
    """The tokenizer, template and generation files that `folder` has, by name.

    Raises CheckpointError, code `bad-tokenizer`, or Refusals, where one is no file or cannot be what its name says.
    """
    found = {}
    for name in (*TOKENIZER_GROUP, *TEMPLATE_FILES, *GENERATION_FILES):
        path = folder / name
        if path.is_file():
            _check_file(path)
            found[name] = path
        elif os.path.lexists(path):
            raise _bad(path, "it is no file, or a link to nowhere")
    return found


def merge_tokenizer_files(base: TokenizerFiles, adapter_folder: Path) -> TokenizerFiles:
    """The base's files with the adapter's over them: tokenizer as a group, template and generation config singly.

    Of an adapter's tokenizer without tokenizer.json the settings are taken where they carry its template, and all of
    it where the base has none. Raises AdapterError, code `adapter-tokenizer`, where its tokens are not the base's.
    A template that the winning tokenizer_config.json carries inside drops the base's chat_template.jinja, which
    would win over it otherwise.
    """
    own = tokenizer_files(adapter_folder)
    files = dict(base.files)
    group = {name: path for name, path in own.items() if name in TOKENIZER_GROUP}
    has_tokenizer = "tokenizer.json" in own or files.keys().isdisjoint(TOKENIZER_GROUP)
    if has_tokenizer:
        files = {name: path for name, path in files.items() if name not in TOKENIZER_GROUP}
        files.update(group)
    elif group:
        check_same_tokens(group, files, read_tokenizer_file(base, "tokenizer.json"))
        if has_tokenizer := _carries_template(own.get("tokenizer_config.json")):
            files.update({name: path for name, path in group.items() if name in SETTINGS})
    has_template = any(name in own for name in TEMPLATE_FILES)
    if has_template or (has_tokenizer and _carries_template(own.get("tokenizer_config.json"))):
        files = {name: path for name, path in files.items() if name not in TEMPLATE_FILES}
    files.update({name: path for name, path in own.items() if name not in TOKENIZER_GROUP})
    return TokenizerFiles(files)


def read_tokenizer_file(files: TokenizerFiles, name: str) -> dict[str, Any]:
    """The JSON object in that one of the files, {} where it is not among them. Raises CheckpointError or Refusals.

    The size of tokenizer.json's vocabulary is nobody's to bound; that it is JSON, `vocabulary_size` has looked at.
    """
    path = files.files.get(name)
    if path is None:
        return {}
    if name != "tokenizer.json":
        return read_json_file(Path(path), "bad-tokenizer")
    try:
        data = json.loads(read_bounded(Path(path), MOST_TOKENIZER_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise _bad(Path(path), str(error)) from error
    if not isinstance(data, dict):
        raise _bad(Path(path), f"it is no JSON object but a {type(data).__name__}")
    return data


def vocabulary_size(path: Path) -> int:
    """Largest token id of a tokenizer.json plus one, added tokens included.

    The vocabulary and the merges are scanned as text: parsing the 150 thousand entries of a real one into Python
    objects takes 100 MB. All of the file is checked. Raises CheckpointError, code `bad-tokenizer`.
    """
    try:
        _, largest = read_outline(read_bounded(path, MOST_TOKENIZER_BYTES))
    except (OSError, ValueError) as error:
        raise _bad(path, _reason(error)) from error
    return largest + 1


def _check_file(path: Path) -> None:
    """Refuses what can be told from the file alone; tokenizer.json is looked at where its ids are counted."""
    try:
        if path.name in _PARSED:
            read_json_file(path, "bad-tokenizer")
        elif path.name in _TEXTS:
            read_bounded(path, _MOST_TEMPLATE_BYTES).decode("utf-8")
        elif (size := path.stat().st_size) > MOST_TOKENIZER_BYTES:
            raise ValueError(f"it has {size:,} bytes, at most {MOST_TOKENIZER_BYTES:,} make sense")
    except (OSError, ValueError) as error:
        raise _bad(path, _reason(error)) from error


def _carries_template(path: Path | None) -> bool:
    return path is not None and bool(read_json_file(path, "bad-tokenizer").get("chat_template"))


def _reason(error: OSError | ValueError) -> str:
    return f"{error.strerror}" if isinstance(error, OSError) else str(error)


def _bad(path: Path, why: str) -> CheckpointError:
    return CheckpointError(
        "bad-tokenizer",
        f"{path.name} cannot be read",
        why=why,
        hint="save the tokenizer again with save_pretrained()",
    )
