"""Times command chains as whole processes, interleaved, by the operating system's own accounting."""

from __future__ import annotations

import json
import os
import platform
import shlex
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Cost:
    """What a chain of commands took."""

    wall_s: float
    cpu_s: float
    """User and system, all threads."""
    peak_rss_bytes: int
    """Of the largest single process."""


def run_chain(commands: Sequence[Sequence[str]], environment: Mapping[str, str] | None = None) -> Cost:
    """Runs the commands one after the other. Raises RuntimeError with the output of one that fails."""
    wall, cpu, peak = 0.0, 0.0, 0
    for command in commands:
        started = time.perf_counter()
        child = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, **(environment or {})}
        )
        assert child.stdout is not None
        output = child.stdout.read()
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        wall += time.perf_counter() - started
        cpu += usage.ru_utime + usage.ru_stime
        peak = max(peak, usage.ru_maxrss * 1024)
        if child.returncode:
            raise RuntimeError(f"{shlex.join(command)} exited {child.returncode}\n{output.decode()[-3000:]}")
    return Cost(wall, cpu, peak)


def interleave(
    chains: Mapping[str, Sequence[Sequence[str]]], rounds: int, before: Callable[[], None] | None = None
) -> dict[str, list[Cost]]:
    """`rounds` runs of every chain, A B A B …, after one warm-up of each that does not count."""
    costs: dict[str, list[Cost]] = {name: [] for name in chains}
    for count in range(rounds + 1):
        for name, chain in chains.items():
            if before:
                before()
            cost = run_chain(chain)
            if count:
                costs[name].append(cost)
            print(f"{count if count else 'warm-up':>7} {name:12} {cost.wall_s:7.2f} s wall {cost.cpu_s:7.2f} s cpu"
                  f" {cost.peak_rss_bytes / 1e6:7.0f} MB", flush=True)  # fmt: skip
    return costs


def summarize(costs: Mapping[str, Sequence[Cost]], ours: str, peer: str) -> dict[str, object]:
    """Medians, and the ratio ours/peer pair by pair (below 1 is better), as min, median, max."""
    ratios = sorted(a.wall_s / b.wall_s for a, b in zip(costs[ours], costs[peer], strict=True))
    return {
        "wall_s": {name: statistics.median(cost.wall_s for cost in runs) for name, runs in costs.items()},
        "cpu_s": {name: statistics.median(cost.cpu_s for cost in runs) for name, runs in costs.items()},
        "peak_rss_bytes": {name: max(cost.peak_rss_bytes for cost in runs) for name, runs in costs.items()},
        "wall_ratio": {"min": ratios[0], "median": statistics.median(ratios), "max": ratios[-1]},
    }


def write_results(path: Path, summary: Mapping[str, object], costs: Mapping[str, Sequence[Cost]] | None = None) -> None:
    """The results with the machine in them."""
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    cpu = names[0] if names else platform.processor()
    path.parent.mkdir(parents=True, exist_ok=True)
    data: dict[str, object] = {
        "machine": {"cpu": cpu, "cores": len(os.sched_getaffinity(0)), "load_average": os.getloadavg()},
        **summary,
    }
    if costs:
        data["runs"] = {name: [asdict(cost) for cost in runs] for name, runs in costs.items()}
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
