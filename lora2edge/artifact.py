"""Artifacts: written whole with a manifest, opened again, checked."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lora2edge.adapters import MergedCheckpoint
from lora2edge.backends.base import load_backend
from lora2edge.bench.machine import describe
from lora2edge.cache import stage_key
from lora2edge.checkpoint import cores, reading_ahead
from lora2edge.contracts import MANIFEST, Artifact, Calibration, Manifest, Progress
from lora2edge.errors import InputError
from lora2edge.journal import read_marks, resumable_folder
from lora2edge.progress import Followed
from lora2edge.storage import digest, hash_ahead, sha256_file, write_atomic
from lora2edge.target import Target

SCHEMA = 1
RECORD = "lowering.json"
AHEAD_BYTES = 512 << 20
"""How far the hash of the base may be in front of the lowering: it is the reading ahead, too."""


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
    merge_base: Mapping[str, Any] | None,
) -> None:
    """Hashes the files in `folder` and writes manifest.json beside them; a file's hash in the journal is taken.

    `lowered` has the backend's `versions` and `notes`; `calibration` is the hash of the set that was used,
    `merge_base` what `MergeBases.record` says.
    """
    files = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    known = {name: mark.sha256 for name, mark in read_marks(folder).items() if mark.whole}
    manifest = Manifest(
        schema=SCHEMA,
        target=target.name,
        backend=target.backend,
        task=view.task,
        key=key,
        inputs={
            "model": view.file_hashes(),
            "calibration": calibration,
            **({"combined": view.combined} if view.combined else {}),
            **({"merge_base": dict(merge_base)} if merge_base else {}),
        },
        options=_portable(target),
        versions=dict(lowered["versions"]),
        files={name: known.get(name) or sha256_file(path) for name, path in files.items()},
        notes=dict(lowered["notes"]),
        account=view.account(),
    )
    write_atomic(folder / MANIFEST, manifest.to_json())


def lower_here(
    view: MergedCheckpoint,
    target: Target,
    calibration: Calibration | None,
    out: Path,
    progress: Progress,
    merge_base: Mapping[str, Any] | None = None,
) -> None:
    """Lowers into the folder `out` in this process; `out` appears whole or not at all.

    After a kill or an interrupt, the same call goes on with what was finished.
    """
    options = target.model_dump(mode="json", exclude={"gates", "scenarios", "description"})
    key = stage_key("lower", view.fingerprint(), options)
    with folder_of(out, key) as folder:
        with reading_ahead(_weights(view), progress, cores()) as paced:
            lowered = load_backend(target.backend).lower(view, target, calibration, folder, paced)
        facts = {"versions": lowered.versions, "notes": lowered.notes}
        write_manifest(folder, view, target, facts, key="", calibration=None, merge_base=merge_base)


@contextlib.contextmanager
def folder_of(out: Path, key: str) -> Iterator[Path]:
    """The resumable folder of an artifact of this key, on this processor: another's kernels round differently."""
    machine = describe()
    with resumable_folder(out, digest([key, machine["cpu"], machine["cpu_flags"]])) as folder:
        yield folder


@contextlib.contextmanager
def hashing_ahead(view: MergedCheckpoint, progress: Progress) -> Iterator[Progress]:
    """Hashes the base's weights for the manifest while another process reads them: one pass over the disk serves both.

    The block says how far it is to the Progress that it gets; the hash stays at most AHEAD_BYTES in front, so that
    what it has read is still in memory when it is wanted. Where the block raises, the hash is given up.
    """
    paths = [path for path in _weights(view) if path.is_file()]
    pace = _Pace(progress, sum(path.stat().st_size for path in paths))
    thread = threading.Thread(target=_hash_all, args=(paths, pace))
    thread.start()
    try:
        yield pace
        pace.end()
        thread.join()
    except BaseException:
        pace.end(give_up=True)
        thread.join()
        raise


def _weights(view: MergedCheckpoint) -> list[Path]:
    """The base's files, in the order in which their tensors are read."""
    return [view.base.path / name for name in dict.fromkeys(tensor.shard for tensor in view.base.tensors.values())]


def _hash_all(paths: Sequence[Path], pace: _Pace) -> None:
    with contextlib.suppress(OSError):  # whoever needs the hash reads the file again, and says what is wrong
        for path in paths:
            hash_ahead(path, pace.wait)


class _Pace(Followed):
    """Lets another thread go through `total` bytes no faster than the work that it follows."""

    def __init__(self, progress: Progress, total: int) -> None:
        super().__init__(progress)
        self._bytes = total
        self._read = 0

    def wait(self, count: int) -> bool:
        """Returns when `count` more bytes may be read, or with False when no more are wanted."""
        with self._changed:
            self._read += count
            self._changed.wait_for(self._may_read)
            return not self._given_up

    def _may_read(self) -> bool:
        share = self._done / self._total if self._total else 0.0
        return self._ended or self._read <= share * self._bytes + AHEAD_BYTES


def _portable(target: Target) -> dict[str, Any]:
    """The target without this machine's paths: its interpreters, and scenarios that are the user's own files."""
    options = target.model_dump(mode="json", exclude={"python": True, "options": {"optimum_python"}})
    options["scenarios"] = [name for name in target.scenarios if not name.endswith((".yaml", ".yml"))]
    return options


def read_record(path: Path) -> dict[str, Any]:
    """What lowering took, as it was recorded beside the artifact."""
    record: dict[str, Any] = json.loads((path / RECORD).read_text(encoding="utf-8"))
    return record
