"""How much of a lowering's CPU time is spent inside llama.cpp's quantization kernels.

Usage: python benchmarks/kernel_share.py MODEL... [--precision q4_k_m] [--imatrix DATA] [--results FILE]

Each MODEL is a folder of make_checkpoint.py. Counts the CPU time of each worker thread while it is in
`ggml_quantize_chunk`, against that of the whole process from opening the checkpoint to the finished file, in three
rounds after a warm-up. With --imatrix the importance matrix is computed from DATA (JSONL) before the count starts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from measure import write_results

from lora2edge.adapters import merge, read_adapter
from lora2edge.backends.gguf import GgufBackend
from lora2edge.backends.gguf.llama_cpp import Library
from lora2edge.calibration import calibrate
from lora2edge.checkpoint import open_checkpoint
from lora2edge.contracts import Calibration
from lora2edge.progress import SILENT
from lora2edge.target import Target
from lora2edge.texts import Renderer, read_items


def lower(model: Path, precision: str, calibration: Calibration | None) -> dict[str, float]:
    """CPU and wall time of one lowering, and the share of the kernels in the CPU time."""
    seconds, lock = [0.0], threading.Lock()
    plain = Library.quantize_chunk

    def timed(self: Library, *values: Any, **named: Any) -> int:
        started = time.thread_time()
        written = plain(self, *values, **named)
        with lock:
            seconds[0] += time.thread_time() - started
        return written

    chosen = {"imatrix": calibration is not None, "rounding": "llama.cpp"}
    target = Target(name="bench", backend="gguf", precision=precision, options=chosen)
    Library.quantize_chunk = timed  # type: ignore[method-assign]
    try:
        with tempfile.TemporaryDirectory() as out:
            started, started_wall = time.process_time(), time.perf_counter()
            view = merge(open_checkpoint(model / "base"), [read_adapter(model / "adapter")])
            GgufBackend().lower(view, target, calibration, Path(out), SILENT)
            total, wall = time.process_time() - started, time.perf_counter() - started_wall
    finally:
        Library.quantize_chunk = plain  # type: ignore[method-assign]
    return {"kernel_cpu_s": seconds[0], "cpu_s": total, "wall_s": wall,
            "kernel_share": seconds[0] / total, "cores_used": total / wall}  # fmt: skip


def calibrated(model: Path, data: Path, out: Path) -> Calibration:
    """The importance matrix from all of `data`."""
    view = merge(open_checkpoint(model / "base"), [read_adapter(model / "adapter")])
    renderer = Renderer(view.tokenizer)
    samples = [renderer.sample(item) for item in read_items(data)]
    return calibrate(view, samples, out, SILENT, device="cpu", threads=2, dtype="bfloat16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+", metavar="MODEL")
    parser.add_argument("--precision", default="q4_k_m")
    parser.add_argument("--imatrix", type=Path, metavar="DATA")
    parser.add_argument("--results", type=Path)
    arguments = parser.parse_args()
    found: dict[str, Any] = {"precision": arguments.precision, "imatrix": arguments.imatrix is not None, "models": {}}
    for model in arguments.models:
        with tempfile.TemporaryDirectory() as folder:
            calibration = calibrated(model, arguments.imatrix, Path(folder)) if arguments.imatrix else None
            rounds = [lower(model, arguments.precision, calibration) for _ in range(4)][1:]
        found["models"][model.name] = {
            "kernel_share": statistics.median(round["kernel_share"] for round in rounds),
            "cores_used": statistics.median(round["cores_used"] for round in rounds),
            "rounds": rounds,
        }
    print(json.dumps(found, indent=2))
    if arguments.results:
        write_results(arguments.results, {"command": "benchmarks/kernel_share.py", **found})


if __name__ == "__main__":
    main()
