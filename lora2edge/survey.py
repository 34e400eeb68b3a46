"""What can be told of a build from headers alone: what it would do and need, and everything that would refuse it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from lora2edge.adapters import Adapter, Combination, MergedCheckpoint, merge, read_adapter
from lora2edge.adapters.kinds.boft import Butterfly
from lora2edge.backends.base import load_backend
from lora2edge.bench.machine import available
from lora2edge.bench.scenario import load_scenario
from lora2edge.checkpoint import StoredCheckpoint, open_checkpoint
from lora2edge.contracts import AdapterRef, Estimate, Machine
from lora2edge.errors import (
    AdapterError,
    CheckpointError,
    InputError,
    MissingExtraError,
    OutputError,
    Refusals,
    TargetError,
    UnsupportedError,
)
from lora2edge.forecast import (
    StageForecast,
    find_coverage,
    find_delta,
    forecast_choice,
    forecast_stages,
    match_base,
    operations_per_second,
    proof_bytes,
)
from lora2edge.merge_base import MEASURE, MergeBases, find_bases
from lora2edge.output import check_out
from lora2edge.recipe import Recipe
from lora2edge.target import Target, load_target
from lora2edge.tasks import tools_for

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Survey:
    """All that can be told of a build before it runs, whether or not it is refused. Known from headers alone."""

    recipe: Recipe
    targets: tuple[Target, ...]
    machine: Machine
    base: StoredCheckpoint | None = None
    """None, as the next two, where it could not be opened."""
    adapters: tuple[Adapter, ...] = ()
    bases: MergeBases | None = None
    """None also where it is not known what the adapter was trained on."""
    merged: MergedCheckpoint | None = None
    """On the first of `bases`; None also where the adapter does not fit it."""
    estimates: Mapping[str, Estimate] = field(default_factory=dict)
    """By the names of the targets that can be lowered."""
    errors: tuple[InputError, ...] = ()
    """What refuses the whole build."""
    refused: Mapping[str, tuple[InputError, ...]] = field(default_factory=dict)
    """Target name → what refuses it."""

    @property
    def refusals(self) -> list[InputError]:
        """Everything that refuses the build, each told once: targets share some."""
        told = {str(error): error for error in self.errors}
        for errors in self.refused.values():
            told.update({str(error): error for error in errors if str(error) not in told})
        return list(told.values())

    @property
    def stages(self) -> list[StageForecast]:
        """What each stage will need; empty where there is no merged view."""
        if self.merged is None:
            return []
        code = own_code(self.merged.config)
        rate = operations_per_second(self.machine)
        stages = forecast_stages(self.merged, self.targets, self.estimates, self.recipe, rate, code)
        if self.bases and self.bases.method == MEASURE:
            stages.insert(1, forecast_choice(self.merged, len(self.bases.candidates), rate))
        return stages

    @property
    def device(self) -> str:
        if self.recipe.device != "auto":
            return self.recipe.device
        return "cuda" if self.machine.cuda else "cpu"

    @property
    def threads(self) -> int:
        return self.recipe.threads or self.machine.cores

    def describe_adapters(self) -> list[dict[str, Any]]:
        """Kind, rank, reach, size and fit of each adapter, JSON-ready; what needs the merged view, where there is one.

        Reads headers, and the tokenizer's ids.
        """
        described = []
        for index, adapter in enumerate(self.adapters):
            facts = {**adapter.describe(), "weight": adapter.weight}
            if self.merged is not None:
                facts["coverage"] = asdict(find_coverage(self.merged.root, adapter, self.merged.touched[index]))
                facts["delta"] = asdict(find_delta(self.merged, adapter, self.merged.touched[index]))
                facts["match"] = match_base(self.merged, adapter, self.recipe.base)
            described.append(facts)
        return described


def survey_build(
    recipe: Recipe,
    targets: Sequence[Target] | None = None,
    *,
    out: Path | None = None,
    force: bool = False,
    machine: Machine | None = None,
) -> Survey:
    """The same checks, with the refusals beside what could be found out. Reads headers only; raises nothing for them.

    `machine`: what to plan for; None: this one.
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
    if recipe.data is not None:
        _try(errors, _check_torch)
    machine = machine or available(out or Path.cwd())
    refs = _try(errors, lambda: recipe.adapters)
    combination = _try(errors, partial(Combination.from_json, recipe.combination))
    found = [_try(errors, partial(_read_weighted, ref)) for ref in refs or ()]
    adapters = tuple(adapter for adapter in found if adapter)
    complete = refs is not None and len(adapters) == len(refs)
    base = None
    if recipe.base or adapters or complete:  # an adapter that cannot be read names no base
        base = _try(errors, partial(_open_base, recipe, adapters, combination))
    bases = merged = None
    if base is not None and complete and combination is not None:
        bases = _try(errors, partial(find_bases, recipe, base, adapters))
    if bases is not None:
        merged = _try(errors, partial(merge, next(iter(bases.candidates.values())), adapters, combination))
    if recipe.data is not None and (view := merged or base) is not None:
        tools = tools_for(view.task)
        for path in _data_files(recipe):
            _try(errors, partial(tools.check_data, view, path))
    survey = Survey(recipe, tuple(targets), machine, base, adapters, bases, merged, errors=tuple(errors))
    return survey if merged is None else _survey_targets(survey, merged, out)


