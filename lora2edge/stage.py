"""One stage in a process of its own: both ends of the pipe.

`python -m lora2edge.stage REQUEST.json PARENT` runs the stage that the request names, in whatever interpreter holds the
libraries that it needs, and reports as JSON lines on standard output: progress, then one `result` or `error`. It
dies with the process PARENT, however that ends.
A process of its own gives each lowering and each measurement an honest peak memory, and lets backends whose
pins exclude each other take part in one build.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, NoReturn

from lora2edge.contracts import CheckpointRef, Classifier, Progress, Session, SessionOptions
from lora2edge.errors import (
    EXIT_BUG,
    EXIT_INTERRUPTED,
    EXIT_OK,
    GateError,
    InputError,
    Lora2EdgeError,
    MissingExtraError,
)
from lora2edge.storage import lives, writing

_PR_SET_PDEATHSIG = 1

# ---------------------------------------------------------------- the parent's end


def run_stage(request: Mapping[str, Any], progress: Progress, python: str | None = None) -> dict[str, Any]:
    """Runs `request` in a child process and returns its result.

    Raises the child's own Lora2EdgeError; where it dies of anything else, one with its last words. Interrupting the
    parent ends the child.
    """
    with tempfile.TemporaryDirectory(prefix="lora2edge-") as folder:
        path = Path(folder) / "request.json"
        path.write_text(json.dumps(request), encoding="utf-8")
        errors_path = Path(folder) / "stderr"
        with errors_path.open("wb") as errors:
            try:
                child = subprocess.Popen(
                    stage_command(path, python),
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    text=True,
                    start_new_session=True,
                )
            except OSError as error:
                raise InputError(
                    "stage-python", f"cannot run {python}", why=str(error), hint="mend `python:` in the target's file"
                ) from error
            try:
                assert child.stdout is not None
                result = _follow(child.stdout, progress)
                child.wait()
            finally:
                _end(child)
        if result is None:
            words = errors_path.read_text(encoding="utf-8", errors="replace")
            raise _death(request["stage"], child.returncode, words, python)
        return result


def _death(stage: str, status: int, words: str, python: str | None) -> Lora2EdgeError:
    """The error for a child that left without a result: killed from outside, or a bug, whose traceback is told."""
    why = words[-4000:].strip() or "it said nothing"
    if status < 0:
        name = signal.Signals(-status).name
        hint = "the machine may have run out of memory: look at `dmesg | tail`" if name == "SIGKILL" else ""
        return InputError("stage-killed", f"the {stage} stage was killed by {name}", why=why, hint=hint)
    if python and "No module named" in why:
        return MissingExtraError(
            "stage-python",
            f"{python} cannot run the {stage} stage",
            why=why.splitlines()[-1],
            hint=f"{python} -m pip install lora2edge, with the backend's extra",
        )
    return Lora2EdgeError(
        "stage-died", f"the {stage} stage ended with exit status {status}", why=why, hint="report this, it is a bug"
    )


def stage_command(request: Path, python: str | None = None) -> list[str]:
    """The command line that runs the request file for this process."""
    return [python or sys.executable, "-m", "lora2edge.stage", str(request), str(os.getpid())]


def _follow(lines: IO[str], progress: Progress) -> dict[str, Any] | None:
    """Passes progress on until the child's result; None when its output ends without one."""
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:
            continue  # a library's own words
        match event.get("event"):
            case "start":
                progress.start(event["what"], event["total"], event["unit"])
            case "advance":
                progress.advance(event["amount"])
            case "finish":
                progress.finish()
            case "result":
                result: dict[str, Any] = event["result"]
                return result
            case "error":
                kind = GateError if event["exit_code"] == GateError.exit_code else InputError
                raise kind(event["code"], event["what"], why=event["why"], hint=event["hint"])
            case _:
                continue
    return None


def _end(child: subprocess.Popen[str]) -> None:
    """Makes sure that the child is gone."""
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(10)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
    if child.stdout:
        child.stdout.close()


# ---------------------------------------------------------------- the child's end


