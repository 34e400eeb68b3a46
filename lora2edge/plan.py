"""The plan of a build: what can be refused is refused here, all at once, in seconds, before a weight is read."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from lora2edge.adapters import Adapter, MergedCheckpoint, merge, read_adapter
from lora2edge.backends.base import load_backend
from lora2edge.bench.machine import available
from lora2edge.bench.scenario import load_scenario
from lora2edge.checkpoint import StoredCheckpoint, open_checkpoint
from lora2edge.contracts import MANIFEST, Estimate, Machine, Manifest
from lora2edge.errors import CheckpointError, InputError, MissingExtraError, OutputError, Refusals, TargetError, refuse
from lora2edge.recipe import Recipe
from lora2edge.target import Target, load_target
from lora2edge.texts import Renderer, Texts, load_calibration, load_texts, read_items

T = TypeVar("T")

ANSWER_TOKENS = 64
"""Room for a generated answer, beside the longest sample."""
_TORCH_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
_WIDTHS = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2}
_MAX_LENGTH = 4096
"""Longest sample that is scored, in tokens; longer ones are left out and counted."""
# Activations, tokenizer, Python and libraries beside the weights, measured on small models.
_OVERHEAD_BYTES = 800 << 20


@dataclass(frozen=True, slots=True)
class Plan:
    """What a build will do."""

    recipe: Recipe
    base: StoredCheckpoint
    adapters: tuple[Adapter, ...]
    merged: MergedCheckpoint
    targets: tuple[Target, ...]
    estimates: dict[str, Estimate]
    machine: Machine
    threads: int
    device: str
    max_length: int
    baseline_seconds: float
    """Estimate for the passes of the baseline over calibration and test text."""

    def check_adapters(self) -> None:
        """Reads the adapters' weights, which the plan does not. Raises AdapterError for NaN and infinity."""
        for adapter in self.adapters:
            adapter.check_finite()

    @property
    def base_path(self) -> str:
        """The base's folder."""
        return self.merged.ref.base

    @property
    def adapter_path(self) -> str | None:
        """The adapter's folder; None where the base is built alone."""
        return self.merged.ref.adapters[0].path if self.merged.ref.adapters else None

    @property
    def model_key(self) -> dict[str, Any]:
        """What determines the merged model: for cache keys."""
        return self.merged.fingerprint()

    @property
    def dtype(self) -> str:
        """The dtype that most of the checkpoint is stored in, as torch names it."""
        sizes: dict[str, int] = {}
        for tensor in self.merged.tensors.values():
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.size
        return _TORCH_DTYPES.get(max(sizes, key=lambda name: sizes[name]), "float32")

    @property
    def size_bytes(self) -> int:
        """The merged checkpoint's tensors as stored."""
        return sum(tensor.size * _WIDTHS.get(tensor.dtype, 1) for tensor in self.merged.tensors.values())

    @property
    def calibration_tokens(self) -> int:
        """The largest budget of the plan's targets: one calibration pass serves them all."""
        return max(target.calibration.tokens for target in self.targets)

    @property
    def parameters(self) -> int:
        """Number of parameters of the merged model."""
        return sum(tensor.size for tensor in self.merged.tensors.values())


