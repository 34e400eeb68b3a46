"""THE flow: from base + adapter to measured artifacts and a report."""

from __future__ import annotations

import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lora2edge import __version__
from lora2edge.adapters import Adapter, MergedCheckpoint
from lora2edge.artifact import find_artifact, open_artifact
from lora2edge.bench.machine import describe
from lora2edge.cache import Cache, now
from lora2edge.contracts import Checkpoint, Progress
from lora2edge.errors import EXIT_GATE, EXIT_INCONCLUSIVE, EXIT_OK, InputError, Lora2EdgeError, ProofError
from lora2edge.forecast import stored_bytes, stored_dtype
from lora2edge.pipeline import Finished, Pipeline
from lora2edge.plan import Plan, load_all_texts, plan_build
from lora2edge.progress import SILENT
from lora2edge.quality import judge
from lora2edge.recipe import Recipe, dump_recipe
from lora2edge.report import REPORTS, write_report
from lora2edge.storage import alone_in, write_atomic
from lora2edge.survey import Survey, survey_build
from lora2edge.target import Target, load_target
from lora2edge.texts import Texts

REPORT_SCHEMA = 1
PLANNED = ("hf/merged", "gguf/q4_k_m")
"""Targets that a plan is made for where none is named."""


@dataclass(frozen=True, slots=True)
class BuildResult:
    """What a build came to."""

    out: Path
    report: dict[str, Any]
    exit_code: int


def build(
    recipe: Recipe,
    *,
    progress: Progress = SILENT,
    cache: Cache | None = None,
    force: bool = False,
    bench: bool = True,
    strict: bool = False,
) -> BuildResult:
    """Merges, proves, lowers, measures and reports. Raises InputError for bad input and ProofError for a bad merge."""
    started, started_at = time.monotonic(), now()
    plan, out = plan_whole(recipe, force=force)
    plan.check_adapters()
    texts = load_all_texts(plan)
    pipeline = Pipeline(plan, cache or Cache(), progress)
    with alone_in(out):
        for name in REPORTS:  # an earlier build's would stand beside this one's recipe
            (out / name).unlink(missing_ok=True)
        write_atomic(out / "recipe.resolved.yaml", dump_recipe(recipe))

        merge_base = pipeline.choose_merge_base(texts)
        plan = pipeline.plan
        try:
            proof = pipeline.prove(texts)
        except ProofError:
            for target in plan.targets:  # what an earlier build left is not this merge's
                _reject(out / "artifacts" / target.folder)
            raise
        calibration = pipeline.calibrate(texts)
        reference = pipeline.record_baseline(texts)
        targets = {}
        for target in plan.targets:  # one that fails does not stop the others
            try:
                targets[target.name] = _build_target(target, pipeline, calibration, reference, texts, out, bench)
            except Lora2EdgeError as error:
                targets[target.name] = {"verdict": "fail", "error": {**error.as_dict(), "exit_code": error.exit_code}}
                _withdraw(out, target, pipeline.lower_key(target, calibration))

        report = {
            "schema": REPORT_SCHEMA,
            "task": plan.merged.task,
            "lora2edge": __version__,
            **_verdict(targets, strict),
            "command": shlex.join(["lora2edge", *sys.argv[1:]]),
            "started_at": started_at,
            "machine": describe(),
            "inputs": _with_experts(describe_inputs(plan, texts), calibration),
            "merge_base": merge_base,
            "merge": proof.noted(),
            "baseline": reference.noted(),
            "targets": targets,
            "stages": pipeline.record,
            "seconds": round(time.monotonic() - started, 3),
        }
        write_report(report, out)
    return BuildResult(out, report, report["exit_code"])


def _with_experts(inputs: dict[str, Any], calibration: Finished) -> dict[str, Any]:
    """What the calibration text covers of a mixture of experts, where the model is one."""
    if experts := calibration.result["experts"]:
        data = inputs["data"]
        inputs["data"] = {**data, "calibration": {**data["calibration"], "experts": experts}}
    return inputs


def plan_whole(recipe: Recipe, *, force: bool = False) -> tuple[Plan, Path]:
    """The plan of a build of all stages, and its output folder. Raises what is missing, else every refusal at once."""
    given = (("--out", recipe.out), ("--target", recipe.targets), ("--data", recipe.data))
    missing = [name for name, value in given if not value]
    if missing or recipe.out is None:
        raise InputError(
            "missing-option",
            f"{' and '.join(missing)} must be given, on the command line or in the recipe",
            why="merge proof, importance matrix and quality are measured on the data; `lora2edge merge` and "
            "`lora2edge lower` do without",
            hint="lora2edge build --base B --adapter A --target gguf/q4_k_m --data FILE.jsonl --out OUT",
        )
    out = Path(recipe.out)
    return plan_build(recipe, out=out, force=force), out