def _survey_targets(survey: Survey, merged: MergedCheckpoint, out: Path | None) -> Survey:
    """What the backends and the machine say to it."""
    errors, estimates, refused = list(survey.errors), {}, {}
    tools = tools_for(merged.task)
    _try(errors, partial(tools.check_text, merged))
    for target in survey.targets:
        own: list[InputError] = []
        estimate = _try(own, partial(load_backend(target.backend).check, merged, target, survey.machine))
        if estimate:
            estimates[target.name] = estimate
        else:
            refused[target.name] = tuple(own)
    if survey.recipe.data is not None:
        if not survey.recipe.trust_remote_code:
            _try(errors, partial(check_code, merged.config))
        _try(errors, partial(tools.check, merged))
        if survey.machine.cuda is None:
            _try(errors, partial(check_butterflies, survey.adapters))
        _check_memory(merged, survey.machine, errors)
    _check_disk(estimates, survey.machine, out, errors, with_text=survey.recipe.data is not None)
    return replace(survey, estimates=estimates, errors=tuple(errors), refused=refused)


def check_code(config: Mapping[str, Any]) -> None:
    """Refuses to run a model that comes with code of its own, and that transformers does not know.

    Merging and lowering go by names and shapes and need none of it.
    """
    if code := own_code(config):
        raise UnsupportedError(
            "custom-code",
            f"the base is run by code of its own, {code}",
            why="merge proof, importance matrix and quality would have to run it",
            hint="--trust-remote-code, where you trust it; `lora2edge merge` and `lora2edge lower` without --data go "
            "by the tensors' names and run no code",
        )


def check_butterflies(adapters: Sequence[Adapter]) -> None:
    """Refuses to measure a BOFT of several factors without a GPU: PEFT cannot load it, so there is no baseline."""
    for adapter in adapters:
        for part in adapter.parts.values():
            if isinstance(part, Butterfly) and part.factors > 1:
                raise UnsupportedError(
                    "boft-needs-cuda",
                    f"PEFT loads a BOFT of {part.factors} factors on CUDA only",
                    why="the live adapter is what the merge is proved against, and everything measured against",
                    hint="build on a machine with a GPU; `lora2edge merge` and `lower` without --data need none",
                )


def own_code(config: Mapping[str, Any]) -> str | None:
    """The class in the checkpoint's own code that runs the model; None where transformers has one for it."""
    code = config.get("auto_map")
    kind = str(config.get("model_type"))
    if not isinstance(code, Mapping) or _is_known(kind):
        return None
    return next((str(value) for key, value in code.items() if key.startswith("AutoModel")), kind)


def _is_known(kind: str) -> bool:
    """Whether the installed transformers has a model of this type; looked up without importing it."""
    spec = importlib.util.find_spec("transformers")
    places = spec.submodule_search_locations if spec else None
    return any((Path(place) / "models" / kind).is_dir() for place in places or ())


def _read_weighted(ref: AdapterRef) -> Adapter:
    return replace(read_adapter(ref.path), weight=ref.weight)


def _open_base(recipe: Recipe, adapters: Sequence[Adapter], combination: Combination | None) -> StoredCheckpoint:
    """The base that was asked for, or the one that the adapters name, at the revision that they name."""
    if recipe.base is not None:
        return open_checkpoint(recipe.base, trust_remote_code=recipe.trust_remote_code)
    if combination and combination.method != "sequence":
        _check_one_base(adapters)
    adapter = adapters[0] if adapters else None
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
        return open_checkpoint(named + revision, trust_remote_code=recipe.trust_remote_code)
    except CheckpointError as error:
        if error.code != "no-checkpoint":
            raise
        raise CheckpointError(
            error.code,
            f"the base that the adapter names is not there: {named}{revision}",
            why=error.why,
            hint="say where it is: --base FOLDER",
        ) from error


def _check_one_base(adapters: Sequence[Adapter]) -> None:
    names = {(adapter.base_model_name_or_path, adapter.revision): adapter for adapter in adapters}
    if len(names) > 1:
        first, second = list(names.values())[:2]
        raise AdapterError(
            "combine-bases",
            f"{first.path.name} names the base {first.base_model_name_or_path}, {second.path.name} "
            f"{second.base_model_name_or_path}",
            why="changes of different bases do not add up; where it is one base under two names, say which",
            hint="--base FOLDER; --combine sequence where the second was trained on the first's result",
        )


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


def _check_memory(merged: MergedCheckpoint, machine: Machine, errors: list[InputError]) -> None:
    """The proof holds one model in float32 at a time, and the record of the other's hidden states."""
    needed = proof_bytes(merged)
    if needed > machine.ram_bytes:
        errors.append(
            InputError(
                "memory",
                f"the merge proof needs {needed / 1e9:.1f} GB of memory, {machine.ram_bytes / 1e9:.1f} GB are free",
                why="it runs the model in float32",
                hint="use a larger machine, or `lora2edge merge` and `lora2edge lower` without --data, which stream",
            )
        )


def _check_disk(
    estimates: dict[str, Estimate], machine: Machine, out: Path | None, errors: list[InputError], *, with_text: bool
) -> None:
    """Without text nothing is calibrated, and what is rounded without that needs no more disk than its file."""
    needed = sum(estimate.disk_bytes for estimate in estimates.values())
    if with_text:
        needed += max((estimate.scratch_bytes for estimate in estimates.values()), default=0)
    if needed > machine.disk_bytes:
        errors.append(
            OutputError(
                "disk-full",
                f"the artifacts need {needed / 1e6:,.1f} MB, {machine.disk_bytes / 1e6:,.1f} MB are free at "
                f"{out or Path.cwd()}",
                why="an artifact is written whole or not at all; with GPTQ, its tensors wait in other files before",
                hint="free space, or choose another disk with --out",
            )
        )
