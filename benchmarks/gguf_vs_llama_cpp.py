"""Adapter → Q4_K_M: `lora2edge lower` against PEFT merge + convert_hf_to_gguf + llama-quantize, interleaved.

Usage: python benchmarks/gguf_vs_llama_cpp.py MODEL --llama-cpp SOURCE --tools BIN [--imatrix DATA] [--rounds 3]

MODEL is a folder of make_checkpoint.py, SOURCE a llama.cpp source tree, BIN the folder of build_peers.sh.
With --imatrix, both sides compute an importance matrix: ours on the rendered DATA (JSONL), llama-imatrix on the same
rendered text in chunks of 512 tokens.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

from measure import interleave, summarize, write_results
from merge_vs_peft import PEFT

TARGET = "name: bench/q4_k_m\nbackend: gguf\nprecision: q4_k_m\noptions: {{rounding: llama.cpp, imatrix: {imatrix}}}\n"


def rendered_text(base: Path, data: Path) -> str:
    """The calibration text as the chat template renders it."""
    from lora2edge.checkpoint import open_checkpoint
    from lora2edge.texts import Renderer, read_items

    renderer = Renderer(open_checkpoint(base).tokenizer)
    return "".join(renderer.decode(list(renderer.sample(item).ids)) for item in read_items(data))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--llama-cpp", type=Path, required=True)
    parser.add_argument("--tools", type=Path, required=True)
    parser.add_argument("--imatrix", type=Path, metavar="DATA")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--results", type=Path)
    arguments = parser.parse_args()
    base, adapter = str(arguments.model / "base"), str(arguments.model / "adapter")
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        target = scratch / "target.yaml"
        target.write_text(TARGET.format(imatrix=str(bool(arguments.imatrix)).lower()), encoding="utf-8")

        def clean() -> None:
            for name in ("ours", "peer", "cache"):
                shutil.rmtree(scratch / name, ignore_errors=True)
            for file in scratch.glob("*.gguf"):
                file.unlink()

        lower = [sys.executable, "-m", "lora2edge", "lower", "--base", base, "--adapter", adapter,
                 "--out", str(scratch / "ours")]  # fmt: skip
        f16, quantized, matrix = (str(scratch / f"{name}.gguf") for name in ("f16", "q4_k_m", "imatrix"))
        convert = [
            [sys.executable, "-c", PEFT, base, adapter, str(scratch / "peer")],
            [sys.executable, str(arguments.llama_cpp / "convert_hf_to_gguf.py"), str(scratch / "peer"),
             "--outtype", "bf16", "--outfile", f16],
        ]  # fmt: skip
        quantize = str(arguments.tools / "llama-quantize")
        if arguments.imatrix:
            text = scratch / "text.txt"
            text.write_text(rendered_text(arguments.model / "base", arguments.imatrix), encoding="utf-8")
            ours = [["env", f"LORA2EDGE_CACHE={scratch / 'cache'}", *lower, "--target", str(target),
                     "--data", str(arguments.imatrix)]]  # fmt: skip
            peer = [
                *convert,
                [str(arguments.tools / "llama-imatrix"), "-m", f16, "-f", str(text), "-o", matrix, "-c", "512",
                 "--no-ppl", "-t", "2", "--parse-special"],
                [quantize, "--imatrix", matrix, f16, quantized, "Q4_K_M", "2"],
            ]  # fmt: skip
        else:
            ours = [[*lower, "--target", str(target)]]
            peer = [*convert, [quantize, f16, quantized, "Q4_K_M", "2"]]
        costs = interleave({"lora2edge": ours, "llama.cpp": peer}, arguments.rounds, before=clean)
    summary = summarize(costs, "lora2edge", "llama.cpp")
    print(json.dumps(summary, indent=2))
    if arguments.results:
        write_results(arguments.results, {"command": "benchmarks/gguf_vs_llama_cpp.py", **summary}, costs)


if __name__ == "__main__":
    main()
