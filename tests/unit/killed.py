"""Lowers in child processes that kill themselves at their n-th step on the file system; for test_resume.py.

Usage: python -m tests.unit.killed REQUEST.json

A step is a system call that changes files. The process is forked after everything is loaded, so that a run costs a
tenth of a second. Of each kill it tells, as a JSON line, what stood under the final name after it, what the journal
said, and what stood there after the next run; `null` is nothing. A folder is told as file name → sha256.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from lora2edge import artifact, journal
from lora2edge.adapters import open_view
from lora2edge.backends.gguf import write as gguf_write
from lora2edge.backends.hf import backend as hf_backend
from lora2edge.backends.hf import write as hf_write
from lora2edge.contracts import AdapterRef, CheckpointRef
from lora2edge.directio import BLOCK
from lora2edge.graph import write as graph_write
from lora2edge.progress import SILENT
from lora2edge.target import load_target

STEPS = ("open", "write", "pwritev", "fsync", "ftruncate", "mkdir", "rename", "replace", "unlink", "rmdir")


class Steps:
    """Counts steps; dies at one of them, halfway through where it writes."""

    def __init__(self, fatal: int | None) -> None:
        self.count = 0
        self.fatal = fatal
        for name in STEPS:
            setattr(os, name, self._counted(name, getattr(os, name)))

    def _counted(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            self.count += 1
            if self.count == self.fatal:
                if name == "write":
                    call(arguments[0], arguments[1][: len(arguments[1]) // 2])
                elif name == "pwritev":
                    handle, (data,), offset = arguments
                    call(handle, [data[: len(data) // 2 // BLOCK * BLOCK]], offset)
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **options)

        return counted


def folder(path: Path) -> dict[str, str] | None:
    if not path.is_dir():
        return None
    files = [file for file in path.rglob("*") if file.is_file()]
    return {str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def in_child(work: Callable[[], int]) -> tuple[int, int]:
    """Exit status of `work` in a forked process (negative: the signal that ended it), and what it returned."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        os.write(writing, str(work()).encode())
        os._exit(0)
    os.close(writing)
    _, status = os.waitpid(child, 0)
    told = os.read(reading, 100)
    os.close(reading)
    return os.waitstatus_to_exitcode(status), int(told or 0)


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text())
    journal.SYNC_BYTES = request["sync_bytes"]
    gguf_write.SLAB_ELEMENTS = hf_write.SLAB_ELEMENTS = graph_write.SLAB_ELEMENTS = 4000
    hf_write.COPY_BYTES = 20_000
    hf_backend.write_checkpoint = partial(hf_backend.write_checkpoint, shard_bytes=request["shard_bytes"])
    root, target = Path(request["root"]), load_target(request["target"])
    view = open_view(CheckpointRef(request["base"], (AdapterRef(request["adapter"]),)))
    before = open_view(CheckpointRef(request["base"]))

    def lower(out: Path, fatal: int | None = None) -> int:
        steps = Steps(fatal)
        artifact.lower_here(view, target, None, out, SILENT)
        return steps.count

    status, total = in_child(lambda: lower(root / "undisturbed"))
    assert status == 0, "the undisturbed run failed"
    print(json.dumps({"undisturbed": folder(root / "undisturbed"), "steps": total}), flush=True)
    for number, share in enumerate(request["moments"]):
        out = root / f"killed{number}" / "out"
        killed, fatal = 0, 1 + int(share * (total - 1))
        while killed == 0:  # how often a file is made safe in the background varies: this moment came after the end
            shutil.rmtree(out.parent, ignore_errors=True)
            out.parent.mkdir()
            if number % 2:  # an artifact of another key stands there
                in_child(lambda: artifact.lower_here(before, target, None, out, SILENT) or 0)  # noqa: B023
            old = folder(out)
            killed, _ = in_child(lambda: lower(out, fatal))  # noqa: B023
            fatal -= 1
        found = folder(out)
        work = [path for path in out.parent.iterdir() if path.suffix == ".resume"]
        safe = {mark.file: mark.size for path in work for mark in journal.read_marks(path / journal.FILES).values()}
        rerun, steps = in_child(lambda: lower(out))  # noqa: B023
        after, left = folder(out), sorted(path.name for path in out.parent.iterdir())
        result = {"killed": killed, "old": old, "found": found, "safe": safe, "rerun": rerun, "steps": steps}
        print(json.dumps({**result, "after": after, "left": left}), flush=True)


if __name__ == "__main__":
    main()
