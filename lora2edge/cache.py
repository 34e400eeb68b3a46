"""The build cache: finished stages, found again by the hash of everything that determines them."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lora2edge.errors import OutputError
from lora2edge.journal import JOURNAL, resumable_folder
from lora2edge.storage import atomic_folder, digest, remove_unlocked, sha256_file

_RECORD = "stage.json"
_LIBRARIES = (
    "torch", "transformers", "peft", "tokenizers", "numpy", "gguf", "xllamacpp", "llama-cpp-python"
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Entry:
    """One finished stage in the cache."""

    path: Path
    stage: str
    key: str
    measured_at: str
    """UTC, ISO 8601."""
    seconds: float
    reused: bool
    files: Mapping[str, str]
    """File name → sha256."""

    @property
    def size_bytes(self) -> int:
        return sum(path.stat().st_size for path in _files(self.path))

    def is_intact(self) -> bool:
        """Whether every file holds what was written: a figure must not come from a damaged disk."""
        return all(
            (self.path / name).is_file() and sha256_file(self.path / name) == sha for name, sha in self.files.items()
        )


class _FinishedElsewhereError(Exception):
    """Another process has written this entry."""


class Cache:
    """Folders `<root>/<stage>/<key>/`, each whole or absent."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = root or default_root()

    def find(self, stage: str, key: str) -> Entry | None:
        """The finished stage; None where there is none, or a file of it is not what was written."""
        found = _read(self.root / stage / key[:32], reused=True)
        return found if found and found.is_intact() else None

    @contextlib.contextmanager
    def writing(self, stage: str, key: str, *, resumable: bool = False) -> Iterator[Path]:
        """An empty folder that becomes the entry `key` of `stage` when the block ends without an error.

        Where another process finished the same stage meanwhile, its entry stays: somebody may be reading it. With
        `resumable` it is a folder of `journal.resumable_folder`, which holds what a killed block finished; not where
        another process is at work in that one.
        """
        started = time.monotonic()
        try:
            with self._folder(self.root / stage / key[:32], key, resumable) as folder:
                yield folder
                record = {
                    "stage": stage,
                    "key": key,
                    "measured_at": now(),
                    "seconds": time.monotonic() - started,
                    "files": {str(path.relative_to(folder)): sha256_file(path) for path in _files(folder)},
                }
                (folder / _RECORD).write_text(json.dumps(record), encoding="utf-8")
                if self.find(stage, key):
                    raise _FinishedElsewhereError
        except _FinishedElsewhereError:
            pass
        except OutputError as error:
            hint = "free space there, or choose another cache: export LORA2EDGE_CACHE=FOLDER"
            raise OutputError(error.code, error.what, why=error.why, hint=hint) from error

    @contextlib.contextmanager
    def _folder(self, path: Path, key: str, resumable: bool) -> Iterator[Path]:
        with contextlib.ExitStack() as held:
            try:
                folder = held.enter_context(resumable_folder(path, key) if resumable else atomic_folder(path))
            except OutputError as error:
                if error.code != "out-busy":
                    raise
                folder = held.enter_context(atomic_folder(path))
            yield folder

    def entry(self, stage: str, key: str) -> Entry:
        """The entry that was just written."""
        found = _read(self.root / stage / key[:32], reused=False)
        if found is None:
            raise FileNotFoundError(self.root / stage / key[:32])
        return found

    def entries(self) -> list[Entry]:
        """All finished stages, oldest first."""
        found = [_read(record.parent, reused=True) for record in self.root.glob(f"*/*/{_RECORD}")]
        return sorted((entry for entry in found if entry), key=lambda entry: entry.measured_at)

    def prune(self, older_than_days: float) -> list[Entry]:
        """Removes entries that are older, and what killed stages left longer ago; returns the entries."""
        limit = time.time() - older_than_days * 86400
        old = [entry for entry in self.entries() if datetime.fromisoformat(entry.measured_at).timestamp() < limit]
        for entry in old:
            shutil.rmtree(entry.path, ignore_errors=True)
        for journal in self.root.glob(f"*/.*.resume/{JOURNAL}"):
            if journal.stat().st_mtime < limit:
                remove_unlocked(journal.parent)
        return old


def default_root() -> Path:
    """`$LORA2EDGE_CACHE`, else `lora2edge` in the user's cache folder."""
    if named := os.environ.get("LORA2EDGE_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lora2edge"


def stage_key(*parts: Any) -> str:
    """Hash of a stage's inputs and options, this package's code and the libraries' versions."""
    return digest([code_hash(), library_versions(), *parts])


def now() -> str:
    """The time, UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def library_versions(names: Sequence[str] = _LIBRARIES) -> dict[str, str]:
    """Installed versions of the libraries that figures depend on; nothing is imported."""
    found = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


@functools.cache
def code_hash() -> str:
    """sha256 over this package's source: a changed line makes every stage run again."""
    state = hashlib.sha256()
    package = Path(__file__).resolve().parent
    for path in sorted(package.rglob("*.py")):
        state.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes())
    return state.hexdigest()


def _read(folder: Path, *, reused: bool) -> Entry | None:
    try:
        record = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
        return Entry(
            folder, record["stage"], record["key"], record["measured_at"], record["seconds"], reused, record["files"]
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())
