"""Files that appear whole or not at all, and their hashes."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora2edge.errors import OutputError

_CHUNK = 1 << 20
_DISK_ERRORS = {
    errno.ENOSPC: ("disk-full", "the disk is full", "free space, or choose another disk with --out"),
    errno.EDQUOT: ("disk-full", "the disk quota is used up", "free space, or choose another disk with --out"),
    errno.EROFS: ("read-only", "the file system is read-only", "choose a writable folder with --out"),
    errno.EACCES: ("read-only", "permission denied", "choose a writable folder with --out"),
    errno.EPERM: ("read-only", "permission denied", "choose a writable folder with --out"),
}


def canonical_json(data: Any) -> str:
    """JSON with sorted keys and no spaces: equal data gives equal text, so that it can be hashed."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def digest(data: Any) -> str:
    """sha256 of the canonical JSON of `data`, hex."""
    return hashlib.sha256(canonical_json(data).encode()).hexdigest()


def sha256_file(path: Path) -> str:
    """sha256 of a file's bytes, hex, read in chunks."""
    state = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_CHUNK):
            state.update(chunk)
    return state.hexdigest()


@contextlib.contextmanager
def writing(where: Path) -> Iterator[None]:
    """Turns a full disk and missing rights into an OutputError that names `where`."""
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        code, why, hint = _DISK_ERRORS[error.errno]
        raise OutputError(code, f"cannot write {where}", why=why, hint=hint) from error


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yields an empty sibling folder that becomes `path` when the block ends, and vanishes when it raises.

    An existing `path` is replaced. Raises OutputError where the disk is full or read-only.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path)
        partial.mkdir()
        try:
            yield partial
            for file in partial.rglob("*"):
                if file.is_file():
                    _fsync(file)
            _replace(partial, path)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def write_atomic(path: Path, text: str) -> None:
    """Writes `path` whole: a reader sees the old text or the new one."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_text(text, encoding="utf-8")
            _fsync(partial)
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def write_json(path: Path, data: Any) -> None:
    """Writes `data` as indented JSON, whole."""
    write_atomic(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keeps other processes out of `folder`, which is made where it is missing, until the block ends.

    Nothing is left behind, however the process ends: the lock is the kernel's (flock(2) on the folder itself). Raises
    OutputError where another process holds it.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OutputError(
                "out-busy",
                f"another lora2edge writes to {folder}",
                why="two at once would take each other's files for their own",
                hint="wait for it, or choose another folder with --out",
            ) from error
        except OSError as error:  # network file systems without locks
            if error.errno not in {errno.ENOTSUP, errno.EBADF, errno.ENOLCK, errno.EINVAL}:
                raise
        yield
    finally:
        os.close(handle)


def _replace(partial: Path, path: Path) -> None:
    """A folder that holds files cannot be replaced in one step: the old one steps aside first."""
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    try:
        while True:
            with contextlib.suppress(FileNotFoundError):
                path.replace(old)
            try:
                partial.replace(path)
                return
            except OSError as error:
                if error.errno not in {errno.ENOTEMPTY, errno.EEXIST}:
                    raise
                # Another process has put its own there since.
                shutil.rmtree(old, ignore_errors=True)
    finally:
        if old.exists() and not path.exists():
            old.replace(path)
        shutil.rmtree(old, ignore_errors=True)


def _sweep(path: Path) -> None:
    """Removes what a killed process (no longer alive) left beside `path`."""
    for left in path.parent.glob(f".{path.name}.*.*"):
        parts = left.name.rsplit(".", 2)
        if parts[-1] in {"partial", "old"} and parts[-2].isdigit() and not _lives(int(parts[-2])):
            shutil.rmtree(left, ignore_errors=True)


def _lives(process: int) -> bool:
    """Whether another process has this number. Our own was that of a dead one: in containers numbers repeat."""
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
