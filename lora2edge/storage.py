"""Files that appear whole or not at all, and their hashes."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
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
    errno.EFBIG: ("file-too-large", "a file is larger than the file system or a limit (ulimit -f) allows",
                  "choose another disk with --out (FAT32 holds 4 GB a file), or raise the limit"),
    errno.ENAMETOOLONG: ("bad-out", "a name is too long for the file system", "choose a shorter name with --out"),
    errno.ENOTDIR: ("bad-out", "a part of the path is a file", "choose another folder with --out"),
    errno.EEXIST: ("bad-out", "a file is where a folder has to be", "choose another folder with --out"),
    errno.EISDIR: ("bad-out", "a folder is where a file has to be", "choose another folder with --out"),
    errno.ELOOP: ("bad-out", "a symbolic link leads to itself", "remove the link, or choose another folder with --out"),
    errno.EIO: ("disk-error", "a disk, or the network to one, failed while it was read or written",
                "look at the system's log (dmesg), and choose another disk with --out"),
}  # fmt: skip

_TAKEN = {errno.ENOTEMPTY, errno.EEXIST}
"""Of a rename: another process has put a folder there."""


def canonical_json(data: Any) -> str:
    """JSON with sorted keys and no spaces: equal data gives equal text, so that it can be hashed."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def digest(data: Any) -> str:
    """sha256 of the canonical JSON of `data`, hex."""
    return hashlib.sha256(canonical_json(data).encode()).hexdigest()


def sha256_file(path: Path) -> str:
    """sha256 of a file's bytes, hex, read in chunks; where `remember_sha256` was told, that."""
    if known := _HASHED.get(identity(path)):
        return known
    state = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_CHUNK):
            state.update(chunk)
    return state.hexdigest()


def hash_ahead(path: Path, wait: Callable[[int], bool]) -> None:
    """Hashes a file on the way through it, for a later sha256_file: its bytes are in the page cache for others then.

    `wait(bytes)` is called before so many more are read, and may take its time; where it returns False, that was all.
    """
    before, state = identity(path), hashlib.sha256()
    if before in _HASHED:
        return
    with path.open("rb", buffering=0) as file:
        while wait(_CHUNK):
            if not (chunk := file.read(_CHUNK)):
                remember_sha256(path, before, state.hexdigest())
                return
            state.update(chunk)


def remember_sha256(path: Path, before: tuple[int, ...], sha256: str) -> None:
    """Spares a later sha256_file of this process the reading; not where the file has changed since `before`."""
    if identity(path) == before:
        _HASHED[before] = sha256


def follow(path: Path) -> Path:
    """Where the symbolic link `path` leads, whether or not anything is there; `path` where it is none.

    What is written goes there: a link to a larger disk stays one. Raises OSError, ELOOP, where it leads to itself.
    """
    if not path.is_symlink():
        return path
    try:
        return path.resolve()
    except RuntimeError as error:  # Python 3.11 and 3.12
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path)) from error


@contextlib.contextmanager
def writing(where: Path) -> Iterator[None]:
    """Turns what a disk, a path or missing rights can do into an OutputError that names `where`."""
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

    An existing `path` is replaced; of a link, the folder that it leads to. Raises OutputError where the disk is full
    or read-only.
    """
    with writing(path):
        path = follow(path)
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path)
        partial.mkdir()
        try:
            yield partial
            replace_folder(partial, path)
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
def alone_in(folder: Path, out: Path | None = None) -> Iterator[None]:
    """Keeps other processes out of `folder`, which is made where it is missing, until the block ends.

    Nothing is left behind, however the process ends: the lock is the kernel's (flock(2) on the folder itself). Raises
    OutputError where another process holds it; the error names `out` where the folder is only on the way there.
    """
    with writing(folder):
        handle = _lock_folder(folder, out or folder)
    try:
        yield
    finally:
        os.close(handle)


def lock(handle: int) -> bool:
    """Locks an open file until it is closed; False where another process has it."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:  # network file systems without locks
        if error.errno not in {errno.ENOTSUP, errno.EBADF, errno.ENOLCK, errno.EINVAL}:
            raise
    return True


def busy(out: Path) -> OutputError:
    """The error for a folder that another process writes to."""
    return OutputError(
        "out-busy",
        f"another lora2edge writes to {out}",
        why="two at once would take each other's files for their own",
        hint="wait for it, or choose another folder with --out",
    )


def replace_folder(partial: Path, path: Path) -> None:
    """Brings the finished folder `partial` to the disk and renames it to `path`, whatever is there.

    A folder that holds files cannot be replaced in one step: the old one steps aside first. Where several processes
    do so at once, one folder is there in the end, whole, and nothing else.
    """
    for file in (*partial.rglob("*"), partial):
        _fsync(file)
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    try:
        while True:
            with contextlib.suppress(FileNotFoundError):
                path.replace(old)
            try:
                partial.replace(path)
                break
            except OSError as error:
                if error.errno not in _TAKEN:
                    raise
                # Another process has put its own there since.
                _remove(old)
        _fsync(path.parent)
    except BaseException:
        try:
            if os.path.lexists(old) and not path.exists():
                old.replace(path)
        except OSError as error:  # what could not be put back is not removed
            if error.errno not in _TAKEN:
                raise
        _remove(old)
        raise
    _remove(old)


def _remove(path: Path) -> None:
    """A folder with all that is in it, or a link or file."""
    with contextlib.suppress(OSError):
        path.unlink()
    shutil.rmtree(path, ignore_errors=True)


def sweep(path: Path, keep: Path | None = None) -> bool:
    """Removes what killed processes (no longer alive) left beside `path`, but for `keep`.

    Returns whether another process is at work on `path` in a folder that goes on after a kill.
    """
    at_work = False
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.*"):
        name, owner, kind = left.name.rsplit(".", 2)
        if left == keep or name != f".{path.name}":
            continue
        if kind == "resume":
            at_work |= not remove_unlocked(left)
        elif kind in {"partial", "old"} and owner.isdigit() and not lives(int(owner)):
            if kind == "old" and not path.exists():  # killed between the two renames
                left.replace(path)
            else:
                _remove(left)
    return at_work


def remove_unlocked(folder: Path) -> bool:
    """Removes a working folder; returns whether no other process had it."""
    try:
        with alone_in(folder):
            shutil.rmtree(folder, ignore_errors=True)
    except OutputError as error:
        return error.code != "out-busy"
    return True


def _lock_folder(folder: Path, out: Path) -> int:
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if not lock(handle):
                raise busy(out)
            if _is_at(handle, folder):
                return os.dup(handle)  # the same lock
        finally:
            os.close(handle)
        # Another process has renamed the folder between the opening and the lock.


def _is_at(handle: int, path: Path) -> bool:
    """Whether `path` still leads to the open file."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def lives(process: int) -> bool:
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
    """Of a file or a folder: of the names in it."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    except OSError as error:  # network file systems that know no fsync of folders
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(handle)


def identity(path: Path) -> tuple[int, ...]:
    """What tells a file from any other, and from itself before it was changed."""
    stat = path.stat()
    return (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)


_HASHED: dict[tuple[int, ...], str] = {}
