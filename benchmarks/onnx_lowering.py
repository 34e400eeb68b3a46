"""Adapter → int4 ONNX: `lora2edge lower` against onnxruntime-genai's builder on the merged checkpoint, interleaved.

Usage: python benchmarks/onnx_lowering.py MODEL [--rounds 3] [--alone] [--results FILE]

MODEL is a folder of make_checkpoint.py. Both sides round to nearest in blocks of 128, output layer too, so that it is
the same work; the builder gets the checkpoint already merged, which costs it nothing here. With --alone only ours is
run. Calibration and GPTQ are in rounding_costs.py.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from measure import interleave, summarize, write_results

TARGET = """name: bench/int4
backend: onnxruntime
precision: int4
device: cpu
options: {rounding: nearest, block: 128, head_bits: 4, embedding_bits: 4}
"""
OPTIONS = ("block_size=128", "accuracy_level=4", "op_types_to_quantize=MatMul/Gather", "shared_embeddings=true",
           "prune_lm_head=true")  # fmt: skip
"""The builder's best on a CPU."""


def builder(merged: Path, out: Path, cache: Path, *more: str) -> list[str]:
    """The builder's command."""
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-p", "int4", "-e", "cpu"]
    return [*command, "-i", str(merged), "-o", str(out), "-c", str(cache), "--extra_options", *OPTIONS, *more]


def merge(model: Path, out: Path) -> None:
    """The merged checkpoint, for the builder."""
    command = [sys.executable, "-m", "lora2edge", "merge", "--base", model / "base", "--adapter", model / "adapter"]
    subprocess.run([*map(str, command), "--out", str(out)], check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--alone", action="store_true")
    parser.add_argument("--results", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        target = scratch / "target.yaml"
        target.write_text(TARGET, encoding="utf-8")
        base, adapter = str(arguments.model / "base"), str(arguments.model / "adapter")
        chains = {
            "lora2edge": [
                ["rm", "-rf", str(scratch / "ours")],
                [sys.executable, "-m", "lora2edge", "lower", "--base", base, "--adapter", adapter,
                 "--target", str(target), "--out", str(scratch / "ours")]
            ]
        }  # fmt: skip
        if not arguments.alone:
            merge(arguments.model, scratch / "merged")
            peer, cache = scratch / "peer", scratch / "cache"
            chains["genai builder"] = [
                ["rm", "-rf", str(peer), str(cache)],
                builder(scratch / "merged", peer, cache),
            ]

        costs = interleave(chains, arguments.rounds)
        sizes = {
            name: sum(file.stat().st_size for file in place.rglob("model.onnx*"))
            for name, place in (("lora2edge", scratch / "ours"), ("genai builder", scratch / "peer"))
        }
    other = "lora2edge" if arguments.alone else "genai builder"
    summary = {**summarize(costs, "lora2edge", other), "file_bytes": sizes}
    print(json.dumps(summary, indent=2))
    if arguments.results:
        write_results(arguments.results, {"command": "benchmarks/onnx_lowering.py", **summary}, costs)


if __name__ == "__main__":
    main()
