"""The measured process: opens one session, then does what JSON lines on its standard input say.

    → {"op": "run", "concurrency": 2, "requests": [[ids], …], "max_new": 64, "max_seconds": 60}
    ← {"reply": "run", …}                     a Run, with every token's time
    → {"op": "classify", "texts": [[ids, types], …], "batch_size": 8, "max_seconds": 60}
    ← {"reply": "run", …}                     a ClassifyRun, with every batch's time
    → {"op": "quit"}
    ← {"reply": "quit", "memory": {…}}

It first says {"reply": "ready", "load_s", "facts", "memory"}. An error is {"reply": "error", code, what, why,
hint, exit_code}. When its standard input closes, its parent is gone: it stops at the next token and leaves.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn, TextIO, cast

from lora2edge.bench.batches import run_batches
from lora2edge.bench.load import run_load
from lora2edge.contracts import Classifier, Encoded, Session
from lora2edge.errors import EXIT_BUG, EXIT_INTERRUPTED, EXIT_OK, Lora2EdgeError

_FIELDS = {"peak_rss_bytes": "VmHWM", "rss_bytes": "VmRSS", "anonymous_bytes": "RssAnon", "file_bytes": "RssFile"}


def serve_stdio(open_session: Callable[[], Session | Classifier]) -> NoReturn:
    """`serve` on this process's standard input and output, then leaves without running exit handlers.

    What libraries print goes to standard error instead, C libraries included. Runtimes with their own threads
    hang or crash in their exit handlers (llama.cpp's server does), and a measurement must not.
    """
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    try:
        code = serve(open_session, sys.stdin, replies)
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
    with contextlib.suppress(BrokenPipeError):
        replies.flush()
    sys.stderr.flush()
    os._exit(code)


def serve(open_session: Callable[[], Session | Classifier], requests_in: TextIO, replies_out: TextIO) -> int:
    """Opens the session and obeys until told to quit; a session's error is a reply. Returns the exit code."""

    def reply(kind: str, data: Mapping[str, Any]) -> None:
        with contextlib.suppress(BrokenPipeError):
            replies_out.write(json.dumps({"reply": kind, **data}) + "\n")
            replies_out.flush()

    start = read_memory()
    began = time.perf_counter()
    session: Session | Classifier | None = None
    try:
        session = open_session()
        load_s = time.perf_counter() - began
        loaded = read_memory()
        memory = {"start_rss_bytes": start["rss_bytes"], "loaded_rss_bytes": loaded["rss_bytes"]}
        reply("ready", {"load_s": load_s, "facts": asdict(session.facts), "memory": memory})
        return _obey(session, requests_in, reply)
    except Lora2EdgeError as error:
        reply("error", {**error.as_dict(), "exit_code": error.exit_code})
        return error.exit_code
    except Exception as error:  # the parent, not this process, tells the user
        doing = "opening the session" if session is None else "measuring"
        reply("error", {"code": "worker-failed", "what": f"{doing} failed", "why": _words(error), "hint": ""})
        return EXIT_BUG
    finally:
        if session is not None:
            with contextlib.suppress(Exception):
                session.close()


def read_memory() -> dict[str, int | None]:
    """This process's memory in bytes: `peak_rss_bytes`, `rss_bytes`, `anonymous_bytes`, `file_bytes`.

    From `/proc/self/status` (proc_pid_status(5)); None where the kernel does not say.
    """
    status = Path("/proc/self/status")
    lines = dict(line.partition(":")[::2] for line in status.read_text().splitlines()) if status.exists() else {}
    return {name: int(lines[field].split()[0]) * 1024 if field in lines else None for name, field in _FIELDS.items()}


def _obey(session: Session | Classifier, requests_in: TextIO, reply: Callable[[str, Mapping[str, Any]], None]) -> int:
    messages: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    orphaned = threading.Event()

    def listen() -> None:
        for line in requests_in:
            messages.put(line)
        orphaned.set()
        messages.put(None)

    threading.Thread(target=listen, daemon=True).start()
    while (line := messages.get()) is not None:
        message = json.loads(line)
        if message["op"] == "quit":
            reply("quit", {"memory": read_memory()})
            return EXIT_OK
        reply("run", _run(session, message, orphaned))
    return EXIT_INTERRUPTED


def _run(session: Session | Classifier, message: Mapping[str, Any], cancel: threading.Event) -> dict[str, Any]:
    if message["op"] == "classify":
        texts = [Encoded(tuple(ids), tuple(types)) for ids, types in message["texts"]]
        return run_batches(
            cast("Classifier", session),
            texts,
            batch_size=message["batch_size"],
            max_seconds=message["max_seconds"],
            cancel=cancel,
        ).to_json()
    return run_load(
        cast("Session", session),
        message["requests"],
        concurrency=message["concurrency"],
        max_new=message["max_new"],
        max_seconds=message["max_seconds"],
        cancel=cancel,
    ).to_json()


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