def plan_build(
    recipe: Recipe, targets: Sequence[Target] | None = None, *, out: Path | None = None, force: bool = False
) -> Plan:
    """Checks base, adapter, targets, data, machine and output folder. Raises every refusal at once.

    `targets` stand in for those that the recipe names.
    """
    errors: list[InputError] = []
    if targets is None:
        loaded = [_try(errors, partial(load_target, name)) for name in recipe.targets]
        targets = [target for target in loaded if target]
    _check_names(targets, errors)
    for target in targets:
        for name in target.scenarios:
            _try(errors, partial(load_scenario, name))
    if out is not None:
        _try(errors, partial(check_out, out, force=force))
    for path in _data_files(recipe):
        _try(errors, partial(read_items, path))
    if recipe.data is not None:
        _try(errors, _check_torch)
    adapter = _try(errors, partial(read_adapter, recipe.adapter)) if recipe.adapter else None
    base = None
    if recipe.base or adapter or not recipe.adapter:  # an adapter that cannot be read names no base
        base = _try(errors, partial(_open_base, recipe.base, adapter))
    if base is None or (recipe.adapter and adapter is None):
        refuse(errors)
    assert base is not None
    adapters = (adapter,) if adapter else ()
    merged = _try(errors, partial(merge, base, adapters))
    refuse(errors if merged is None else [])
    assert merged is not None
    machine = available(out or Path.cwd())
    estimates = {}
    for target in targets:
        estimate = _try(errors, partial(load_backend(target.backend).check, merged, target, machine))
        if estimate:
            estimates[target.name] = estimate
    _check_memory(merged, recipe, machine, errors)
    _check_disk(estimates, machine, out, errors)
    refuse(errors)
    device = recipe.device if recipe.device != "auto" else ("cuda" if machine.cuda else "cpu")
    return Plan(
        recipe=recipe,
        base=base,
        adapters=adapters,
        merged=merged,
        targets=tuple(targets),
        estimates=estimates,
        machine=machine,
        threads=recipe.threads or machine.cores,
        device=device,
        max_length=-ANSWER_TOKENS
        + min(
            _MAX_LENGTH,
            int(merged.config.get("max_position_embeddings", _MAX_LENGTH)),
            *(estimate.max_length for estimate in estimates.values() if estimate.max_length),
        ),
        baseline_seconds=_baseline_seconds(merged, recipe, targets) if recipe.data is not None else 0.0,
    )


def load_all_texts(plan: Plan) -> Texts:
    """Calibration and test samples of the plan's data."""
    assert plan.recipe.data is not None
    return load_texts(
        plan.recipe.data,
        Renderer(plan.merged.tokenizer),
        max_length=plan.max_length,
        calibration_tokens=plan.calibration_tokens,
        test_tokens=plan.recipe.tokens,
    )


def load_calibration_texts(plan: Plan) -> Texts:
    """All of the data, for the stages that measure nothing on held-out text."""
    assert plan.recipe.data is not None
    return load_calibration(
        plan.recipe.data,
        Renderer(plan.merged.tokenizer),
        max_length=plan.max_length,
        calibration_tokens=plan.calibration_tokens,
    )


def check_out(out: Path, *, force: bool) -> None:
    """Refuses a folder that is not empty and was not written by a build, unless `force`. Raises OutputError."""
    if not _occupied(out) or force:
        return
    if not (out / "recipe.resolved.yaml").exists() and not _holds_artifacts_only(out):
        raise OutputError(
            "out-not-ours",
            f"{out} is not empty and was not written by lora2edge",
            why="its files could be overwritten",
            hint=f"choose an empty folder, or add --force to write into {out}",
        )


def check_replaceable(out: Path, inputs: Sequence[Path], *, force: bool) -> None:
    """The same for a folder that is replaced whole: only an artifact may be, or anything with `force`.

    Never one that an input lies in. Raises OutputError.
    """
    if any(path.resolve().is_relative_to(out.resolve()) for path in inputs):
        raise OutputError(
            "out-is-input",
            f"{out} holds what is read",
            why="it is replaced by what is written",
            hint="choose another folder with --out",
        )
    if _occupied(out) and not force and not _is_artifact(out):
        raise OutputError(
            "out-not-ours",
            f"{out} is not empty and was not written by lora2edge merge",
            why="it would be replaced, with all that is in it",
            hint=f"choose an empty folder, or remove {out} with --force",
        )


def _occupied(out: Path) -> bool:
    """Whether there is anything at `out`. Raises OutputError where it is a file."""
    if out.exists() and not out.is_dir():
        raise OutputError("out-is-file", f"{out} is a file", why="--out names a folder", hint=f"--out {out}.d")
    return out.exists() and any(out.iterdir())


def _holds_artifacts_only(out: Path) -> bool:
    """What `lower` leaves; nothing in its one folder where it failed."""
    if [path.name for path in out.iterdir()] != ["artifacts"]:
        return False
    return all(_is_artifact(path) for path in out.glob("artifacts/*") if not path.name.startswith("."))


