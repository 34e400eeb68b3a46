"""The whole bench, with real child processes around sessions that sleep."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from lora2edge.bench.interleave import bench
from lora2edge.bench.process import Command, WorkerProcess
from lora2edge.bench.result import SpeedResult
from lora2edge.bench.scenario import Scenario
from lora2edge.errors import InputError, Lora2EdgeError
from lora2edge.progress import SILENT

ROOT = Path(__file__).resolve().parents[3]
WORKER = ROOT / "tests/unit/bench/fake_worker.py"
REQUESTS = [[1, 2, 3], [4, 5], [6, 7, 8, 9]]
SMALL = Scenario(name="small", requests=2, new_tokens=6, concurrency=(1, 2), rounds=3, warmup=1, max_seconds=60)
FAST = {"first_ms": 20, "next_ms": 15}


def command(options: dict[str, Any], *more: str) -> Command:
    return Command((sys.executable, str(WORKER), json.dumps(options), *more), {"PYTHONPATH": str(ROOT)})


def measure(baseline: dict[str, Any], artifact: dict[str, Any], scenario: Scenario = SMALL) -> SpeedResult:
    return bench(command(baseline), command(artifact), REQUESTS, scenario, SILENT)


def alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def test_an_artifact_twice_as_slow_has_half_the_speed() -> None:
    # Long waits: a busy machine is late by milliseconds.
    result = measure({"first_ms": 90, "next_ms": 60}, {"first_ms": 180, "next_ms": 120})
    for ratio in (result.decode_ratio, result.ttft_ratio, result.itl_ratio, *result.qps_ratio.values()):
        assert ratio is not None and ratio.low is not None and ratio.high is not None
        assert ratio.low <= ratio.value <= ratio.high
        assert 0.38 < ratio.value < 0.65
    data = result.to_json()
    assert data["decode_tps"] == pytest.approx(1000 / 120, rel=0.25)
    assert data["baseline"]["decode_tps"] == pytest.approx(1000 / 60, rel=0.25)
    assert data["ttft_ms"]["p50"] == pytest.approx(180, rel=0.3)
    assert data["ttft_ms"]["n"] == 3 * 2 and data["itl_ms"]["n"] == 3 * 2 * 5
    # Two at a time in a session with two free slots are answered twice as fast.
    assert data["qps"]["2"] / data["qps"]["1"] == pytest.approx(2, rel=0.3)
    assert data["order"] == ("baseline artifact", "artifact baseline", "baseline artifact")
    assert data["requests"] == {"1": 6, "2": 6} and data["rounds"] == 3 and data["warmup"] == 3
    assert data["failures"] == 0 and data["prompt_tokens"] == (2, 3, 4)
    assert 5e6 < data["start_rss_bytes"] <= data["peak_rss_bytes"] < 1e9
    json.dumps(data, allow_nan=False)


def test_equal_sides_are_equal_within_their_interval() -> None:
    result = measure({"first_ms": 90, "next_ms": 60}, {"first_ms": 90, "next_ms": 60})
    assert 0.8 < result.decode_ratio.value < 1.25
    assert result.memory_ratio is not None and result.memory_ratio.value == pytest.approx(1, rel=0.1)


def test_a_request_that_fails_is_counted_and_its_round_is_no_pair() -> None:
    # 1 request warms up alone, 2 together; the first of the measured ones is the fourth.
    result = measure(FAST, {**FAST, "fail_at": 4})
    assert result.failures == result.artifact.failures == 1 and result.baseline.failures == 0
    assert result.rounds == 2
    assert result.artifact.failure_reasons == ("ValueError: no memory for the slot",)
    assert any("no memory for the slot" in note for note in result.notes)


def test_a_failure_at_a_higher_level_leaves_the_round_and_costs_that_level() -> None:
    result = measure(FAST, {**FAST, "fail_at": 6})  # warm-up 3, alone 2, then two at a time
    assert result.rounds == 3 and result.requests == {"1": 6, "2": 4} and result.failures == 1


def test_a_side_that_stops_early_gives_no_figure() -> None:
    with pytest.raises(Lora2EdgeError, match="not one round") as caught:
        measure(FAST, {**FAST, "gives": 3})
    assert caught.value.code == "bench-no-round"
    assert "gave 3 tokens where 6 were asked for" in caught.value.why


def test_a_side_that_does_not_stop_gives_no_figure() -> None:
    with pytest.raises(Lora2EdgeError, match="not one round") as caught:
        measure(FAST, {**FAST, "gives": 10**9})
    assert "gave more than 6 tokens" in caught.value.why


def test_the_budget_ends_the_rounds() -> None:
    slow = {"first_ms": 100, "next_ms": 60}
    scenario = SMALL.model_copy(update={"rounds": 50, "requests": 4, "max_seconds": 9})
    began = time.monotonic()
    result = measure(slow, slow, scenario)
    assert result.rounds < 50 and result.seconds < 11 and time.monotonic() - began < 25
    assert any("rounds" in note for note in result.notes)


def test_a_budget_too_small_for_a_round_is_an_error() -> None:
    with pytest.raises(Lora2EdgeError) as caught:
        measure(FAST, FAST, SMALL.model_copy(update={"max_seconds": 0.3}))
    assert caught.value.code == "bench-no-round"


def test_a_session_error_keeps_its_code_and_words() -> None:
    with pytest.raises(InputError) as caught:
        measure(FAST, {**FAST, "refuse": "no kernel for Mamba"})
    assert caught.value.code == "unknown-architecture" and caught.value.exit_code == 2
    assert caught.value.what == "artifact: no kernel for Mamba"
    assert (caught.value.why, caught.value.hint) == ("not built in", "use another")


def test_any_other_error_reaches_the_parent_in_its_words() -> None:
    with pytest.raises(Lora2EdgeError) as caught:
        measure({**FAST, "raise": "CUDA went away"}, FAST)
    assert caught.value.code == "worker-failed"
    assert "opening the session" in caught.value.what and "CUDA went away" in caught.value.why


def test_a_child_that_ends_is_noticed_at_once() -> None:
    began = time.monotonic()
    with pytest.raises(Lora2EdgeError) as caught:
        measure({**FAST, "exit": 9}, FAST)
    assert caught.value.code == "worker-died" and time.monotonic() - began < 30
    assert "exit code 9" in caught.value.what and "last words" in caught.value.why


def test_a_crash_in_the_middle_names_the_signal() -> None:
    with pytest.raises(Lora2EdgeError) as caught:
        measure(FAST, {**FAST, "die_at": 5})
    assert caught.value.code == "worker-died"
    assert "SIGABRT" in caught.value.what and "the kernel is not happy" in caught.value.why


def test_a_child_that_says_nothing_is_given_up() -> None:
    with pytest.raises(Lora2EdgeError) as caught:
        measure({**FAST, "open_s": 60}, FAST, SMALL.model_copy(update={"load_seconds": 1}))
    assert caught.value.code == "worker-timeout"


def test_a_command_that_does_not_exist() -> None:
    with pytest.raises(Lora2EdgeError) as caught:
        bench(Command(("/no/such/python",)), command(FAST), REQUESTS, SMALL, SILENT)
    assert caught.value.code == "worker-start"


def test_different_devices_have_no_memory_ratio() -> None:
    result = measure({**FAST, "device": "cuda"}, FAST)
    assert result.memory_ratio is None
    assert any("cuda" in note and "artifact on cpu" in note for note in result.notes)


def test_interrupting_the_parent_kills_both_children(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    script = (
        "import tests.unit.bench.test_interleave as t\n"
        f"slow = {{'first_ms': 50, 'next_ms': 50}}\n"
        f"one = t.command(slow, {str(pids)!r})\n"
        "t.bench(one, one, t.REQUESTS, t.SMALL.model_copy(update={'rounds': 1000}), t.SILENT)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not (pids.exists() and len(pids.read_text().split()) == 2) and time.monotonic() < deadline:
        time.sleep(0.1)
    children = [int(pid) for pid in pids.read_text().split()]
    time.sleep(1)
    assert len(children) == 2 and all(alive(pid) for pid in children)
    parent.send_signal(signal.SIGINT)
    parent.communicate(timeout=30)
    assert not any(alive(pid) for pid in children)


def test_a_child_whose_parent_is_killed_leaves_by_itself(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    script = (
        "import tests.unit.bench.test_interleave as t\n"
        f"worker = t.WorkerProcess('artifact', t.command({{'first_ms': 10, 'next_ms': 50}}, {str(pids)!r}))\n"
        "worker.wait_ready(60)\n"
        "print('ready', flush=True)\n"
        "worker.run([[1]], concurrency=1, max_new=10_000, max_seconds=600)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE)
    assert parent.stdout is not None
    parent.stdout.readline()
    child = int(pids.read_text())
    assert alive(child)
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + 20
    while alive(child) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive(child)


def test_the_waiting_side_sleeps_in_its_openmp_barriers() -> None:
    code = "import os, json; print(json.dumps({'reply': 'ready', 'policy': os.environ['OMP_WAIT_POLICY']}))"
    with WorkerProcess("baseline", Command((sys.executable, "-c", code))) as worker:
        assert worker.wait_ready(30)["policy"] == os.environ.get("OMP_WAIT_POLICY", "passive")
