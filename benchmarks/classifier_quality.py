"""What ONNX Runtime's precisions lose of a classifier, and what each matrix that is kept from int8 is worth.

Usage: python benchmarks/classifier_quality.py FOLDER --work FOLDER [--adapters adapter-1 …] [--results FILE]

FOLDER is what make_classifier.py wrote. Every target is lowered from base + adapter, opened in onnxruntime and compared
with the live adapter in float32 on the test questions. The `kept` targets differ from int8-dynamic and int8-static in
one choice each: which matrices stay in float32. --work keeps what was built.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from measure import write_results

from lora2edge.backends.base import load_backend
from lora2edge.cache import Cache
from lora2edge.calibration import open_calibration
from lora2edge.contracts import SessionOptions
from lora2edge.pipeline import Pipeline
from lora2edge.plan import load_all_texts, plan_build
from lora2edge.progress import SILENT
from lora2edge.recipe import DataFiles, Recipe
from lora2edge.target import Target

PRECISIONS = ("fp32", "int8", "int8-dynamic", "int8-static")
BUILT = ("hf/merged", *PRECISIONS)
"""As `lora2edge build` does them, stage by stage."""
OUTPUT, ATTENTION = "*.output.dense.weight", "*.attention.output.dense.weight"
KEPT: Mapping[str, Mapping[str, int]] = {
    "nothing": {"*": 8},
    "the pooler": {"classifier.weight": 8},
    "the classifier": {"bert.pooler.dense.weight": 8},
    "default, first layer": {"*.layer.0.*": 32},
    "default, last layer": {"*.layer.{last}.*": 32},
    "default, query and key": {"*.query.weight": 32, "*.key.weight": 32},
    "default, value": {"*.value.weight": 32},
    "default, attention output": {ATTENTION: 32},
    "default, feed-forward input": {"*.intermediate.dense.weight": 32},
    "default, feed-forward output": {OUTPUT: 32, ATTENTION: 8},
    "all but feed-forward": {"*": 32, "*.intermediate.dense.weight": 8, OUTPUT: 8, ATTENTION: 32},
    "all but attention": {"*": 32, **{f"*.{name}.weight": 8 for name in ("query", "key", "value")}, ATTENTION: 8},
}
"""Matrices that stay in float32 → `overrides`; the default keeps the pooler and the classifier."""
PERCENTILES = (99.999, 99.99, 99.9)
FIGURES = ("accuracy", "macro_f1", "macro_f1_loss", "flips", "kl_mean", "kl_p99")


def targets(layers: int) -> dict[str, Target]:
    """Every choice that is compared, by what it is called here."""
    chosen: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in PRECISIONS}
    for precision in PRECISIONS[1:]:
        for name, overrides in KEPT.items():
            filled = {pattern.format(last=layers - 1): bits for pattern, bits in overrides.items()}
            if precision != "int8" or name == "nothing":
                chosen[f"{precision}, kept: {name}"] = (precision, {"overrides": filled})
    for share in PERCENTILES:
        chosen[f"int8-static, {share} % of the range"] = ("int8-static", {"percentile": share})
    found = {
        name: Target(
            name=f"t{number}", backend="onnxruntime", precision=precision, device="cpu", options=options, gates={}
        )
        for number, (name, (precision, options)) in enumerate(chosen.items())
    }
    return {"hf/merged": Target(name="merged", backend="hf", precision="stored", gates={}), **found}


def measure(base: Path, adapter: Path, data: Path, work: Path, threads: int) -> dict[str, Any]:
    """Figures of the baseline and of every target, of one adapter."""
    chosen = targets(json.loads((base / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"])
    files = DataFiles(calibration=str(data / "calibration.jsonl"), test=str(data / "test.jsonl"))
    recipe = Recipe(base=str(base), adapter=str(adapter), data=files, threads=threads)
    plan = plan_build(recipe, list(chosen.values()))
    texts = load_all_texts(plan)
    pipeline = Pipeline(plan, Cache(work / "cache"), SILENT)
    proof = pipeline.prove(texts).result
    calibration = pipeline.calibrate(texts)
    recorded = pipeline.record_baseline(texts)
    baseline = recorded.result
    show(adapter.name, baseline)
    found: dict[str, Any] = {}
    longest = max(len(sample.ids) for sample in texts.test)
    for name, target in chosen.items():
        out = work / target.folder
        if name in BUILT:
            out = pipeline.lower(target, calibration, out).path
            quality = pipeline.measure(target, out, recorded, texts).result["quality"]
        else:  # in this process, which is ten times as fast
            backend = load_backend(target.backend)
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir()
            backend.lower(plan.merged, target, open_calibration(calibration.path), out, SILENT)
            session = backend.open(out, target, SessionOptions("cpu", threads, 1, longest))
            quality = plan.tools.measure(session, recorded.path, seed=recipe.seed, progress=SILENT)
            session.close()
        weights = [*out.glob("model.onnx*"), *out.glob("*.safetensors")]
        found[name] = {
            **{figure: quality[figure] for figure in FIGURES},
            "gain_kept": quality["gain_kept"]["value"] if quality["gain_kept"] else None,
            "intervals": quality["intervals"],
            "bytes": sum(path.stat().st_size for path in weights),
        }
        show(name, found[name])
    return {
        "parameters": plan.parameters,
        "calibration_tokens": calibration.result["tokens"],
        "test_texts": quality["items"],
        "merge_logit_error": proof["logit_error"],
        "baseline": {
            figure: baseline[figure] for figure in ("accuracy", "macro_f1", "nll", "gain", "base", "by_class")
        },
        "targets": found,
    }


def show(name: str, figures: Mapping[str, Any]) -> None:
    shown = f"{name:44} accuracy {figures['accuracy']:.2%} macro-F1 {figures['macro_f1']:.2%}"
    if "kl_mean" in figures:
        kept = "-" if figures["gain_kept"] is None else f"{figures['gain_kept']:.2%}"
        shown += (
            f" lost {100 * figures['macro_f1_loss']:5.2f} flips {figures['flips']:.2%} KL {figures['kl_mean']:.1e}"
            f" gain kept {kept} {figures['bytes'] / 1e6:.2f} MB"
        )
    print(shown, flush=True)


def summarize(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over the adapters, and the worst of them, by target."""
    summary: dict[str, Any] = {}
    for name in runs[0]["targets"]:
        each = [run["targets"][name] for run in runs]
        summary[name] = {
            **{figure: statistics.fmean(one[figure] for one in each) for figure in (*FIGURES, "gain_kept", "bytes")},
            "macro_f1_loss_worst": max(one["macro_f1_loss"] for one in each),
            "flips_worst": max(one["flips"] for one in each),
        }
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--adapters", nargs="+", help="by default all in FOLDER")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path)
    arguments = parser.parse_args()
    folder = arguments.folder
    names = arguments.adapters or sorted(path.name for path in folder.glob("adapter-*"))
    runs = {
        name: measure(folder / "base", folder / name, folder / "data", arguments.work / name, arguments.threads)
        for name in names
    }
    summary = summarize(list(runs.values()))
    print(f"\nmeans over {len(runs)} adapters")
    for name, figures in summary.items():
        show(name, figures)
    if arguments.results:
        told = {"command": "benchmarks/classifier_quality.py", "means": summary, "adapters": runs}
        write_results(arguments.results, told)


if __name__ == "__main__":
    main()
