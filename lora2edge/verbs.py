"""Each stage as a verb of its own: merge, lower, measure, bench, inspect."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lora2edge.adapters import read_adapter
from lora2edge.artifact import is_intact, lower_here, open_artifact
from lora2edge.backends.base import load_backend
from lora2edge.bench.machine import describe
from lora2edge.build import describe_plan, survey_whole
from lora2edge.cache import Cache
from lora2edge.checkpoint import open_checkpoint
from lora2edge.contracts import Artifact, Finalizing, Progress
from lora2edge.errors import InputError, UnsupportedError, refuse
from lora2edge.forecast import compare_names
from lora2edge.merge_base import as_built, refuse_unmeasured, same_choice
from lora2edge.output import check_replaceable
from lora2edge.pipeline import Finished, Pipeline
from lora2edge.plan import Plan, load_all_texts, load_calibration_texts, plan_build
from lora2edge.quality import judge
from lora2edge.recipe import Recipe, load_recipe
from lora2edge.storage import alone_in
from lora2edge.target import Target, load_target


def merge_to(recipe: Recipe, out: Path, *, prove: bool, force: bool, progress: Progress) -> dict[str, Any]:
    """Writes the merged checkpoint to the folder `out`, whole or not at all.

    With `prove`, the merge is first compared with the live adapter on the recipe's data. Raises ProofError.
    """
    if prove and recipe.data is None:
        raise InputError("no-data", "--prove needs text", why="it compares on it", hint="--prove --data FILE.jsonl")
    plan = plan_build(recipe, [load_target("hf/merged")], out=out, force=True)
    plan.check_adapters()
    if recipe.data is None:
        refuse_unmeasured(plan.bases)
    check_replaceable(out, [plan.base.path, *(adapter.path for adapter in plan.adapters)], force=force)
    named = [compare_names(plan.merged, adapter, recipe.base) for adapter in plan.adapters]
    result: dict[str, Any] = {
        "out": str(out),
        "task": plan.merged.task,
        "tensors": len(plan.merged.tensors),
        "named_bases": named,
    }
    if recipe.data is not None:
        pipeline, texts = Pipeline(plan, Cache(), progress), load_calibration_texts(plan)
        result["merge_base"] = pipeline.choose_merge_base(texts)
        plan = pipeline.plan
        if prove:
            result["merge"] = pipeline.prove(texts).result
    lower_here(plan.merged, plan.targets[0], None, out, progress, plan.bases.record(plan.merge_base))
    checks = plan.merged.checks  # of the rows that this run computed; others passed in the run before
    return {**result, "adapted": len(plan.merged.adapted), "worst_formula_error": max(checks.values(), default=0.0)}


def lower_all(recipe: Recipe, *, force: bool, progress: Progress) -> list[dict[str, Any]]:
    """Writes each target's artifact under `recipe.out`; nothing is proved or measured."""
    if not recipe.out or not recipe.targets:
        raise InputError("missing-option", "--out and --target must be given", hint="lora2edge lower --help")
    out = Path(recipe.out)
    plan = plan_build(recipe, out=out, force=force)
    plan.check_adapters()
    pipeline, calibration = Pipeline(plan, Cache(), progress), None
    if recipe.data is None:
        refuse_unmeasured(plan.bases)
    with alone_in(out):
        if recipe.data is not None:
            texts = load_calibration_texts(plan)
            pipeline.choose_merge_base(texts)
            calibration = pipeline.calibrate(texts)
        return [_lower_one(pipeline, target, calibration, out) for target in plan.targets]


def _lower_one(pipeline: Pipeline, target: Target, calibration: Finished | None, out: Path) -> dict[str, Any]:
    folder = out / "artifacts" / target.folder
    lowered = pipeline.lower(target, calibration, folder)
    return {
        "target": target.name,
        "artifact": str(folder),
        "size_bytes": open_artifact(folder).size_bytes,
        "reused": lowered.reused,
        **{name: lowered.result[name] for name in ("seconds", "cpu_seconds", "peak_rss_bytes")},
    }


def measure_artifact(path: Path, options: dict[str, Any], *, progress: Progress) -> dict[str, Any]:
    """Quality of the artifact in `path`, and the verdict of its target's gates."""
    artifact, plan = _plan_for(path, options)
    (target,) = plan.targets
    pipeline, texts = Pipeline(plan, Cache(), progress), load_all_texts(plan)
    reference = pipeline.record_baseline(texts)
    measured = pipeline.measure(target, artifact.path, reference, texts)
    gates, verdict = judge(target, measured.result["quality"])
    return {
        "artifact": str(path),
        "task": plan.merged.task,
        "target": target.name,
        "verdict": verdict,
        "gates": gates,
        "quality": measured.result["quality"],
        "facts": measured.result["facts"],
        "baseline": reference.result,
        "size_bytes": artifact.size_bytes,
        "reused": measured.reused,
        "measured_at": measured.measured_at,
    }