def _build_target(
    target: Target,
    pipeline: Pipeline,
    calibration: Finished,
    reference: Finished,
    texts: Texts[Any],
    out: Path,
    bench: bool,
) -> dict[str, Any]:
    """Lowers and measures one target; the artifact gets its final name only when no gate was missed."""
    final = out / "artifacts" / target.folder
    rejected = final.with_name(f"{target.folder}.rejected")
    waiting = _waiting(final)
    key = pipeline.lower_key(target, calibration)
    place = next((folder for folder in (final, rejected) if find_artifact(folder, key)), waiting)
    lowered = pipeline.lower(target, calibration, place)
    measured = pipeline.measure(target, place, reference, texts)
    quality = measured.result["quality"]
    gates, verdict = judge(target, quality)
    speed, speed_reason = None, "--no-bench was given"
    if bench:
        try:
            speed, speed_reason = pipeline.bench(target, place, texts), ""
        except Lora2EdgeError as error:  # a speed that cannot be measured takes nothing from the quality
            speed_reason = f"{error.what}: {error.why}"

    chosen = rejected if verdict == "fail" else final
    if place != chosen:
        for old in {final, rejected, waiting} - {place}:
            shutil.rmtree(old, ignore_errors=True)
        place.rename(chosen)
    size_bytes = open_artifact(chosen).size_bytes
    speeds = speed.result["scenarios"] if speed else {}
    first = next(iter(speeds.values()), None)
    return {
        "verdict": verdict,
        "gates": gates,
        "quality": quality,
        "speed": first,
        "speed_reason": speed_reason,
        "scenarios": speeds,
        "size_bytes": size_bytes,
        "size_ratio": pipeline.plan.size_bytes / size_bytes,
        "peak_rss_bytes": first["peak_rss_bytes"] if first else None,
        "lowering": {key: lowered.result[key] for key in ("seconds", "cpu_seconds", "peak_rss_bytes", "notes")},
        "tokenizer": lowered.result["notes"].get("tokenizer"),
        "damage": measured.result["damage"],
        "artifact": str(chosen.relative_to(out)),
        "facts": measured.result["facts"],
        "reused": {"lower": lowered.reused, "quality": measured.reused, "speed": bool(speed and speed.reused)},
        "measured_at": {
            "lower": lowered.measured_at,
            "quality": measured.measured_at,
            "speed": speed.measured_at if speed else None,
        },
    }


def _withdraw(out: Path, target: Target, key: str) -> None:
    """Takes the final name from an artifact that this build could not measure, or that an earlier build left there."""
    final = out / "artifacts" / target.folder
    waiting = _waiting(final)
    if find_artifact(final, key) and not waiting.exists():
        final.rename(waiting)
    else:
        shutil.rmtree(final, ignore_errors=True)


def _reject(final: Path) -> None:
    """Takes the final name from an artifact of an earlier build."""
    if final.exists():
        rejected = final.with_name(f"{final.name}.rejected")
        shutil.rmtree(rejected, ignore_errors=True)
        final.rename(rejected)


def _waiting(final: Path) -> Path:
    """Where an artifact waits until it is measured."""
    return final.with_name(f".{final.name}.unmeasured")


def survey_whole(recipe: Recipe, *, force: bool = False) -> Survey:
    """What `--plan` tells of a build: of `PLANNED` where the recipe names no target, and with or without data."""
    targets = None if recipe.targets else [load_target(name) for name in PLANNED]
    return survey_build(recipe, targets, out=Path(recipe.out) if recipe.out else None, force=force)


def describe_plan(survey: Survey) -> dict[str, Any]:
    """The plan, JSON-ready: what would be done, what it needs, and what would be refused and why."""
    view = survey.merged or survey.base
    return {
        "inputs": _inputs(survey.recipe, view, survey.adapters, None) if view else None,
        "adapters": survey.describe_adapters(),
        "merge_base": _describe_bases(survey),
        "machine": asdict(survey.machine),
        "threads": survey.threads,
        "device": survey.device,
        "stages": [{**asdict(stage), "fits": stage.ram_bytes <= survey.machine.ram_bytes} for stage in survey.stages],
        "targets": {name: asdict(estimate) for name, estimate in survey.estimates.items()},
        "refused": {
            "build": [error.as_dict() for error in survey.errors],
            "targets": {name: [error.as_dict() for error in errors] for name, errors in survey.refused.items()},
        },
    }


def _describe_bases(survey: Survey) -> dict[str, Any] | None:
    """How the base of the merge is chosen; None where there is nothing to choose."""
    bases = survey.bases
    if bases is None or not bases.quantized:
        return None
    return {"method": bases.method, "candidates": list(bases.candidates), "trained_on": bases.trained_on}


def describe_inputs(plan: Plan, texts: Texts[Any] | None) -> dict[str, Any]:
    """What the build was made from, for the report."""
    return _inputs(plan.recipe, plan.merged, plan.adapters, texts)


def _inputs(recipe: Recipe, view: Checkpoint, adapters: Sequence[Adapter], texts: Texts[Any] | None) -> dict[str, Any]:
    return {
        "base": {
            "name": recipe.base or (adapters[0].base_model_name_or_path if adapters else None),
            "architecture": (view.config.get("architectures") or ["?"])[0],
            "parameters": sum(tensor.size for tensor in view.tensors.values()),
            "dtype": stored_dtype(view),
            "size_bytes": stored_bytes(view),
        },
        "adapters": [{**adapter.describe(), "weight": adapter.weight} for adapter in adapters],
        "combine": view.combination.to_json() if isinstance(view, MergedCheckpoint) and len(adapters) > 1 else None,
        "data": texts.notes if texts else None,
    }


def _verdict(targets: dict[str, dict[str, Any]], strict: bool) -> dict[str, Any]:
    """The build's verdict and exit code from its targets'."""
    verdicts = {target["verdict"] for target in targets.values()}
    codes = {target["error"]["exit_code"] for target in targets.values() if "error" in target}
    if "fail" in verdicts:
        gate_missed = any(t["verdict"] == "fail" and "error" not in t for t in targets.values())
        return {"verdict": "fail", "exit_code": EXIT_GATE if gate_missed or not codes else max(codes)}
    if "inconclusive" in verdicts:
        return {"verdict": "inconclusive", "exit_code": EXIT_INCONCLUSIVE if strict else EXIT_OK}
    return {"verdict": "pass", "exit_code": EXIT_OK}
