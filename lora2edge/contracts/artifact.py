"""What a lowering leaves, and what it did to the weights."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lora2edge.contracts.checkpoint import Task

MANIFEST = "manifest.json"
"""The manifest's file name in an artifact's folder."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """What an artifact is made of: deterministic; no time, absolute path, host name or figure."""

    schema: int
    target: str
    backend: str
    task: Task
    key: str
    """Hash of everything that determines the files: what the cache looks for."""
    inputs: Mapping[str, Any]
    """Names and sha256 of base shards, adapter files, tokenizer files, calibration set."""
    options: Mapping[str, Any]
    """The resolved target."""
    versions: Mapping[str, str]
    files: Mapping[str, str]
    """File name → sha256."""
    notes: Mapping[str, Any] = field(default_factory=dict)
    """Facts of the lowering that are not figures: tensor types, tokenizer differences by class, …"""
    account: Mapping[str, Mapping[str, Sequence[str]]] = field(default_factory=dict)
    """What became of every tensor of base and adapter (`MergedCheckpoint.account`)."""

    def to_json(self) -> str:
        """Canonical JSON: sorted keys, two spaces, a final newline."""
        return json.dumps(asdict(self), sort_keys=True, indent=2, ensure_ascii=False) + "\n"

    @staticmethod
    def from_json(text: str) -> Manifest:
        return Manifest(**json.loads(text))


@dataclass(frozen=True, slots=True)
class Artifact:
    """A folder that a backend wrote, with its manifest."""

    path: Path
    manifest: Manifest

    @property
    def size_bytes(self) -> int:
        return sum((self.path / name).stat().st_size for name in self.manifest.files)


@dataclass(frozen=True, slots=True)
class TensorDamage:
    """What lowering did to one tensor, computed from the finished file."""

    name: str
    """Name in the checkpoint."""
    type: str
    """Stored type in the artifact, e.g. "Q4_K"."""
    layer: int | None
    relative_error: float
    """‖Q − W‖ / ‖W‖, Frobenius."""
    delta_kept: float | None
    """⟨Q − W_base, ΔW⟩ / ‖ΔW‖²: 1 = all of the adapter's change is still there; None where nothing was adapted."""
    delta_noise: float | None
    """‖Q − W‖ / ‖ΔW‖: above 1 the rounding is larger than the change that the adapter made."""
