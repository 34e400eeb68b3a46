"""The parent's end of a measured process. Never hangs: every wait has a limit, and a dead child is noticed."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from lora2edge.bench.batches import ClassifyRun
from lora2edge.bench.load import Run
from lora2edge.contracts import Encoded
from lora2edge.errors import EXIT_GATE, EXIT_INPUT, GateError, InputError, Lora2EdgeError

_QUIT_SECONDS = 30.0
_GRACE_SECONDS = 120.0
"""A run ends at its budget between two tokens; one token, or one prompt, may take this much longer."""
_LAST_WORDS = 12


@dataclass(frozen=True, slots=True)
class Command:
    """How to start a measured process: one that calls `worker.serve_stdio`."""

    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    """Added to this process's environment."""
    cwd: Path | None = None


class WorkerProcess:
    """A running measured process, in a process group of its own; leaving the `with` block kills it."""

    def __init__(self, name: str, command: Command) -> None:
        """Starts `command`. `name` ("baseline", "artifact") is what errors call it. Raises Lora2EdgeError."""
        self.name = name
        # Passive: the OpenMP threads of the process that waits its turn sleep. Spinning ones would take the
        # processor from the process that is measured.
        # They spin for microseconds first: llama.cpp's threads meet after every operation, and with threads that sleep
        # at once two were slower than one (34 against 58 tokens/s on two cores).
        env = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "20000", **os.environ, **command.env}
        try:
            self._process = subprocess.Popen(
                command.argv,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=env,
                cwd=command.cwd,
                start_new_session=True,
                encoding="utf-8",
                errors="replace",
            )
        except OSError as error:
            raise Lora2EdgeError(
                "worker-start", f"the {name}'s process did not start", why=str(error), hint=command.argv[0]
            ) from error
        self._replies: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._words: deque[str] = deque(maxlen=_LAST_WORDS)
        self._readers = [
            threading.Thread(target=self._read_replies, daemon=True),
            threading.Thread(target=self._read_words, daemon=True),
        ]
        for reader in self._readers:
            reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    def wait_ready(self, timeout_s: float) -> dict[str, Any]:
        """`{"load_s", "facts", "memory"}` once the session is open."""
        return self._reply("ready", timeout_s, "opening the session")

    def run(self, requests: Sequence[Sequence[int]], *, concurrency: int, max_new: int, max_seconds: float) -> Run:
        """One recorded execution of `requests` in the child."""
        self._send(
            {
                "op": "run",
                "requests": [list(ids) for ids in requests],
                "concurrency": concurrency,
                "max_new": max_new,
                "max_seconds": max_seconds,
            }
        )
        return Run.from_json(self._reply("run", max_seconds + _GRACE_SECONDS, "a measurement"))

    def classify(self, texts: Sequence[Encoded], *, batch_size: int, max_seconds: float) -> ClassifyRun:
        """One recorded execution of `texts` in batches, in a child that has a classifier."""
        self._send(
            {
                "op": "classify",
                "texts": [[list(text.ids), list(text.types)] for text in texts],
                "batch_size": batch_size,
                "max_seconds": max_seconds,
            }
        )
        return ClassifyRun.from_json(self._reply("run", max_seconds + _GRACE_SECONDS, "a measurement"))

    def quit(self) -> dict[str, int | None]:
        """Ends the child and returns its memory figures, the peak of its whole life among them."""
        self._send({"op": "quit"})
        memory: dict[str, int | None] = self._reply("quit", _QUIT_SECONDS, "leaving")["memory"]
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_QUIT_SECONDS)
        return memory

    def kill(self) -> None:
        """Kills the child and everything that it started."""
        # The group outlives its leader while a grandchild runs, so it is killed even when the child is gone.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_QUIT_SECONDS)
        for reader in self._readers:
            reader.join(1.0)
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            if pipe is not None:
                with contextlib.suppress(OSError, ValueError):
                    pipe.close()

    def _send(self, message: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except (BrokenPipeError, OSError):
            self._reply("nothing", _QUIT_SECONDS, "waiting for its turn")  # raises with the child's words

    def _reply(self, kind: str, timeout_s: float, doing: str) -> dict[str, Any]:
        """The next reply, which must be of `kind`; raises with the child's words where it is anything else."""
        try:
            reply = self._replies.get(timeout=timeout_s)
        except queue.Empty:
            raise Lora2EdgeError(
                "worker-timeout",
                f"the {self.name}'s process said nothing for {timeout_s:.0f} s while {doing}",
                why=self._last_words(),
                hint="raise load_seconds or max_seconds in the scenario, or lower new_tokens",
            ) from None
        if reply is None:
            raise self._death(doing)
        if reply["reply"] == "error":
            raise _as_error(self.name, reply, self._last_words())
        if reply["reply"] != kind:
            raise Lora2EdgeError(
                "worker-reply", f"the {self.name}'s process answered {reply['reply']!r} where {kind!r} was due"
            )
        return reply

    def _death(self, doing: str) -> Lora2EdgeError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5.0)
        self._readers[1].join(1.0)
        code = self._process.returncode
        hint = ""
        if code is not None and code < 0:
            how = f"killed by {signal.Signals(-code).name}"
            if -code == signal.SIGKILL:
                hint = "the machine may have run out of memory: look at `dmesg | tail`"
        else:
            how = f"exit code {code}"
        return Lora2EdgeError(
            "worker-died",
            f"the {self.name}'s process ended while {doing} ({how})",
            why=self._last_words(),
            hint=hint,
        )

    def _last_words(self) -> str:
        return " | ".join(line for line in self._words if line) or "it said nothing"

    def _read_replies(self) -> None:
        assert self._process.stdout is not None
        with contextlib.suppress(ValueError, OSError):
            for line in self._process.stdout:
                try:
                    reply = json.loads(line)
                except ValueError:
                    reply = None
                if isinstance(reply, dict) and "reply" in reply:
                    self._replies.put(reply)
                else:  # something printed before the worker took standard output for itself
                    self._words.append(line.rstrip())
        self._replies.put(None)

    def _read_words(self) -> None:
        assert self._process.stderr is not None
        with contextlib.suppress(ValueError, OSError):
            for line in self._process.stderr:
                self._words.append(line.rstrip())


def _as_error(name: str, reply: Mapping[str, Any], last_words: str) -> Lora2EdgeError:
    """The child's error, as the parent raises it: the same code, what, why, hint and exit code."""
    kind = {EXIT_INPUT: InputError, EXIT_GATE: GateError}.get(reply.get("exit_code", 1), Lora2EdgeError)
    why = reply["why"] if reply["why"] or last_words == "it said nothing" else last_words
    return kind(reply["code"], f"{name}: {reply['what']}", why=why, hint=reply["hint"])
