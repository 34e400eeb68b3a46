"""Runs `lora2edge ARGUMENTS` in a child with a time and a memory limit, quickly: forked from a warm process.

    with Sandbox(cache) as sandbox:
        outcome = sandbox.run("merge", "--base", base, "--out", out)

Each run is a whole command, from the arguments to the exit code, in a process of its own. A fresh interpreter would
take a third of a second each time; the fork of one that has imported everything takes a tenth of that.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

LIMIT_SECONDS = 20
LIMIT_BYTES = 4 << 30
"""Of address space: past the point where a test fails, and far below what would harm the machine."""
_MODULES = ("cli.lower", "cli.merge", "cli.inspect", "verbs", "backends.gguf", "backends.hf.backend", "texts")


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    """Exit code; minus the signal's number where one ended it: -14 when it ran out of time."""
    out: str
    err: str
    seconds: float
    peak_bytes: int
    """Largest resident memory."""


class Sandbox:
    """A warm process that forks one child per command."""

    def __init__(self, cache: Path, limit_seconds: int = LIMIT_SECONDS) -> None:
        environment = {
            **os.environ,
            "LORA2EDGE_CACHE": str(cache),
            "HF_HUB_OFFLINE": "1",
            "OPENBLAS_NUM_THREADS": "1",  # a fork does not take the threads along
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(Path(__file__).parent.parent),
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.sandbox", str(limit_seconds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )

    def run(self, *arguments: str | Path) -> Outcome:
        """`lora2edge ARGUMENTS`."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps([str(argument) for argument in arguments]).encode() + b"\n")
        self._process.stdin.flush()
        return Outcome(**json.loads(self._process.stdout.readline()))

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(timeout=LIMIT_SECONDS + 10)


def _serve(limit_seconds: int) -> None:
    for module in _MODULES:
        importlib.import_module(f"lora2edge.{module}")
    reply = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            began = time.monotonic()
            child = os.fork()
            if child == 0:
                _run(json.loads(line), limit_seconds, out.fileno(), err.fileno())
            _, status, usage = os.wait4(child, 0)
            seconds = time.monotonic() - began
            texts = []
            for file in (out, err):
                file.seek(0)
                texts.append(file.read().decode(errors="backslashreplace"))
        outcome = Outcome(os.waitstatus_to_exitcode(status), *texts, seconds, usage.ru_maxrss * 1024)
        reply.write(json.dumps(outcome.__dict__) + "\n")
        reply.flush()


def _run(arguments: list[str], limit_seconds: int, out: int, err: int) -> None:
    """The child: never returns."""
    code = 1
    try:
        for number, file in ((1, out), (2, err)):
            os.dup2(file, number)
        resource.setrlimit(resource.RLIMIT_AS, (LIMIT_BYTES, LIMIT_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(limit_seconds)
        sys.stdin = open(os.devnull)  # noqa: PTH123, SIM115  (the process ends right after)
        sys.argv = ["lora2edge", *arguments]
        from lora2edge.cli import main

        main()
    except SystemExit as stopped:
        code = stopped.code if isinstance(stopped.code, int) else 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
