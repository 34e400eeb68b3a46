"""Whether an output folder may be written into, or replaced."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lora2edge.contracts import MANIFEST, Manifest
from lora2edge.errors import OutputError
from lora2edge.storage import follow, writing


def check_out(out: Path, *, force: bool) -> None:
    """Refuses a folder that is not empty and was not written by a build, unless `force`. Raises OutputError."""
    with writing(out):
        _check_out(out, force)


def _check_out(out: Path, force: bool) -> None:
    if not _occupied(out) or force:
        return
    if not (out / "recipe.resolved.yaml").exists() and not _holds_artifacts_only(out):
        raise OutputError(
            "out-not-ours",
            f"{out} is not empty and was not written by lora2edge",
            why="its files could be overwritten",
            hint=f"choose an empty folder, or add --force to write into {out}",
        )


def check_replaceable(out: Path, inputs: Sequence[Path], *, force: bool) -> None:
    """The same for a folder that is replaced whole: only an artifact may be, or anything with `force`.

    Never one that an input lies in. Raises OutputError.
    """
    with writing(out):
        _check_replaceable(out, inputs, force)


def _check_replaceable(out: Path, inputs: Sequence[Path], force: bool) -> None:
    if any(path.resolve().is_relative_to(follow(out).resolve()) for path in inputs):
        raise OutputError(
            "out-is-input",
            f"{out} holds what is read",
            why="it is replaced by what is written",
            hint="choose another folder with --out",
        )
    if _occupied(out) and not force and not _is_artifact(out):
        raise OutputError(
            "out-not-ours",
            f"{out} is not empty and was not written by lora2edge merge",
            why="it would be replaced, with all that is in it",
            hint=f"choose an empty folder, or remove {out} with --force",
        )


def _occupied(out: Path) -> bool:
    """Whether there is anything at `out`. Raises OutputError where it, or what it lies in, is a file, and OSError."""
    out = follow(out)
    for path in (out, *out.parents):
        if path.exists() and not path.is_dir():
            raise OutputError("out-is-file", f"{path} is a file", why="--out names a folder", hint=f"--out {path}.d")
    return out.exists() and any(out.iterdir())


def _holds_artifacts_only(out: Path) -> bool:
    """What `lower` leaves; nothing in its one folder where it failed."""
    if [path.name for path in out.iterdir()] != ["artifacts"]:
        return False
    return all(_is_artifact(path) for path in out.glob("artifacts/*") if not path.name.startswith("."))


def _is_artifact(folder: Path) -> bool:
    try:
        Manifest.from_json((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False
    return True