def bench_artifact(path: Path, options: dict[str, Any], scenarios: list[str], *, progress: Progress) -> dict[str, Any]:
    """Speed of the artifact in `path` beside its baseline's."""
    artifact, plan = _plan_for(path, options, scenarios)
    (target,) = plan.targets
    measured = Pipeline(plan, Cache(), progress).bench(target, artifact.path, load_all_texts(plan))
    return {
        "artifact": str(path),
        "task": plan.merged.task,
        "target": target.name,
        "scenarios": measured.result["scenarios"],
        "machine": describe(),
        "reused": measured.reused,
        "measured_at": measured.measured_at,
    }


def finalize_artifact(path: Path, *, progress: Progress) -> dict[str, Any]:
    """Prepares the artifact in `path` for the machine that this runs on; what that means, its backend knows.

    Raises UnsupportedError, code `nothing-to-finalize`, for backends whose artifacts run everywhere as they are.
    """
    artifact = open_artifact(path)
    manifest = artifact.manifest
    backend = load_backend(manifest.backend)
    if not isinstance(backend, Finalizing):
        raise UnsupportedError(
            "nothing-to-finalize",
            f"{path} is ready as it is",
            why=f"artifacts of the backend {manifest.backend} hold nothing that depends on the machine",
        )
    if not is_intact(artifact):
        raise _changed(path)
    result = backend.finalize(path, Target.model_validate(dict(manifest.options)), progress)
    return {"artifact": str(path), "target": manifest.target, **result}


def inspect(path: Path, base: str | None = None) -> dict[str, Any]:
    """What the folder `path` holds: an artifact, an adapter or a checkpoint. Reads no weight.

    Of an adapter also the plan of building it, where its base is at hand: `base`, or a folder that it names. Raises
    InputError where `base` cannot be opened; what else would refuse a build, the plan tells.
    """
    if (path / "manifest.json").exists():
        artifact = open_artifact(path)
        manifest = artifact.manifest
        return {
            "kind": "artifact",
            "target": manifest.target,
            "backend": manifest.backend,
            "task": manifest.task,
            "size_bytes": artifact.size_bytes,
            "files": dict(manifest.files),
            "versions": dict(manifest.versions),
            "notes": dict(manifest.notes),
        }
    if (path / "adapter_config.json").exists():
        adapter = read_adapter(path)
        facts = adapter.describe()
        named = adapter.base_model_name_or_path
        at_hand = base or (named if named and Path(named).is_dir() else None)
        survey = survey_whole(Recipe(base=at_hand, adapter=str(path))) if at_hand else None
        if base and survey and survey.base is None:
            refuse(survey.refusals)
        plan = describe_plan(survey) if survey else None
        return {**facts, "kind": "adapter", "method": facts["kind"], "base": named, "plan": plan}
    checkpoint = open_checkpoint(path)
    dtypes: dict[str, int] = {}
    for tensor in checkpoint.tensors.values():
        dtypes[tensor.dtype] = dtypes.get(tensor.dtype, 0) + 1
    return {
        "kind": "checkpoint",
        "architecture": (checkpoint.config.get("architectures") or ["?"])[0],
        "task": checkpoint.task,
        "parameters": sum(tensor.size for tensor in checkpoint.tensors.values()),
        "tensors": len(checkpoint.tensors),
        "dtypes": dtypes,
        "files": sorted(checkpoint.tokenizer.files),
    }


def _plan_for(path: Path, options: dict[str, Any], scenarios: list[str] | None = None) -> tuple[Artifact, Plan]:
    """The artifact and a plan for it: base, adapter and data from its build's recipe, where none are given."""
    artifact = open_artifact(path)
    resolved = path.resolve().parent.parent / "recipe.resolved.yaml"
    made_from = artifact.manifest.inputs
    recipe = as_built(load_recipe(resolved if resolved.exists() else None, options), made_from.get("merge_base"))
    if recipe.data is None:
        raise InputError(
            "no-data", "there is no text to measure on", why=f"{resolved} does not exist", hint="--data FILE.jsonl"
        )
    if not is_intact(artifact):
        raise _changed(path)
    stored = dict(artifact.manifest.options)
    stored["scenarios"] = scenarios or stored["scenarios"] or ["chat"]
    target = Target.model_validate(stored)
    plan = plan_build(recipe, [target])
    if not same_choice(made_from.get("merge_base"), plan.bases.record(plan.merge_base)):
        raise InputError(
            "other-model",
            f"{path} was built for an adapter with another base of its training",
            why=f"its manifest says {made_from.get('merge_base')}",
            hint="--trained-on as it was given then, or leave it out",
        )
    if (made_from["model"], made_from.get("combined")) != (plan.merged.file_hashes(), plan.merged.combined):
        raise InputError(
            "other-model",
            f"{path} was made from another base or adapter, or from the adapters combined otherwise",
            why="its manifest has other sha256 of their files, or other weights, method or seed",
            hint="name the ones that it was made from, as they were named then: --base DIR --adapter DIR[=WEIGHT]",
        )
    return artifact, plan


def _changed(path: Path) -> InputError:
    return InputError(
        "artifact-changed",
        f"{path} does not hold what its manifest says",
        why="the sha256 of a file differs: it was damaged or changed since it was built",
        hint="build it again",
    )
