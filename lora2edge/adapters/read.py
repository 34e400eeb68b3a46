"""Reads a PEFT adapter folder: its kind, its scales, and a place for every tensor, or one error by name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lora2edge.adapters.kinds.lora import LowRank
from lora2edge.adapters.kinds.table import KINDS
from lora2edge.adapters.parts import Part
from lora2edge.adapters.settings import check_settings, kind_name
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
_BESIDE = "base_model.vera_"
"""VeRA's shared matrices lie beside the model."""
_ENDS = (
    "embed_tokens.weight", "wte.weight", "shared.weight", "word_embeddings.weight", "embed_in.weight",
    "lm_head.weight", "embed_out.weight",
)  # fmt: skip
"""Embeddings and heads, which PEFT saves along where the vocabulary was resized or they were adapted."""
_AGAIN = (r"\.(original_module|modules_to_save)\.", r"\.modules_to_save\.[^.]+\.")
"""What `bias: all` and `save_embedding_layers` put into names of a module that is saved whole: PEFT loads it by its
plain name."""
_UNDER_TOKENS = ".token_adapter.base_layer."
"""What trainable_token_indices puts into the name of the weight that has the tokens."""
_ROWS_AT_ONCE = 1 << 20
"""Elements looked at together when searching for NaN."""


@dataclass(frozen=True)
class Adapter:
    """A checked adapter. Its tensors are read when asked for."""

    source: Source
    config: Mapping[str, Any]
    reader: TensorReader
    parts: Mapping[str, Part]
    """By parameter path, e.g. `model.layers.0.self_attn.q_proj.weight`."""
    saved: Mapping[str, str] = field(default_factory=dict)
    """Parameter path → tensor: what modules_to_save trained whole; replaces that module's weight."""
    replaced: Mapping[str, str] = field(default_factory=dict)
    """Parameter path → tensor: the base's own weight or bias as PEFT saved it along; replaces the base's."""
    copies: Mapping[str, str] = field(default_factory=dict)
    """Tensor → parameter path: what PEFT saved again of a module that modules_to_save trained, or of its original."""
    weight: float = 1.0
    """What its change is multiplied by, where it is one of several."""

    @property
    def path(self) -> Path:
        return self.source.folder

    @property
    def ref(self) -> AdapterRef:
        return AdapterRef(str(self.path), self.weight)

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
        ranks = sorted({part.rank for part in self.parts.values() if isinstance(part, LowRank)})
        return {
            "name": self.path.name,
            "kind": kind_name(self.config),
            "rank": ranks[0] if len(ranks) == 1 else ranks or self.config.get("r"),
            "tensors": len(self.reader.tensors),
            "adapted": len({part.module for part in self.parts.values()}) + len(self.saved),
        }

    def file_hashes(self) -> dict[str, str]:
        """File name → sha256 of every file that is used."""
        paths = [self.path / CONFIG, self.path / WEIGHTS, *tokenizer_files(self.path).values()]
        return {path.name: sha256_file(path) for path in paths}

    def check_finite(self) -> None:
        """Reads every tensor once. Raises AdapterError for NaN and infinity."""
        for name, info in self.reader.tensors.items():
            rows = info.shape[0] if info.shape else 1
            step = max(1, _ROWS_AT_ONCE * rows // max(info.size, 1))
            for start in range(0, rows, step):
                if not np.isfinite(self.reader.rows(name, start, min(start + step, rows))).all():
                    raise AdapterError(
                        "adapter-nan",
                        f"adapter tensor {name} holds NaN or infinity",
                        why="the training diverged, or the file was damaged",
                        hint="take an earlier training checkpoint",
                    )

    def close(self) -> None:
        self.reader.close()


def read_adapter(where: str | Path) -> Adapter:
    """The adapter in the folder `where`, or of the hub id `org/name[@REV]`.

    Reads no weight. Raises AdapterError, or Refusals with all settings that cannot be merged.
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
    paths: dict[str, str] = {}
    strangers = []
    for name, info in reader.tensors.items():
        if info.dtype not in FLOAT_DTYPES:
            raise AdapterError(
                "adapter-dtype",
                f"adapter tensor {name} is stored as {info.dtype}",
                why=f"known: {', '.join(FLOAT_DTYPES)}",
                hint="save the adapter again in float32 or bfloat16",
            )
        if name.startswith((_PREFIX, _BESIDE)):
            paths[name.removeprefix(_PREFIX)] = name
        else:
            strangers.append(name)
    parts: dict[str, Part] = {}
    for part in KINDS[config["peft_type"]].read(config, reader, paths):
        if parts.setdefault(f"{part.module}.{part.parameter}", part) is not part:
            raise _ambiguous(part.module)
    used = {name for part in parts.values() for name in part.tensors}
    saved, replaced, copies = {}, {}, {}
    saved_modules = config.get("modules_to_save") or []
    biases = config.get("bias") not in (None, "none")
    endings = (*_ENDS, ".bias") if config.get("bias") == "all" else _ENDS
    for live, name in paths.items():
        if name in used:
            continue
        path = live.replace(_UNDER_TOKENS, ".")
        plain = _plainly_saved(path, paths)
        if plain and biases and path.endswith(".bias"):
            continue
        if plain and path.endswith(".weight"):
            copies[name] = plain
        elif path.endswith(".base_layer.weight") or (biases and path.endswith(".base_layer.bias")):
            replaced[path.replace(".base_layer.", ".")] = name
        elif is_saved(path, saved_modules):
            saved[path] = name
        elif path.endswith(endings):
            replaced[path] = name
        else:
            strangers.append(name)
    if strangers:
        raise _unused(strangers)
    if both := sorted(parts.keys() & saved.keys()):
        raise _ambiguous(both[0])
    return Adapter(source, config, reader, parts, saved, replaced, copies)


def _plainly_saved(path: str, paths: Mapping[str, str]) -> str | None:
    """The path without what lies around a module that is saved whole, where the file has it by that name too."""
    return next((plain for infix in _AGAIN if (plain := re.sub(infix, ".", path)) != path and plain in paths), None)


def _ambiguous(where: str) -> AdapterError:
    return AdapterError(
        "adapter-ambiguous",
        "a module is adapted in two ways",
        why=f"{where}",
        hint="train with each module either in target_modules or in modules_to_save",
    )


def is_saved(path: str, entries: list[str]) -> bool:
    """PEFT's rule: a module whose path ends with an entry is saved whole, with everything inside it."""
    parts = path.split(".")
    return any(".".join(parts[:end]).endswith(entry) for end in range(1, len(parts)) for entry in entries)


def _unused(names: list[str]) -> AdapterError:
    listed = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return AdapterError(
        "adapter-unused-tensor",
        f"{len(names)} adapter tensor(s) have no known role: {listed}",
        why="merging without them would silently lose a part of the fine-tune",
        hint="save the adapter with PEFT's save_pretrained(), in LoRA's own format",
    )
