"""`lora2edge merge` from disk to disk against `cp` of the base's weights, with a cold page cache, interleaved.

Usage: python benchmarks/merge_vs_cp.py MODEL [--rounds 5] [--results FILE]

MODEL is a folder of make_checkpoint.py. Before each run the files that it reads leave the page cache
(posix_fadvise), and as much memory as `cp` fills has been used and freed. `cp` returns when the bytes are in the page
cache, the merge when they are on the disk; `cp+sync` is `cp` followed by `sync` of what it wrote. The bound is 1.5 ×
the median of `cp` and one second more.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

from measure import interleave, write_results


def forget(folder: Path) -> None:
    """Drops the folder's files from the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)  # only clean pages can be dropped
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def back_memory(base: Path, scratch: Path) -> None:
    """Copies the weights once and removes the copy: in a virtual machine, memory that nobody has used for a while has
    to be asked back from the host, at 2 s per GB; the first to fill the page cache would pay for all that follow.
    """
    for path in base.glob("*.safetensors"):
        shutil.copyfile(path, scratch / path.name)
        (scratch / path.name).unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--results", type=Path)
    arguments = parser.parse_args()
    base, adapter = arguments.model / "base", arguments.model / "adapter"
    weights = sorted(map(str, base.glob("*.safetensors")))
    # Beside the model, so that reading and writing are on one disk.
    with tempfile.TemporaryDirectory(dir=arguments.model) as scratch:
        merged, copied = Path(scratch) / "merged", Path(scratch) / "copied"

        def prepare() -> None:
            shutil.rmtree(merged, ignore_errors=True)
            shutil.rmtree(copied, ignore_errors=True)
            copied.mkdir()
            back_memory(base, copied)
            os.sync()
            forget(arguments.model)

        merge = [sys.executable, "-m", "lora2edge", "merge", "--base", base, "--adapter", adapter, "--out", merged]
        chains = {
            "lora2edge": [[*map(str, merge)]],
            "cp": [["cp", *weights, str(copied)]],
            "cp+sync": [["cp", *weights, str(copied)], ["sync", "-f", str(copied)]],
        }
        costs = interleave(chains, arguments.rounds, before=prepare)
    walls = {name: statistics.median(cost.wall_s for cost in runs) for name, runs in costs.items()}
    bound = 1.5 * walls["cp"] + 1
    summary = {
        "wall_s": walls,
        "cpu_s": {name: statistics.median(cost.cpu_s for cost in runs) for name, runs in costs.items()},
        "peak_rss_bytes": max(cost.peak_rss_bytes for cost in costs["lora2edge"]),
        "bytes": sum(Path(path).stat().st_size for path in weights),
        "bound_s": bound,
        "within_bound": walls["lora2edge"] <= bound,
    }
    print(json.dumps(summary, indent=2))
    if arguments.results:
        write_results(arguments.results, {"command": "benchmarks/merge_vs_cp.py", **summary}, costs)


if __name__ == "__main__":
    main()
