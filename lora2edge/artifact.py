"""Artifacts: written whole with a manifest, opened again, checked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora2edge.adapters import MergedCheckpoint
from lora2edge.backends.base import load_backend
from lora2edge.contracts import MANIFEST, Artifact, Calibration, Manifest, Progress
from lora2edge.errors import InputError
from lora2edge.storage import atomic_folder, sha256_file, write_atomic
from lora2edge.target import Target

SCHEMA = 1
RECORD = "lowering.json"


def open_artifact(path: Path) -> Artifact:
    """The artifact in the folder `path`. Raises InputError where there is none, or a file of it is missing."""
    try:
        manifest = Manifest.from_json((path / MANIFEST).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            "no-artifact", f"{path} is no artifact", why=f"it has no {MANIFEST}", hint="lora2edge build --help"
        ) from error
    except (ValueError, TypeError) as error:
        raise InputError("broken-manifest", f"{path / MANIFEST} cannot be read", why=str(error)) from error
    missing = [name for name in manifest.files if not (path / name).is_file()]
    if missing:
        raise InputError(
            "artifact-incomplete",
            f"{path} lacks {', '.join(missing)}",
            why="its manifest lists them",
            hint="build it again",
        )
    return Artifact(path, manifest)


def find_artifact(path: Path, key: str) -> Artifact | None:
    """The artifact in `path`, where it is complete and was made from what `key` says."""
    try:
        artifact = open_artifact(path)
    except InputError:
        return None
    return artifact if artifact.manifest.key == key and (path / RECORD).is_file() else None


def is_intact(artifact: Artifact) -> bool:
    """Whether every file of the artifact holds what its manifest says."""
    return all(sha256_file(artifact.path / name) == sha for name, sha in artifact.manifest.files.items())


def write_manifest(
    folder: Path,
    view: MergedCheckpoint,
    target: Target,
    lowered: Mapping[str, Any],
    *,
    key: str,
    calibration: str | None,
) -> None:
    """Hashes the files in `folder` and writes manifest.json beside them.

    `lowered` has the backend's `versions` and `notes`; `calibration` is the hash of the set that was used.
    """
    files = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    manifest = Manifest(
        schema=SCHEMA,
        target=target.name,
        backend=target.backend,
        task=view.task,
        key=key,
        inputs={"model": view.file_hashes(), "calibration": calibration},
        options=_portable(target),
        versions=dict(lowered["versions"]),
        files={name: sha256_file(path) for name, path in files.items()},
        notes=dict(lowered["notes"]),
    )
    write_atomic(folder / MANIFEST, manifest.to_json())


def lower_here(
    view: MergedCheckpoint, target: Target, calibration: Calibration | None, out: Path, progress: Progress
) -> None:
    """Lowers into the folder `out` in this process; `out` appears whole or not at all."""
    with atomic_folder(out) as partial:
        lowered = load_backend(target.backend).lower(view, target, calibration, partial, progress)
        facts = {"versions": lowered.versions, "notes": lowered.notes}
        write_manifest(partial, view, target, facts, key="", calibration=None)


def _portable(target: Target) -> dict[str, Any]:
    """The target without this machine's paths: its interpreter, and scenarios that are the user's own files."""
    options = target.model_dump(mode="json", exclude={"python"})
    options["scenarios"] = [name for name in target.scenarios if not name.endswith((".yaml", ".yml"))]
    return options


def read_record(path: Path) -> dict[str, Any]:
    """What lowering took, as it was recorded beside the artifact."""
    record: dict[str, Any] = json.loads((path / RECORD).read_text(encoding="utf-8"))
    return record
