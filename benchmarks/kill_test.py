"""Kills merges and lowerings with SIGKILL at random moments, runs them again, and compares with undisturbed runs.

Usage: python benchmarks/kill_test.py MODEL [--kills 20] [--target q4_k_m] [--data FILE] [--seed 0] [--results FILE]

MODEL is a folder of make_checkpoint.py. A kill hits the command and every process that it started, or by chance the
command alone, at a moment drawn from the undisturbed run's duration. After it, nothing but a whole folder may stand
under the final name; after the next run, every file but lowering.json (which tells how long it took) must have the
undisturbed run's sha256. With --data (JSONL) only the lowering is
killed, with its calibration pass and GPTQ's rounding.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measure import write_results

from lora2edge.journal import FILES, read_marks
from lora2edge.storage import sha256_file

FIGURES = "lowering.json"


def hashes(folder: Path) -> dict[str, str] | None:
    """File name → sha256 of what stands under a final name; None where nothing does."""
    if not folder.is_dir():
        return None
    return {
        str(path.relative_to(folder)): sha256_file(path)
        for path in folder.rglob("*")
        if path.is_file() and path.name != FIGURES
    }


def descendants(pid: int) -> list[int]:
    """Processes that `pid` has started, and those that they have."""
    try:
        children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
    return [*children, *(other for child in children for other in descendants(child))]


def run(command: list[str], kill_after: float | None = None, *, alone: bool = False) -> tuple[int, float]:
    """Exit status and seconds of the command; after so long it is killed, with all that it started or `alone`."""
    started = time.monotonic()
    with tempfile.TemporaryFile() as output:
        child = subprocess.Popen(command, stdout=output, stderr=output)
        try:
            status = child.wait(kill_after)
        except subprocess.TimeoutExpired:
            for pid in [child.pid, *([] if alone else descendants(child.pid))]:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            status = child.wait()
        if status not in (0, -signal.SIGKILL):
            output.seek(0)
            raise RuntimeError(output.read().decode()[-3000:])
    return status, time.monotonic() - started


def kill_and_repeat(command: list[str], scratch: Path, final: Path, kills: int) -> dict[str, Any]:
    """One kind of work, undisturbed once and then killed `kills` times; every kill begins with nothing there."""
    shutil.rmtree(scratch, ignore_errors=True)
    cache = scratch.with_name("cache")
    _, whole_s = run(command)
    whole = hashes(final)
    assert whole, f"{final} was not written"
    runs: list[dict[str, Any]] = []
    while len(runs) < kills:
        shutil.rmtree(scratch)
        shutil.rmtree(cache, ignore_errors=True)
        moment, alone = random.uniform(0, whole_s), random.random() < 0.3
        status, _ = run(command, moment, alone=alone)
        if not status:  # faster than the undisturbed run: it was over
            continue
        found = hashes(final)
        work = [*final.parent.glob(".*.resume"), *cache.glob("*/*.resume")]
        kept = sum(mark.size for path in work for mark in read_marks(path / FILES).values())
        there = sum(file.stat().st_size for path in work for file in path.glob(f"{FILES}/*"))
        _, again_s = run(command)
        runs.append(
            {
                "moment_s": moment,
                "alone": alone,
                "broken": found not in (None, whole),
                "kept_bytes": kept,
                "lost_bytes": max(0, there - kept),
                "again_s": again_s,
                "identical": hashes(final) == whole,
                "left_over": [path.name for path in final.parent.iterdir() if path != final],
            }
        )
        print(json.dumps({"number": len(runs), **runs[-1]}), flush=True)
    return {
        "undisturbed_s": whole_s,
        "bytes": sum(path.stat().st_size for path in final.iterdir()),
        "kills": len(runs),
        "identical": sum(one["identical"] for one in runs),
        "broken": sum(one["broken"] for one in runs),
        "left_over": sum(bool(one["left_over"]) for one in runs),
        "resumed": sum(one["kept_bytes"] > 0 for one in runs),
        "lost_bytes": {
            "median": statistics.median(one["lost_bytes"] for one in runs),
            "max": max(one["lost_bytes"] for one in runs),
        },
        "runs": runs,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--target", default="gguf/q4_k_m")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path)
    arguments = parser.parse_args()
    random.seed(arguments.seed)
    model = ["--base", str(arguments.model / "base"), "--adapter", str(arguments.model / "adapter")]
    lora2edge = [sys.executable, "-m", "lora2edge"]
    with tempfile.TemporaryDirectory(dir=arguments.model) as folder:
        scratch = Path(folder) / "work"
        final = scratch / "artifacts" / arguments.target.replace("/", "-")
        merge = [*lora2edge, "merge", *model, "--out", str(scratch / "merged")]
        lower = [*lora2edge, "lower", *model, "--target", arguments.target, "--out", str(scratch)]
        if arguments.data:
            lower = ["env", f"LORA2EDGE_CACHE={scratch.with_name('cache')}", *lower, "--data", str(arguments.data)]
        summary = {arguments.target: kill_and_repeat(lower, scratch, final, arguments.kills)}
        if not arguments.data:
            summary["merge"] = kill_and_repeat(merge, scratch, scratch / "merged", arguments.kills)
    print(json.dumps({name: {**one, "runs": None} for name, one in summary.items()}, indent=2))
    if arguments.results:
        write_results(arguments.results, {"command": "benchmarks/kill_test.py", **summary})
    if any(one["broken"] or one["identical"] < len(one["runs"]) for one in summary.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
