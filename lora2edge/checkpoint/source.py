"""Folder or hub id → folder."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora2edge.checkpoint.fields import check_fields
from lora2edge.checkpoint.untrusted import parse_json, read_bounded
from lora2edge.errors import AdapterError, CheckpointError, InputError

_HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?")
_FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model"]
_MOST_JSON_BYTES = 64_000_000
"""The largest index, of a model of 150 thousand tensors, has 20 MB."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where a checkpoint or adapter was found."""

    folder: Path
    """Absolute."""
    repo: str | None
    """Hub id without the revision; None for a local folder."""
    revision: str | None


def resolve_source(where: str | Path, what: str = "checkpoint") -> Source:
    """The local folder `where`, or a download of the hub id `org/name[@REV]`; `what`: "checkpoint" or "adapter".

    Only data files are fetched, never code or pickles. Follows HF_HUB_OFFLINE.
    Raises CheckpointError or AdapterError, code `no-checkpoint` or `no-adapter`.
    """
    exists = False
    try:
        folder = Path(where).expanduser()
        exists = folder.exists()
        if folder.is_dir():
            return Source(folder.resolve(), None, None)
    except (OSError, RuntimeError, ValueError):  # too long, a user without a home, a loop of links
        pass
    match = _HUB_ID.fullmatch(str(where))
    if match is None or exists:
        kind = "no folder" if exists else "neither a folder nor a hub id like org/name"
        raise missing_source(what, where, f"it is {kind}", "give the folder, or org/name[@revision]")
    repo, revision = match["repo"], match["revision"]
    return Source(_download(repo, revision, what, where), repo, revision)


def missing_source(what: str, where: str | Path, why: str, hint: str) -> InputError:
    """The error for a place that holds no checkpoint or adapter."""
    error = AdapterError if what == "adapter" else CheckpointError
    return error(f"no-{what}", f"there is no {what} at {where}", why=why, hint=hint)


def read_json_file(path: Path, code: str, error: type[InputError] = CheckpointError) -> dict[str, Any]:
    """The JSON object in `path`, with the keys of `fields.FIELDS` checked.

    Raises `error` with `code` where it is none, or Refusals with every value of a wrong kind.
    """
    try:
        data = parse_json(read_bounded(path, _MOST_JSON_BYTES))
    except (OSError, ValueError) as failure:
        why = failure.strerror if isinstance(failure, OSError) else str(failure)
        raise error(code, f"{path.name} cannot be read", why=f"{why}", hint=f"restore {path}") from failure
    if not isinstance(data, dict):
        raise error(
            code, f"{path.name} holds no JSON object", why=f"it is a {type(data).__name__}", hint=f"restore {path}"
        )
    check_fields(data, path.name, code, error)
    return data


def _download(repo: str, revision: str | None, what: str, where: str | Path) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=_FILES, ignore_patterns=["*/*"]))
    except LocalEntryNotFoundError as error:
        why = "no such folder here, not in the hub cache, and the hub could not be reached"
        raise missing_source(what, where, why, f"hf download {repo}, on a machine that reaches the hub") from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        why = f"no such folder here, and the hub said: {str(error).strip().splitlines()[0]}"
        raise missing_source(
            what, where, why, "check the name and revision; for a gated model: hf auth login"
        ) from error