def main(argv: list[str]) -> int:
    """Runs the request file `argv[0]` for the process `argv[1]`; returns the exit status."""
    _die_with(int(argv[1]))
    from lora2edge.bench.worker import read_memory
    from lora2edge.progress import JsonLines

    signal.signal(signal.SIGTERM, _interrupt)
    request = json.loads(Path(argv[0]).read_text(encoding="utf-8"))
    if request["stage"] == "session":
        _session(request)
    # What libraries print must not get between the JSON lines: standard output becomes standard error for them.
    reply = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    try:
        stages = {"lower": _lower, "measure": _measure}
        started, progress = time.monotonic(), JsonLines(reply)
        result = stages[request["stage"]](request, progress)
        result["phases"] = progress.phases
        result["seconds"] = time.monotonic() - started
        result["cpu_seconds"] = time.process_time()
        result["peak_rss_bytes"] = read_memory()["peak_rss_bytes"]
        _reply(reply, {"event": "result", "result": result})
        return EXIT_OK
    except Lora2EdgeError as error:
        _reply(reply, {"event": "error", "exit_code": error.exit_code, **error.as_dict()})
        return error.exit_code
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def _die_with(parent: int) -> None:
    """Asks Linux to kill this process when the one that started it is gone (prctl(2)); a SIGKILL lets that one no time.

    A session of its own (`start_new_session`) keeps the terminal's signals away, and so the terminal's end, too.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent and not lives(parent):  # it died before; a wrapper script may stand between
        os._exit(EXIT_INTERRUPTED)


def _lower(request: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """Lowers the checkpoint into the empty folder `out`."""
    from lora2edge.adapters import open_view
    from lora2edge.backends.base import load_backend
    from lora2edge.calibration import open_calibration
    from lora2edge.target import Target

    target = Target.model_validate(request["target"])
    checkpoint = open_view(CheckpointRef.from_json(request["checkpoint"]))
    calibration = open_calibration(Path(request["calibration"])) if request["calibration"] else None
    out = Path(request["out"])
    with writing(out.parent):
        lowered = load_backend(target.backend).lower(checkpoint, target, calibration, out, progress)
    return {"versions": dict(lowered.versions), "notes": dict(lowered.notes)}


def _measure(request: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """Quality of an artifact against the recorded baseline, and what lowering did to each tensor."""
    from dataclasses import asdict

    from lora2edge.adapters import open_view
    from lora2edge.backends.base import load_backend
    from lora2edge.target import Target
    from lora2edge.tasks import tools_for

    target = Target.model_validate(request["target"])
    view = open_view(CheckpointRef.from_json(request["checkpoint"]))
    backend, artifact = load_backend(target.backend), Path(request["artifact"])
    damage = backend.damage(view, artifact, progress)
    session = backend.open(artifact, target, SessionOptions(**request["session"]))
    try:
        tools = tools_for(view.task)
        quality = tools.measure(session, Path(request["reference"]), seed=request["seed"], progress=progress)
        return {"quality": quality, "damage": [asdict(tensor) for tensor in damage], "facts": asdict(session.facts)}
    finally:
        session.close()


def _session(request: Mapping[str, Any]) -> NoReturn:
    """Serves an opened session to the benchmark in the parent process."""
    from lora2edge.bench.worker import serve_stdio

    options = SessionOptions(**request["session"])

    def open_session() -> Session | Classifier:
        if request["kind"] == "baseline":
            from lora2edge.tasks import tools_for

            ref, tools = CheckpointRef.from_json(request["checkpoint"]), tools_for(request["task"])
            return tools.open_live(ref, options, dtype=request["dtype"])
        from lora2edge.backends.base import load_backend
        from lora2edge.target import Target

        target = Target.model_validate(request["target"])
        return load_backend(target.backend).open(Path(request["artifact"]), target, options)

    serve_stdio(open_session)


def _reply(stream: IO[str], event: Mapping[str, Any]) -> None:
    stream.write(json.dumps(event) + "\n")
    stream.flush()


def _interrupt(signum: int, frame: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # Native runtimes may hang or crash in their exit handlers; everything is written by now.
    os._exit(status if status is not None else EXIT_BUG)
