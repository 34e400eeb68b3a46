"""What ONNX Runtime's precisions lose of a decoder: KL, flips, gain kept and accuracy of each, on the same test text.

Usage: python benchmarks/onnx_quality.py BASE ADAPTER CALIBRATION TEST --work FOLDER [--results FILE]

Each target is lowered from base + adapter, opened in onnxruntime and compared with the live adapter in float32.
int4 comes rounded to nearest and with GPTQ, with an output layer of 4, 8 and 16 bits. Ratios and differences of GPTQ
against nearest are paired by test sample; intervals are of 95 %. FOLDER keeps what was built.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from measure import write_results
from quality import Measured

from lora2edge.backends.base import load_backend
from lora2edge.contracts import SessionOptions
from lora2edge.quality.divergence import Divergence
from lora2edge.recipe import DataFiles
from lora2edge.target import Target
from lora2edge.tasks.language import ANSWER_TOKENS


def targets(block: int) -> list[Target]:
    """Every precision that is compared."""
    found = {name: (name, {}) for name in ("fp32", "int8", "int8-dynamic")}
    for rounding in ("nearest", "gptq"):
        for head in (4, 8, 16):
            found[f"int4-{rounding}-head{head}"] = ("int4", {"rounding": rounding, "head_bits": head, "block": block})
    return [
        Target(name=name, backend="onnxruntime", precision=precision, device="cpu", options=options)
        for name, (precision, options) in found.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("base", "adapter", "calibration", "test"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--block", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path)
    arguments = parser.parse_args()
    chosen = targets(arguments.block)
    data = DataFiles(calibration=str(arguments.calibration), test=str(arguments.test))
    bench = Measured(arguments.base, arguments.adapter, data, chosen, arguments.work, arguments.threads)
    longest = max(len(sample.ids) for sample in bench.texts.test) + ANSWER_TOKENS
    options = SessionOptions("cpu", arguments.threads, 1, longest)

    found: dict[str, Any] = {
        "command": "benchmarks/onnx_quality.py",
        "block": arguments.block,
        "parameters": bench.plan.parameters,
        "calibration_tokens": bench.calibration.result["tokens"],
        "gain": bench.gain,
        "baseline_accuracy": bench.recorded.result["accuracy"],
        "targets": {},
        "gptq_against_nearest": {},
    }
    divergences: dict[str, Divergence] = {}
    for target in chosen:
        lowered = bench.lower(target)
        session: Any = load_backend(target.backend).open(lowered.path, target, options)
        try:
            divergences[target.name] = bench.divergence(session)
        finally:
            session.close()
        measured = bench.pipeline.measure(target, lowered.path, bench.recorded, bench.texts)
        figures = bench.figures(divergences[target.name])
        found["targets"][target.name] = {
            **figures,
            "accuracy": measured.result["quality"]["accuracy"],
            "bytes": sum(path.stat().st_size for path in lowered.path.glob("model.onnx*")),
            "lowering": {key: lowered.result[key] for key in ("seconds", "cpu_seconds", "peak_rss_bytes")},
        }
        kept, right = figures["gain_kept"], measured.result["quality"]["accuracy"]
        print(
            f"{target.name:22} KL {figures['kl_mean']['value']:.2e} flips {figures['flips']['value']:.2%}"
            f" gain kept {kept['value']:.2%} [{kept['low']:.2%}, {kept['high']:.2%}]"
            + (f" accuracy {right:.1%}" if right is not None else ""),
            flush=True,
        )
    for head in (4, 8, 16):
        ours, peer = (divergences[f"int4-{rounding}-head{head}"] for rounding in ("gptq", "nearest"))
        found["gptq_against_nearest"][f"head{head}"] = compared = bench.compared(ours, peer)
        ratio = compared["kl_ratio"]
        print(f"head {head}: KL ratio {ratio['value']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]")
    found["test_tokens"] = divergences["fp32"].positions
    if arguments.results:
        write_results(arguments.results, found)


if __name__ == "__main__":
    main()
