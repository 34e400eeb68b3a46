"""`lora2edge merge` against PEFT's load + merge_and_unload + save_pretrained, whole processes, interleaved.

Usage: python benchmarks/merge_vs_peft.py MODEL [--rounds 5] [--results FILE]

MODEL is a folder of make_checkpoint.py.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

from measure import interleave, summarize, write_results

PEFT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
base, adapter, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
merged.save_pretrained(out)
AutoTokenizer.from_pretrained(base).save_pretrained(out)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--results", type=Path)
    arguments = parser.parse_args()
    base, adapter = str(arguments.model / "base"), str(arguments.model / "adapter")
    with tempfile.TemporaryDirectory() as scratch:
        ours, peer = f"{scratch}/ours", f"{scratch}/peer"

        def clean() -> None:
            for folder in (ours, peer):
                shutil.rmtree(folder, ignore_errors=True)

        chains = {
            "lora2edge": [[sys.executable, "-m", "lora2edge", "merge", "--base", base, "--adapter", adapter,
                           "--out", ours]],
            "peft": [[sys.executable, "-c", PEFT, base, adapter, peer]],
        }  # fmt: skip
        costs = interleave(chains, arguments.rounds, before=clean)
    summary = summarize(costs, "lora2edge", "peft")
    print(json.dumps(summary, indent=2))
    if arguments.results:
        write_results(arguments.results, {"command": "benchmarks/merge_vs_peft.py", **summary}, costs)


if __name__ == "__main__":
    main()
