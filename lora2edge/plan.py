"""The plan of a build: what can be refused is refused here, all at once, in seconds, before a weight is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lora2edge.adapters import Adapter, MergedCheckpoint, merge
from lora2edge.checkpoint import StoredCheckpoint
from lora2edge.contracts import CheckpointRef, Machine
from lora2edge.errors import refuse
from lora2edge.forecast import stored_bytes, stored_dtype
from lora2edge.merge_base import MergeBases
from lora2edge.recipe import Recipe
from lora2edge.survey import survey_build
from lora2edge.target import Target
from lora2edge.tasks import Tools, tools_for
from lora2edge.texts import Texts


@dataclass(frozen=True, slots=True)
class Plan:
    """What a build will do."""

    recipe: Recipe
    base: StoredCheckpoint
    adapters: tuple[Adapter, ...]
    bases: MergeBases
    merged: MergedCheckpoint
    merge_base: str
    """Which of `bases` the adapters are merged into; while that has to be measured, the first."""
    targets: tuple[Target, ...]
    machine: Machine
    threads: int
    device: str
    max_length: int
    layer_inputs: bool
    """Whether a target needs what each layer of the model is given."""

    @property
    def tools(self) -> Tools:
        """What is done in its own way for a model of this task."""
        return tools_for(self.merged.task)

    def check_adapters(self) -> None:
        """Reads the adapters' weights, which the plan does not. Raises AdapterError for NaN and infinity."""
        for adapter in self.adapters:
            adapter.check_finite()

    @property
    def baseline(self) -> CheckpointRef:
        """The live model that everything is measured against: the adapters on the base that they were trained on."""
        trained = self.bases.trained.ref
        return replace(self.merged.ref, base=trained.base, requantized=trained.requantized)

    @property
    def baseline_key(self) -> dict[str, Any]:
        """What determines the live model: for cache keys."""
        return {**self.model_key, "base": self.bases.trained.fingerprint()}

    def on(self, merge_base: str) -> Plan:
        """The same plan with the adapters merged into that one of `bases`."""
        merged = merge(self.bases.candidates[merge_base], self.adapters, self.merged.combination)
        return replace(self, merged=merged, merge_base=merge_base)

    @property
    def model_key(self) -> dict[str, Any]:
        """What determines the merged model: for cache keys."""
        return self.merged.fingerprint()

    @property
    def dtype(self) -> str:
        """The dtype that most of the checkpoint is stored in, as torch names it."""
        return stored_dtype(self.merged)

    @property
    def size_bytes(self) -> int:
        """The merged checkpoint's tensors as stored."""
        return stored_bytes(self.merged)

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
    survey = survey_build(recipe, targets, out=out, force=force)
    refuse(survey.refusals)
    assert survey.base is not None and survey.bases is not None and survey.merged is not None
    tools = tools_for(survey.merged.task)
    bounds = [estimate.max_length for estimate in survey.estimates.values() if estimate.max_length]
    return Plan(
        recipe=recipe,
        base=survey.base,
        adapters=survey.adapters,
        bases=survey.bases,
        merged=survey.merged,
        merge_base=next(iter(survey.bases.candidates)),
        targets=survey.targets,
        machine=survey.machine,
        threads=survey.threads,
        device=survey.device,
        max_length=min([tools.room(survey.merged), *bounds]) - tools.answer_tokens,
        layer_inputs=any(estimate.layer_inputs for estimate in survey.estimates.values()),
    )


def load_all_texts(plan: Plan) -> Texts[Any]:
    """Calibration and test samples of the plan's data."""
    assert plan.recipe.data is not None
    return plan.tools.load_texts(
        plan.recipe.data,
        plan.merged,
        max_length=plan.max_length,
        calibration_tokens=plan.calibration_tokens,
        test_tokens=plan.recipe.tokens,
    )


def load_calibration_texts(plan: Plan) -> Texts[Any]:
    """All of the data, for the stages that measure nothing on held-out text."""
    assert plan.recipe.data is not None
    return plan.tools.load_texts(
        plan.recipe.data,
        plan.merged,
        max_length=plan.max_length,
        calibration_tokens=plan.calibration_tokens,
        test_tokens=None,
    )
