"""What GPTQ's rounding costs: calibration, rounding and packing, each in a process of its own.

Usage: python benchmarks/rounding_costs.py MODEL DATA [--precision q4_0] [--tokens 15000] [--calibration-only]

MODEL is a folder of make_checkpoint.py, DATA a JSONL file of questions and answers. "calibrate" is the shared pass,
with what each layer is given kept; "gptq" is a whole lowering with GPTQ, with its phases as the stage tells them (the
feedback stream is in "round"); "llama.cpp" is the same lowering with llama.cpp's own rounding, which is packing alone.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

from measure import run_chain, write_results

from lora2edge.contracts import CheckpointRef
from lora2edge.progress import SILENT
from lora2edge.stage import run_stage

_CALIBRATE = """
import itertools, sys
from pathlib import Path
from lora2edge.adapters import open_view
from lora2edge.calibration import calibrate
from lora2edge.contracts import CheckpointRef
from lora2edge.progress import SILENT
from lora2edge.texts import Renderer, read_items
model, data, out, tokens, threads, dtype = sys.argv[1:]
view = open_view(CheckpointRef.of(f"{model}/base", f"{model}/adapter"))
renderer = Renderer(view.tokenizer)
samples = [renderer.sample(item) for item in read_items(Path(data))]
sums = itertools.accumulate(len(sample.ids) for sample in samples)
samples = [sample for sample, total in zip(samples, sums) if total <= int(tokens)]
found = calibrate(view, samples, Path(out), SILENT, device="cpu", threads=int(threads), dtype=dtype, layer_inputs=True)
print(found.layout.rows)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--precision", default="q4_0")
    parser.add_argument("--tokens", type=int, default=15000)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--calibration-only", action="store_true")
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    told: dict[str, object] = {"precision": options.precision, "tokens": options.tokens, "dtype": options.dtype}
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "calibration"
        folder.mkdir()
        given = (options.model, options.data, folder, options.tokens, options.threads, options.dtype)
        cost = run_chain([[sys.executable, "-c", _CALIBRATE, *map(str, given)]])
        told["calibrate"] = {"wall_s": cost.wall_s, "cpu_s": cost.cpu_s, "peak_rss_bytes": cost.peak_rss_bytes}
        print("calibrate", told["calibrate"], flush=True)
        kept = sum(path.stat().st_size for path in folder.iterdir())
        told["calibration_bytes"] = kept
        for rounding in () if options.calibration_only else ("gptq", "llama.cpp"):
            out = Path(root) / rounding
            out.mkdir()
            target = {"name": "t", "backend": "gguf", "precision": options.precision, "options": {"rounding": rounding}}
            result = run_stage(
                {
                    "stage": "lower",
                    "checkpoint": CheckpointRef.of(options.model / "base", options.model / "adapter").to_json(),
                    "target": target,
                    "calibration": str(folder),
                    "out": str(out),
                },
                SILENT,
            )
            told[rounding] = {key: result[key] for key in ("seconds", "cpu_seconds", "peak_rss_bytes", "phases")}
            print(rounding, json.dumps(told[rounding]), flush=True)
    if options.results:
        write_results(options.results, told)


if __name__ == "__main__":
    main()
