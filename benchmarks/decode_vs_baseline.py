"""Decode speed and TTFT of Q4_K_M against PyTorch + live adapter, at one and at two threads.

Usage: python benchmarks/decode_vs_baseline.py MODEL --data FILE.jsonl [--library prebuilt|native] [--threads 1 2]

MODEL is a folder of make_checkpoint.py. Runs `lora2edge lower` once, then `lora2edge bench` for each number of
threads: baseline and artifact interleaved, each in its own process, same token ids and lengths, greedy.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

TARGET = "name: bench/q4_k_m\nbackend: gguf\nprecision: q4_k_m\noptions: {{imatrix: false, library: {library}}}\n"
SCENARIO = "prompt_tokens: 64\nnew_tokens: 32\nconcurrency: [1]\nrequests: 2\nrounds: 5\nmax_seconds: 300\n"


def lora2edge(*arguments: str) -> Any:
    """The JSON that the command prints."""
    command = [sys.executable, "-m", "lora2edge", *arguments, "--json"]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--library", choices=["prebuilt", "native"], default="prebuilt")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--results", type=Path)
    arguments = parser.parse_args()
    model = ["--base", str(arguments.model / "base"), "--adapter", str(arguments.model / "adapter")]
    results: dict[str, Any] = {"command": "benchmarks/decode_vs_baseline.py", "library": arguments.library}
    with tempfile.TemporaryDirectory() as folder:
        target, scenario = Path(folder) / "target.yaml", Path(folder) / "long.yaml"
        target.write_text(TARGET.format(library=arguments.library), encoding="utf-8")
        scenario.write_text(SCENARIO, encoding="utf-8")
        out = f"{folder}/out"
        (artifact,) = lora2edge("lower", *model, "--target", str(target), "--out", out)
        for threads in arguments.threads:
            result = lora2edge(
                "bench", artifact["artifact"], *model, "--data", str(arguments.data), "--threads", str(threads),
                "--scenario", str(scenario),
            )  # fmt: skip
            (speed,) = result["scenarios"].values()
            results[f"{threads} threads"] = speed
            rates = f"{speed['baseline']['decode_tps']:.1f} to {speed['decode_tps']:.1f} tokens/s"
            print(f"{threads} threads: decode {speed['decode_ratio']}, {rates}, TTFT {speed['ttft_ratio']}", flush=True)
            results["machine"] = result["machine"]
    if arguments.results:
        arguments.results.parent.mkdir(parents=True, exist_ok=True)
        arguments.results.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
