"""An adapter's tokenizer files that lack tokenizer.json: what a slow tokenizer saves, or an edited template.

Nothing here builds a tokenizer.json. Where such files say no more than the base's do but for the chat template, the
base's tokenizer is the one that was trained with; else the adapter is refused, since its tokens would be lost.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lora2edge.checkpoint.untrusted import parse_json, read_bounded
from lora2edge.errors import AdapterError

MOST_TOKENIZER_BYTES = 64_000_000
"""The largest published tokenizer.json, Gemma 3's, has 33 MB."""
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json")
"""Of the adapter, where they carry its template: texts of special tokens belong to the template."""

_DECIDES = ("auto_map", "bos_token", "eos_token", "unk_token", "add_bos_token", "add_eos_token", "add_prefix_space")
"""Settings that decide which ids a text gets; padding and lengths do not."""


def check_same_tokens(own: Mapping[str, Path], base: Mapping[str, Path], tokenizer: Mapping[str, Any]) -> None:
    """Raises AdapterError where a file in `own` has a token that the base lacks, or settings that tokenize otherwise.

    `own` and `base` map names to the adapter's and the base's files; `tokenizer` is the base's parsed tokenizer.json.
    """
    problem = ""
    try:
        known = _known_tokens(tokenizer, base)
        for name, path in own.items():
            problem = problem or _find_problem(name, path, base.get(name), known)
    except (OSError, ValueError) as error:
        problem = f"{error}"
    if problem:
        folder = next(iter(own.values())).parent
        raise AdapterError(
            "adapter-tokenizer",
            f"the adapter's tokenizer has no tokenizer.json, and cannot be told to be the base's: {problem}",
            why="with the base's the merged model would read and write other tokens than it was trained on",
            hint='python -c "from transformers import AutoTokenizer as T; '
            f'T.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"; where only the chat template is '
            "the adapter's own, leave of these files chat_template.jinja alone",
        )


def _find_problem(name: str, path: Path, base: Path | None, known: Mapping[str, int]) -> str:
    if name == "tokenizer.model":
        same = base is not None and _bytes(base) == _bytes(path)
        return "" if same else f"{name} differs from the base's, or the base has none"
    if name == "merges.txt":
        return "" if base is None or _merges(base) == _merges(path) else f"{name} differs from the base's"
    if name == "vocab.txt":
        return _unknown(_lines(path), known, name)
    data = _read_object(path)
    if name in ("vocab.json", "added_tokens.json"):
        return _unknown(data.items(), known, name)
    if name == "tokenizer_config.json":
        problem = _unknown(_added(data), known, name) or _other_setting(data, _read_object(base) if base else {})
        if problem:
            return problem
    missing = sorted(set(_special_texts(data)) - known.keys())
    return f"{name} has the special token {missing[0]!r}" if missing else ""


def _other_setting(own: Mapping[str, Any], base: Mapping[str, Any]) -> str:
    """Where the template is taken from these settings, all of them are: the end of a turn belongs to it."""
    taken = bool(own.get("chat_template"))
    for key in _DECIDES:
        mine, theirs = _text(own.get(key)), _text(base.get(key))
        if mine != theirs and (taken if mine is None else not (taken and key == "eos_token")):
            return f"tokenizer_config.json has {key} {mine!r}, the base's {theirs!r}"
    return ""


def _unknown(tokens: Iterable[tuple[str, Any]], known: Mapping[str, int], name: str) -> str:
    for text, number in tokens:
        if known.get(text) != number:
            return f"{name} has the token {text!r} with the id {number!r}, the base {known.get(text, 'not')!r}"
    return ""


def _known_tokens(tokenizer: Mapping[str, Any], files: Mapping[str, Path]) -> dict[str, int]:
    """Text → id of the base: from its parsed tokenizer.json, or where that is {} from the slow tokenizer's files."""
    model = tokenizer.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    known: dict[str, int] = {}
    if isinstance(vocabulary, dict):
        known.update(vocabulary)
    elif isinstance(vocabulary, list):
        known.update((str(piece[0]), index) for index, piece in enumerate(vocabulary) if isinstance(piece, list))
    added = tokenizer.get("added_tokens")
    for token in added if isinstance(added, list) else ():
        if isinstance(token, dict):
            known[str(token.get("content"))] = token.get("id", -1)
    if tokenizer:
        return known
    for name in ("vocab.json", "added_tokens.json"):
        if name in files:
            known.update(_read_object(files[name]))
    if "vocab.txt" in files:
        known.update(_lines(files["vocab.txt"]))
    if "tokenizer_config.json" in files:
        known.update(_added(_read_object(files["tokenizer_config.json"])))
    return known


def _added(config: Mapping[str, Any]) -> list[tuple[str, int]]:
    """The added tokens that a tokenizer_config.json lists by their ids."""
    added = config.get("added_tokens_decoder")
    if not isinstance(added, dict):
        return []
    return [(str(_text(token)), int(number) if number.isdecimal() else -1) for number, token in added.items()]


def _lines(path: Path) -> Iterator[tuple[str, int]]:
    """(text, id) of a vocab.txt, one token a line."""
    lines = _bytes(path).decode("utf-8").split("\n")
    return ((text.rstrip("\r"), index) for index, text in enumerate(lines) if text or index < len(lines) - 1)


def _read_object(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises OSError, or ValueError where there is none."""
    data = parse_json(_bytes(path))
    if not isinstance(data, dict):
        raise ValueError(f"{path.name} holds no JSON object but a {type(data).__name__}")
    return data


def _bytes(path: Path) -> bytes:
    return read_bounded(path, MOST_TOKENIZER_BYTES)


def _merges(path: Path) -> list[str]:
    lines = _bytes(path).decode("utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#version")]


def _special_texts(data: Mapping[str, Any]) -> Iterator[str]:
    """The special tokens that tokenizer_config.json or special_tokens_map.json names; added where they are unknown."""
    for key, value in data.items():
        if key in ("additional_special_tokens", "extra_special_tokens"):
            values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
            yield from (str(_text(each)) for each in values)
        elif key.endswith("_token") and not key.startswith("add_") and value:
            yield str(_text(value))


def _text(token: Any) -> str | int | None:
    """A token's text, where it is written with its settings; other settings as they are."""
    value = token.get("content") if isinstance(token, dict) and "content" in token else token
    return value if isinstance(value, str | int | None) else repr(value)
