"""Reads a PEFT adapter folder: its kind, its scales, and a place for every tensor, or one error by name."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lora2edge.adapters.settings import check_settings
from lora2edge.checkpoint import (
    FLOAT_DTYPES,
    Source,
    TensorReader,
    missing_source,
    read_json_file,
    resolve_source,
    tokenizer_files,
)
from lora2edge.contracts import AdapterRef
from lora2edge.errors import AdapterError, CheckpointError
from lora2edge.storage import sha256_file

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

_PREFIX = "base_model.model."
_LOW_RANK = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(\.weight)?")
_ROWS_AT_ONCE = 1 << 20
"""Elements looked at together when searching for NaN."""


@dataclass(frozen=True, slots=True)
class LowRank:
    """One LoRA pair: ΔW = scale · B A, as PEFT computes it."""

    module: str
    """Path in the model, e.g. `model.layers.0.self_attn.q_proj`."""
    embedding: bool
    """Whether PEFT stored it as an embedding's: A `[r, vocabulary]`, B `[hidden, r]`."""
    a: str
    b: str
    """Names of the two tensors in the file."""
    rank: int
    scale: float


@dataclass(frozen=True)
class Adapter:
    """A checked adapter. Its tensors are read when asked for."""

    source: Source
    config: Mapping[str, Any]
    reader: TensorReader
    pairs: Mapping[str, LowRank]
    """By module path."""
    saved: Mapping[str, str] = field(default_factory=dict)
    """Parameter path → tensor: what modules_to_save trained whole; replaces that module's weight."""
    replaced: Mapping[str, str] = field(default_factory=dict)
    """Parameter path → tensor: a copy of the base's own weight that PEFT saved along; replaces the base's."""

    @property
    def path(self) -> Path:
        return self.source.folder

    @property
    def ref(self) -> AdapterRef:
        return AdapterRef(str(self.path))

    @property
    def base_model_name_or_path(self) -> str | None:
        """The base that the adapter names."""
        name = self.config.get("base_model_name_or_path")
        return str(name) if name else None

    @property
    def revision(self) -> str | None:
        """The base's revision that the adapter names."""
        revision = self.config.get("revision")
        return str(revision) if revision else None

    def describe(self) -> dict[str, Any]:
        """What kind of adapter it is, JSON-ready: for reports and `inspect`."""
        ranks = sorted({pair.rank for pair in self.pairs.values()})
        return {
            "name": self.path.name,
            "kind": "rsLoRA" if self.config.get("use_rslora") else "LoRA",
            "rank": ranks[0] if len(ranks) == 1 else ranks,
            "tensors": 2 * len(self.pairs) + len(self.saved) + len(self.replaced),
            "adapted": len(self.pairs) + len(self.saved),
        }

    def file_hashes(self) -> dict[str, str]:
        """File name → sha256 of every file that is used."""
        paths = [self.path / CONFIG, self.path / WEIGHTS, *tokenizer_files(self.path).values()]
        return {path.name: sha256_file(path) for path in paths}

    def close(self) -> None:
        self.reader.close()


def read_adapter(where: str | Path) -> Adapter:
    """The adapter in the folder `where`, or of the hub id `org/name[@REV]`.

    Reads every tensor once, to refuse NaN and infinity. Raises AdapterError, or Refusals with all settings that
    cannot be merged.
    """
    source = resolve_source(where, "adapter")
    folder = source.folder
    if not (folder / CONFIG).is_file():
        raise missing_source("adapter", where, f"{CONFIG} is missing", "give the folder that PEFT saved the adapter to")
    config = read_json_file(folder / CONFIG, "bad-adapter-config", AdapterError)
    check_settings(config)
    reader = _open_weights(folder)
    try:
        adapter = _sort_tensors(source, config, reader)
        _check_finite(reader)
    except BaseException:
        reader.close()
        raise
    return adapter


def _open_weights(folder: Path) -> TensorReader:
    if (folder / WEIGHTS).is_file():
        try:
            return TensorReader(folder, [WEIGHTS])
        except CheckpointError as error:
            raise AdapterError(error.code, error.what, why=error.why, hint=error.hint) from error
    if (folder / "adapter_model.bin").is_file():
        raise AdapterError(
            "adapter-pickle",
            "the adapter's weights are a pickle, adapter_model.bin",
            why="opening a pickle runs whatever code is in it",
            hint="where you trust it, PeftModel.from_pretrained(BASE, FOLDER).save_pretrained(NEW) writes safetensors",
        )
    raise missing_source("adapter", folder, f"{WEIGHTS} is missing", "give the folder that PEFT saved the adapter to")


