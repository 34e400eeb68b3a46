"""How much of a lowering's CPU time is spent inside llama.cpp's quantization kernels.

Usage: python benchmarks/kernel_share.py MODEL [--precision q4_k_m]

MODEL is a folder of make_checkpoint.py. Counts the CPU time of each worker thread while it is in
`ggml_quantize_chunk`, against that of the whole process from opening the checkpoint to the finished file.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from lora2edge.adapters import merge, read_adapter
from lora2edge.backends.gguf import GgufBackend
from lora2edge.backends.gguf.llama_cpp import Library
from lora2edge.checkpoint import open_checkpoint
from lora2edge.progress import SILENT
from lora2edge.target import Target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--precision", default="q4_k_m")
    arguments = parser.parse_args()
    seconds, lock = [0.0], threading.Lock()
    plain = Library.quantize_chunk

    def timed(self: Library, *values: Any, **named: Any) -> int:
        started = time.thread_time()
        written = plain(self, *values, **named)
        with lock:
            seconds[0] += time.thread_time() - started
        return written

    Library.quantize_chunk = timed  # type: ignore[method-assign]
    target = Target(name="bench", backend="gguf", precision=arguments.precision, options={"imatrix": False})
    with tempfile.TemporaryDirectory() as out:
        started, started_wall = time.process_time(), time.perf_counter()
        view = merge(open_checkpoint(arguments.model / "base"), [read_adapter(arguments.model / "adapter")])
        GgufBackend().lower(view, target, None, Path(out), SILENT)
        total, wall = time.process_time() - started, time.perf_counter() - started_wall
    print(json.dumps({"precision": arguments.precision, "kernel_cpu_s": seconds[0], "cpu_s": total, "wall_s": wall,
                      "kernel_share": seconds[0] / total, "cores_used": total / wall}))  # fmt: skip


if __name__ == "__main__":
    main()
