"""Whether the base that `--merge-base measure` chooses on its probe prompts is the better one on held-out prompts.

Usage: python benchmarks/qlora_base.py [--seeds 1 2 3] [--quant-type nf4] [--adapters FOLDER] [--results FILE]

Tunes the medical example on its base in 4 bits with bitsandbytes, once per seed (examples/medical/tune.py; about 7
minutes each on one core), then compares the adapter merged into the original and into the dequantized base with the
live adapter on the quantized base: on the calibration set, where `measure` looks, and on the test set.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

from measure import write_results

from lora2edge.backends.hf import open_baseline, open_merged
from lora2edge.contracts import SessionOptions
from lora2edge.plan import load_all_texts, plan_build
from lora2edge.progress import SILENT
from lora2edge.quality import choose_nearest
from lora2edge.quality.divergence import sample_nll
from lora2edge.recipe import QuantizedTraining, Recipe
from lora2edge.target import load_target

MEDICAL = Path(__file__).parent.parent / "examples" / "medical"


def compare(adapter: Path, quant_type: Any, threads: int) -> dict[str, Any]:
    """`measure`'s figures on the probe prompts and on held-out ones, and the loss of the quantized base alone."""
    recipe = Recipe(
        base=str(MEDICAL / "base"),
        adapter=str(adapter),
        trained_on=QuantizedTraining(quant_type=quant_type, double_quant=True, dtype="bfloat16", kernel="cpu"),
        data={"calibration": str(MEDICAL / "data/calibration.jsonl"), "test": str(MEDICAL / "data/test.jsonl")},
    )
    plan = plan_build(recipe, [load_target("hf/merged")])
    texts = load_all_texts(plan)
    options = SessionOptions("cpu", threads=threads, slots=4, max_length=1024)
    views = {name: plan.on(name).merged for name in plan.bases.candidates}
    found = {
        name: choose_nearest(
            lambda: open_baseline(plan.baseline, options, dtype="float32"),
            {base: partial(open_merged, view, options, dtype="float32", rounded=True) for base, view in views.items()},
            samples,
            seed=0,
            progress=SILENT,
        )
        for name, samples in (("probe", texts.calibration), ("held_out", texts.test))
    }
    base = open_baseline(plan.baseline.alone, options, dtype="float32")
    ids = [sample.ids[:-1] for sample in texts.test]
    losses = sample_nll(base.logits(ids, [list(sample.positions) for sample in texts.test]), texts.test)
    base.close()
    tokens = sum(len(sample.positions) for sample in texts.test)
    return {**found, "base_nll_held_out": float(losses.sum() / tokens)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--quant-type", choices=["nf4", "fp4"], default="nf4")
    parser.add_argument("--adapters", type=Path, default=Path("qlora"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    runs = []
    for seed in options.seeds:
        adapter = options.adapters / f"{options.quant_type}-{seed}"
        if not (adapter / "adapter_config.json").is_file():
            tune = [sys.executable, MEDICAL / "tune.py", "--load-in-4bit", options.quant_type, "--seed", seed]
            subprocess.run([*map(str, tune), "--out", str(adapter)], check=True)
        run = {"seed": seed, **compare(adapter, options.quant_type, options.threads)}
        runs.append(run)
        for where in ("probe", "held_out"):
            print(f"seed {seed}, {where}: {run[where]['chosen']}")
            for name, figures in run[where]["candidates"].items():
                kl, nll = figures["kl_mean"], figures["nll"]
                print(f"  {name}: KL {kl['value']:.2e} [{kl['low']:.2e}, {kl['high']:.2e}], NLL {nll['value']:.4f}")
    agreed = sum(run["probe"]["chosen"] == run["held_out"]["chosen"] for run in runs)
    print(f"the same base on both texts: {agreed} of {len(runs)}")
    if options.results:
        write_results(options.results, {"quant_type": options.quant_type, "runs": runs, "agreed": agreed})


if __name__ == "__main__":
    main()
