"""Processes of a stage: they are gone when the one that started them is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

# The request is a pipe that nobody writes to: a stage that hangs, before it has loaded anything.
STAGE = """
import sys
from pathlib import Path
from lora2edge import stage
from lora2edge.progress import SILENT
command = stage.stage_command
stage.stage_command = lambda path, python: command(Path(sys.argv[1]), python)
stage.run_stage({"stage": "lower"}, SILENT)
"""
MEASURED = """
import sys
from pathlib import Path
from lora2edge.bench.process import Command, WorkerProcess
from lora2edge.stage import stage_command
with WorkerProcess("artifact", Command(tuple(stage_command(Path(sys.argv[1]))))) as worker:
    worker.wait_ready(100)
"""


def stages(request: Path) -> list[int]:
    """Processes that have `request` in their command line, but for the one that started them."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if b"lora2edge.stage" in words and str(request).encode() in words:
            found.append(int(path.parent.name))
    return found


def opened(request: Path) -> int:
    """The other end of the pipe, as soon as a stage reads from it."""
    deadline = time.monotonic() + 60
    while True:
        try:
            return os.open(request, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:
            assert time.monotonic() < deadline, "no stage came"
            time.sleep(0.02)


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
@pytest.mark.parametrize("parent", [STAGE, MEASURED], ids=["stage", "measured"])
def test_a_stage_dies_with_its_parent(tmp_path: Path, parent: str) -> None:
    request = tmp_path / "request.json"
    os.mkfifo(request)
    process = subprocess.Popen([sys.executable, "-c", parent, request])
    writer = opened(request)
    assert len(stages(request)) == 1
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    try:
        deadline = time.monotonic() + 20
        while stages(request) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert stages(request) == []
    finally:
        os.close(writer)
        for left in stages(request):
            os.kill(left, signal.SIGKILL)


def test_a_stage_whose_parent_is_gone_already_leaves(tmp_path: Path) -> None:
    request = tmp_path / "request.json"
    os.mkfifo(request)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    child = subprocess.run([sys.executable, "-m", "lora2edge.stage", request, str(gone.pid)], timeout=20, check=False)
    assert child.returncode == 130
