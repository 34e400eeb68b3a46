"""Which tokenizer files belong together, and how many ids the vocabulary has."""

from __future__ import annotations

import json
import re
from pathlib import Path

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

_VOCAB = re.compile(rb'"vocab"\s*:\s*([{\[])')
_ENTRY = re.compile(rb'\s*"(?:[^"\\]|\\.)*"\s*:\s*(\d+)\s*([,}])', re.DOTALL)
_ADDED = re.compile(rb'"added_tokens"\s*:\s*\[')


def tokenizer_files(folder: Path) -> dict[str, Path]:
    """The tokenizer, template and generation files that `folder` has, by name."""
    names = (*TOKENIZER_GROUP, *TEMPLATE_FILES, *GENERATION_FILES)
    return {name: folder / name for name in names if (folder / name).is_file()}


def merge_tokenizer_files(base: TokenizerFiles, adapter_folder: Path) -> TokenizerFiles:
    """The base's files with the adapter's over them: tokenizer as a group, template and generation config singly.

    A template that the winning tokenizer_config.json carries inside drops the base's chat_template.jinja, which
    would win over it otherwise.
    """
    own = tokenizer_files(adapter_folder)
    files = dict(base.files)
    has_tokenizer = "tokenizer.json" in own
    if has_tokenizer:
        files = {name: path for name, path in files.items() if name not in TOKENIZER_GROUP}
        files.update({name: path for name, path in own.items() if name in TOKENIZER_GROUP})
    has_template = any(name in own for name in TEMPLATE_FILES)
    if has_template or (has_tokenizer and _carries_template(own.get("tokenizer_config.json"))):
        files = {name: path for name, path in files.items() if name not in TEMPLATE_FILES}
    files.update({name: path for name, path in own.items() if name not in TOKENIZER_GROUP})
    return TokenizerFiles(files)


def vocabulary_size(path: Path) -> int:
    """Largest token id of a tokenizer.json plus one, added tokens included.

    Scans the text: parsing the 150 thousand entries of a real vocabulary into Python objects takes 100 MB.
    Raises CheckpointError, code `bad-tokenizer`.
    """
    data = path.read_bytes()
    largest = max(_largest_vocab_id(path, data), _largest_added_id(path, data))
    if largest < 0:
        raise _bad(path, "it has no vocabulary")
    return largest + 1


def _largest_vocab_id(path: Path, data: bytes) -> int:
    """A key of the vocabulary may be `vocab` too, but then a number follows, not a bracket."""
    found = _VOCAB.search(data, max(data.find(b'"model"'), 0)) or _VOCAB.search(data)
    if found is None:
        return -1
    if found[1] == b"[":
        return _count_pieces(path, data[found.end() - 1 :])
    largest, at = -1, found.end()
    while entry := _ENTRY.match(data, at):
        largest = max(largest, int(entry[1]))
        at = entry.end()
        if entry[2] == b"}":
            return largest
    if data[at : at + 64].lstrip().startswith(b"}"):
        return largest
    raise _bad(path, f"its vocabulary breaks off at byte {at}")


def _count_pieces(path: Path, data: bytes) -> int:
    """Unigram: a list of [piece, score], the index is the id."""
    try:
        pieces, _ = json.JSONDecoder().raw_decode(data.decode())
    except ValueError as error:
        raise _bad(path, str(error)) from error
    return len(pieces) - 1


def _largest_added_id(path: Path, data: bytes) -> int:
    found = _ADDED.search(data)
    if found is None:
        return -1
    end = data.find(b'"model"', found.end())
    text = data[found.end() - 1 : end if end > 0 else len(data)].decode(errors="replace")
    try:
        added, _ = json.JSONDecoder().raw_decode(text)
        return max((int(item["id"]) for item in added), default=-1)
    except (ValueError, TypeError, KeyError) as error:
        raise _bad(path, f"added_tokens cannot be read: {error}") from error


def _carries_template(path: Path | None) -> bool:
    if path is None:
        return False
    try:
        data = json.loads(path.read_bytes())
    except ValueError:
        return False
    return isinstance(data, dict) and bool(data.get("chat_template"))


def _bad(path: Path, why: str) -> CheckpointError:
    return CheckpointError(
        "bad-tokenizer",
        f"{path.name} cannot be read",
        why=why,
        hint="save the tokenizer again with save_pretrained()",
    )