def _sort_tensors(source: Source, config: Mapping[str, Any], reader: TensorReader) -> Adapter:
    """Gives every tensor its role. Raises AdapterError for one that has none."""
    sides: dict[tuple[str, bool], dict[str, str]] = {}
    saved, replaced, strangers = {}, {}, []
    saved_modules = config.get("modules_to_save") or []
    for name, info in reader.tensors.items():
        path = name.removeprefix(_PREFIX)
        if info.dtype not in FLOAT_DTYPES:
            raise AdapterError(
                "adapter-dtype",
                f"adapter tensor {name} is stored as {info.dtype}",
                why=f"known: {', '.join(FLOAT_DTYPES)}",
                hint="save the adapter again in float32 or bfloat16",
            )
        if path == name:
            strangers.append(name)
        elif low_rank := _LOW_RANK.fullmatch(path):
            sides.setdefault((low_rank["module"], bool(low_rank["embedding"])), {})[low_rank["side"]] = name
        elif path.endswith(".base_layer.weight"):
            replaced[path.replace(".base_layer.", ".")] = name
        elif is_saved(path, saved_modules):
            saved[path] = name
        elif path.endswith(("embed_tokens.weight", "wte.weight", "lm_head.weight")):
            replaced[path] = name
        else:
            strangers.append(name)
    if strangers:
        raise _unused(strangers)
    pairs = {module: _pair(config, reader, module, embedding, found) for (module, embedding), found in sides.items()}
    if len(pairs) != len(sides) or any(f"{module}.weight" in saved for module in pairs):
        raise AdapterError(
            "adapter-ambiguous",
            "a module is adapted in two ways",
            why=f"among {', '.join(sorted(module for module, _ in sides)[:3])}",
            hint="train with each module either in target_modules or in modules_to_save",
        )
    return Adapter(source, config, reader, pairs, saved, replaced)


def _pair(
    config: Mapping[str, Any], reader: TensorReader, module: str, embedding: bool, found: Mapping[str, str]
) -> LowRank:
    present = next(iter(found.values()))
    if len(found) == 1:
        missing = "B" if "A" in found else "A"
        raise AdapterError(
            "adapter-incomplete",
            f"{module} has no lora_{missing}",
            why=f"the file holds {present} only",
            hint="the save was cut short: save the adapter again",
        )
    rank = _pattern_value(config, "rank_pattern", module, config["r"])
    alpha = _pattern_value(config, "alpha_pattern", module, config["lora_alpha"])
    a, b = reader.tensors[found["A"]], reader.tensors[found["B"]]
    if len(a.shape) != 2 or len(b.shape) != 2:
        raise AdapterError(
            "adapter-shape",
            f"{module}: lora_A is {list(a.shape)}, lora_B is {list(b.shape)}",
            why="both must have two axes; convolutions are not supported, and DeepSpeed or FSDP saves shards when "
            "they are not gathered first",
            hint="gather the weights, then save the adapter again",
        )
    if not a.shape[0] == b.shape[1] == rank:
        raise AdapterError(
            "adapter-rank",
            f"{module}: lora_A has rank {a.shape[0]}, lora_B {b.shape[1]}, {CONFIG} says {rank}",
            why="r, or the key of rank_pattern that matches the module",
            hint=f"restore the {CONFIG} that was saved with these weights",
        )
    scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    return LowRank(module, embedding, found["A"], found["B"], rank, scale)


def _pattern_value(config: Mapping[str, Any], key: str, module: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that matches the whole path, or its end after a dot, as a regex."""
    for pattern, value in (config.get(key) or {}).items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        except re.error as error:
            raise AdapterError(
                "bad-adapter-config", f"{key} has a key that is no regular expression", why=f"{pattern!r}: {error}"
            ) from error
    return default


def is_saved(path: str, entries: list[str]) -> bool:
    """PEFT's rule: a module whose path ends with an entry is saved whole, with everything inside it."""
    parts = path.split(".")
    return any(".".join(parts[:end]).endswith(entry) for end in range(1, len(parts)) for entry in entries)


def _check_finite(reader: TensorReader) -> None:
    for name, info in reader.tensors.items():
        rows = info.shape[0] if info.shape else 1
        step = max(1, _ROWS_AT_ONCE * rows // max(info.size, 1))
        for start in range(0, rows, step):
            if not np.isfinite(reader.rows(name, start, min(start + step, rows))).all():
                raise AdapterError(
                    "adapter-nan",
                    f"adapter tensor {name} holds NaN or infinity",
                    why="the training diverged, or the file was damaged",
                    hint="take an earlier training checkpoint",
                )


def _unused(names: list[str]) -> AdapterError:
    listed = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return AdapterError(
        "adapter-unused-tensor",
        f"{len(names)} adapter tensor(s) have no known role: {listed}",
        why="merging without them would silently lose a part of the fine-tune",
        hint="save the adapter with PEFT's save_pretrained(), in LoRA's own format",
    )