def _is_artifact(folder: Path) -> bool:
    try:
        Manifest.from_json((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False
    return True


def _open_base(name: str | None, adapter: Adapter | None) -> StoredCheckpoint:
    """The base that was asked for, or the one that the adapter names, at the revision that it names."""
    if name is not None:
        return open_checkpoint(name)
    named = adapter.base_model_name_or_path if adapter else None
    if adapter is None or named is None:
        raise InputError(
            "no-base",
            "there is no base checkpoint",
            why="neither --base nor the adapter names one",
            hint="--base FOLDER",
        )
    revision = f"@{adapter.revision}" if adapter.revision and not Path(named).is_dir() else ""
    try:
        return open_checkpoint(named + revision)
    except CheckpointError as error:
        if error.code != "no-checkpoint":
            raise
        raise CheckpointError(
            error.code,
            f"the base that the adapter names is not there: {named}{revision}",
            why=error.why,
            hint="say where it is: --base FOLDER",
        ) from error


def _try(errors: list[InputError], action: Callable[[], T]) -> T | None:
    """The action's result; None when it refuses, and the refusal is kept (once: targets share their refusals)."""
    try:
        return action()
    except InputError as error:
        found = error.errors if isinstance(error, Refusals) else (error,)
    known = {str(error) for error in errors}
    errors.extend(error for error in found if str(error) not in known)
    return None


def _check_names(targets: Sequence[Target], errors: list[InputError]) -> None:
    seen: set[str] = set()
    for target in targets:
        if target.folder in seen:
            errors.append(
                TargetError("target-twice", f"two targets are named {target.name}", why="the name is the report's key",
                            hint="give the target file another `name:`")
            )  # fmt: skip
        seen.add(target.folder)


def _data_files(recipe: Recipe) -> list[Path]:
    if recipe.data is None:
        return []
    if isinstance(recipe.data, str):
        return [Path(recipe.data)]
    return [Path(recipe.data.calibration), Path(recipe.data.test)]


def _check_torch() -> None:
    missing = [name for name in ("torch", "transformers", "peft") if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingExtraError(
            "missing-extra",
            f"{', '.join(missing)} is not installed",
            why="the baseline, the merge proof and the importance matrix run in PyTorch",
            hint="pip install 'lora2edge[torch]'",
        )


def _check_memory(merged: MergedCheckpoint, recipe: Recipe, machine: Machine, errors: list[InputError]) -> None:
    """The proof holds one model in float32 at a time, and the record of the other's hidden states."""
    if recipe.data is None:
        return
    needed = 4 * sum(tensor.size for tensor in merged.tensors.values()) + _OVERHEAD_BYTES
    if needed > machine.ram_bytes:
        errors.append(
            InputError(
                "memory",
                f"the merge proof needs {needed / 1e9:.1f} GB of memory, {machine.ram_bytes / 1e9:.1f} GB are free",
                why="it runs the model in float32",
                hint="use a larger machine, or `lora2edge merge` and `lora2edge lower` without --data, which stream",
            )
        )


def _check_disk(estimates: dict[str, Estimate], machine: Machine, out: Path | None, errors: list[InputError]) -> None:
    needed = sum(estimate.disk_bytes for estimate in estimates.values())
    if needed > machine.disk_bytes:
        errors.append(
            OutputError(
                "disk-full",
                f"the artifacts need {needed / 1e6:,.1f} MB, {machine.disk_bytes / 1e6:,.1f} MB are free at {out}",
                why="an artifact is written whole or not at all",
                hint="free space, or choose another disk with --out",
            )
        )


def _baseline_seconds(merged: MergedCheckpoint, recipe: Recipe, targets: Sequence[Target]) -> float:
    """Seconds for the baseline's forward passes, from the multiplications and this machine's measured rate.

    Proof: four passes over the calibration text; importance matrix: one; test text: base and baseline.
    """
    import numpy as np

    block = np.ones((768, 768), np.float32)
    best = float("inf")
    for _ in range(3):
        started = time.perf_counter()
        block @ block
        best = min(best, time.perf_counter() - started)
    rate = 2 * 768**3 / best
    calibration_tokens = max((target.calibration.tokens for target in targets), default=0)
    # Prompts are read as well as scored: a clinical question is about twice as long as its answer.
    tokens = 5 * calibration_tokens + 2 * 3 * recipe.tokens
    weights = sum(tensor.size for tensor in merged.tensors.values())
    return 2.0 * weights * tokens / rate
