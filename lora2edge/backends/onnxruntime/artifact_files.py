"""What an artifact's own JSON files say: its tokenizer, its longest sequence, its padding."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora2edge.adapters import written_config
from lora2edge.checkpoint import read_json_file, read_tokenizer_file, tokenizer_files
from lora2edge.contracts import Checkpoint, TokenizerFiles
from lora2edge.errors import InputError
from lora2edge.storage import write_json
from lora2edge.texts import position_offset

_POSITIONS = "max_position_embeddings"


@dataclass(frozen=True, slots=True)
class Padding:
    """The token that shorter sequences of a batch are filled up with."""

    id: int
    is_marker: bool
    """Whether it also begins or ends a text, so that one alone in front is none."""

    def refuse(self, ids: Sequence[int]) -> None:
        """Raises InputError, code `left-padded`, where `ids` begin with padding.

        Lengths are counted from the first token, so the model would read the padding as text, without an error.
        """
        front = 2 if self.is_marker else 1
        if len(ids) >= front and all(token == self.id for token in ids[:front]):
            count = next((index for index, token in enumerate(ids) if token != self.id), len(ids))
            raise InputError(
                "left-padded",
                f"a sequence of {len(ids)} tokens begins with {count} of padding (token {self.id})",
                why="ONNX Runtime's attention counts from the first token: padding there is read as text",
                hint="give the tokens without padding: the session pads on the right itself",
            )


def write_checkpoint_files(checkpoint: Checkpoint, folder: Path) -> None:
    """config.json and the tokenizer's files, as they lie beside a model."""
    write_json(folder / "config.json", written_config(checkpoint))
    for name, path in checkpoint.tokenizer.files.items():
        shutil.copyfile(path, folder / name)


def tokenizer_of(folder: Path) -> TokenizerFiles:
    """The tokenizer's files in the artifact. Raises CheckpointError where one is broken."""
    return TokenizerFiles(tokenizer_files(folder))


def read_config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """A JSON object of the artifact, {} where there is none. Raises CheckpointError, code `bad-config`."""
    path = folder / name
    return read_json_file(path, "bad-config") if path.is_file() else {}


def most_positions(folder: Path) -> int | None:
    """Tokens of the longest sequence: genai_config.json's, else config.json's; None where neither says so."""
    genai = read_config(folder, "genai_config.json").get("model")
    config = read_config(folder)
    text = config.get("text_config")
    for source, key in ((genai, "context_length"), (text, _POSITIONS), (config, _POSITIONS)):
        found = source.get(key) if isinstance(source, dict) else None
        if isinstance(found, int) and found > 0:
            return found - position_offset(config)
    return None


def check_options(folder: Path, max_length: int, **counts: int) -> None:
    """Raises InputError where a count is below 1, or a text of `max_length` tokens has more than the positions."""
    counts = {**counts, "max_length": max_length}
    if min(counts.values()) < 1:
        raise InputError(
            "session-options",
            f"{', '.join(f'{name} {count}' for name, count in counts.items())} cannot be had",
            why="each must be at least 1",
        )
    longest = most_positions(folder)
    if longest is not None and max_length > longest:
        raise InputError(
            "too-long",
            f"max_length {max_length} exceeds the {longest} positions that the model was made for",
            hint=f"use max_length {longest}",
        )


def padding_of(folder: Path) -> Padding | None:
    """The padding token: config.json's, generation_config.json's, or what the tokenizer's settings name."""
    config = read_config(folder)
    files = tokenizer_of(folder)
    generation = read_tokenizer_file(files, "generation_config.json")
    found = next(
        (source["pad_token_id"] for source in (config, generation) if _is_id(source.get("pad_token_id"))), None
    )
    if found is None:
        found = _token_id(files, "pad_token")
    if found is None:
        return None
    markers: set[Any] = set()
    for source in (config, generation):
        for key in ("bos_token_id", "eos_token_id"):
            value = source.get(key)
            markers.update(value if isinstance(value, list) else [value])
    markers.update(_token_id(files, name) for name in ("bos_token", "eos_token", "cls_token", "sep_token"))
    return Padding(found, found in markers)


def _token_id(files: TokenizerFiles, name: str) -> int | None:
    """The id of e.g. `pad_token`, where it is an added token, as special tokens are."""
    value = read_tokenizer_file(files, "tokenizer_config.json").get(name)
    text = value.get("content") if isinstance(value, dict) else value
    if not isinstance(text, str):
        return None
    added = read_tokenizer_file(files, "tokenizer.json").get("added_tokens") or []
    return next((int(token["id"]) for token in added if token.get("content") == text), None)


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
