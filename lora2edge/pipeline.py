"""The stages of a build, each found again in the cache when nothing that determines it has changed."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from lora2edge.adapters import MergedCheckpoint
from lora2edge.artifact import (
    RECORD,
    find_artifact,
    folder_of,
    hashing_ahead,
    is_intact,
    open_artifact,
    read_record,
    write_manifest,
)
from lora2edge.bench.machine import describe, fingerprint
from lora2edge.bench.process import Command
from lora2edge.bench.scenario import LoadPattern
from lora2edge.cache import Cache, now, stage_key
from lora2edge.contracts import AnySample, Progress, SessionOptions
from lora2edge.errors import ProofError
from lora2edge.merge_base import MEASURE
from lora2edge.plan import Plan
from lora2edge.quality import MergeProof, choose_nearest, join_proofs, verify_merge
from lora2edge.stage import run_stage, stage_command
from lora2edge.storage import sweep, write_json
from lora2edge.target import Target
from lora2edge.texts import Texts

_RESULT = "result.json"
_FAST_BFLOAT16 = {"avx512_bf16", "amx_bf16"}
"""Processors that multiply bfloat16 have one of these flags; others are no faster in it than in float32."""
_SLOTS = 4
"""Requests that a session serves together while quality is measured."""


@dataclass(frozen=True, slots=True)
class Finished:
    """A stage's result, and whether it was measured now or found again."""

    result: dict[str, Any]
    path: Path
    """The stage's folder."""
    key: str
    reused: bool
    measured_at: str
    seconds: float
    """What it took when it was measured."""

    def noted(self) -> dict[str, Any]:
        """The result, and when it was measured: for reports."""
        return {**self.result, "reused": self.reused, "measured_at": self.measured_at}


@dataclass(slots=True)
class Pipeline:
    """Runs the stages of one plan and keeps the record of them."""

    plan: Plan
    cache: Cache
    progress: Progress
    record: list[dict[str, Any]] = field(default_factory=list)
    """For the report: name, seconds, reused, measured_at and phases of each stage, in order."""

    def choose_merge_base(self, texts: Texts[Any]) -> dict[str, Any] | None:
        """Settles which base the adapters are merged into, by measuring where that was asked for.

        From then on `plan` has the chosen one. Returns what the report says of it; None where the adapters were not
        trained on a quantized base. The live model is on the base that they were trained on.
        """
        measured = self._measure_bases(texts.calibration) if self.plan.bases.method == MEASURE else None
        if measured:
            self.plan = self.plan.on(measured.result["chosen"])
        bases = self.plan.bases
        if not bases.quantized:
            return None
        return {
            "chosen": self.plan.merge_base,
            "method": bases.method,
            "trained_on": bases.trained_on,
            "measured": measured.noted() if measured else None,
        }

    def _measure_bases(self, samples: list[Any]) -> Finished:
        plan = self.plan
        session = self._session(samples)
        views = {name: plan.on(name).merged for name in plan.bases.candidates}

        def measure(folder: Path) -> dict[str, Any]:
            return choose_nearest(
                lambda: plan.tools.open_live(plan.baseline, session, dtype="float32"),
                {
                    name: partial(plan.tools.open_merged, view, session, dtype="float32", rounded=True)
                    for name, view in views.items()
                },
                samples,
                seed=plan.recipe.seed,
                progress=self.progress,
                runner=plan.tools.runner,
            )

        keys = [view.fingerprint() for view in views.values()]
        parts = [plan.baseline_key, keys, plan.tools.digest(samples), asdict(session), plan.recipe.seed]
        return self._cached("merge-base", parts, measure)

    def prove(self, texts: Texts[Any]) -> Finished:
        """Merged against live adapter, on the calibration text. Raises ProofError."""
        plan, samples = self.plan, texts.calibration
        session = self._session(samples)

        def verify(view: MergedCheckpoint) -> MergeProof:
            try:
                return verify_merge(
                    lambda dtype: plan.tools.open_live(view.ref, session, dtype=dtype),
                    lambda dtype, rounded: plan.tools.open_merged(view, session, dtype=dtype, rounded=rounded),
                    samples,
                    dtype=plan.dtype,
                    progress=self.progress,
                    runner=plan.tools.runner,
                )
            except ProofError as error:
                if len(plan.merged.steps) == 1:
                    raise
                step = f"{error.what}, at {view.adapters[-1].path.name}"
                raise ProofError(error.code, step, why=error.why, hint=error.hint) from error

        def measure(folder: Path) -> dict[str, Any]:
            return join_proofs([verify(view) for view in plan.merged.steps], plan.merged.reference)

        return self._cached("prove", [plan.tools.digest(samples), asdict(session)], measure)

    def calibrate(self, texts: Texts[Any]) -> Finished:
        """The calibration folder: samples, and of a language model the activation statistics of the merged one."""
        plan, samples = self.plan, texts.calibration
        fast = plan.device == "cuda" or _FAST_BFLOAT16 & set(describe()["cpu_flags"])
        dtype = "bfloat16" if plan.dtype == "bfloat16" and fast else "float32"

        def measure(folder: Path) -> dict[str, Any]:
            done = plan.tools.calibrate(
                plan.merged,
                samples,
                folder,
                self.progress,
                device=plan.device,
                threads=plan.threads,
                dtype=dtype,
                layer_inputs=plan.layer_inputs,
            )
            return {
                "items": len(samples),
                "tokens": sum(len(sample.ids) for sample in samples),
                "layer_inputs": plan.layer_inputs,
                **done,
            }

        parts = [plan.tools.digest(samples), plan.device, dtype, plan.layer_inputs]
        return self._cached("calibrate", parts, measure, resumable=True)

    def record_baseline(self, texts: Texts[Any]) -> Finished:
        """Base and baseline on the test text: hidden states, losses, answers; of a classifier its logits."""
        plan, samples = self.plan, texts.test
        session = self._session(samples)
        dtype = "float32" if plan.recipe.dtype == "auto" else plan.recipe.dtype

        def measure(folder: Path) -> dict[str, Any]:
            return plan.tools.record(
                plan.tools.open_live(plan.baseline, session, dtype=dtype),
                lambda: plan.tools.open_live(plan.baseline.alone, session, dtype=dtype),
                samples,
                folder,
                seed=plan.recipe.seed,
                progress=self.progress,
            )

        parts = [plan.baseline_key, plan.tools.digest(samples), asdict(session), dtype, plan.recipe.seed]
        return self._cached("baseline", parts, measure)

    def lower_key(self, target: Target, calibration: Finished | None) -> str:
        """What an artifact of `target` is determined by. Gates and scenarios do not change its files."""
        options = target.model_dump(mode="json", exclude={"gates", "scenarios", "description"})
        digest = calibration.result["digest"] if calibration else None
        return stage_key("lower", self.plan.model_key, self._merge_base(), options, digest)

    def lower(self, target: Target, calibration: Finished | None, folder: Path) -> Finished:
        """The artifact in `folder`, whole; kept where it already is what this plan would write.

        After a kill or an interrupt, the same call goes on with what was finished.
        """
        key = self.lower_key(target, calibration)
        found = find_artifact(folder, key)
        if found is not None and is_intact(found):
            sweep(folder)
            return self._note("lower", _lowered(folder, key, reused=True), target)
        with folder_of(folder, key) as partial:
            request = {
                "stage": "lower",
                "checkpoint": self.plan.merged.ref.to_json(),
                "target": target.model_dump(mode="json"),
                "calibration": str(calibration.path) if calibration else None,
                "out": str(partial),
            }
            with hashing_ahead(self.plan.merged, self.progress) as paced:
                result = run_stage(request, paced, target.python)
            write_manifest(
                partial,
                self.plan.merged,
                target,
                result,
                key=key,
                calibration=calibration.key if calibration else None,
                merge_base=self._merge_base(),
            )
            write_json(partial / RECORD, {**result, "measured_at": now()})
        return self._note("lower", _lowered(folder, key, reused=False), target)

    def measure(self, target: Target, artifact: Path, reference: Finished, texts: Texts[Any]) -> Finished:
        """Quality of the artifact against the recorded baseline."""
        session = asdict(self._session(texts.test))
        request = {
            "stage": "measure",
            "target": target.model_dump(mode="json"),
            "checkpoint": self.plan.merged.ref.to_json(),
            "artifact": str(artifact),
            "reference": str(reference.path),
            "seed": self.plan.recipe.seed,
            "session": session,
        }
        key = [self._identity(artifact), reference.key, session]
        return self._cached("measure", key, lambda _: run_stage(request, self.progress, target.python), target)

    def bench(self, target: Target, artifact: Path, texts: Texts[Any]) -> Finished:
        """Speed of the artifact and of the baseline, interleaved, each in its own process."""
        plan = self.plan
        dtype = plan.dtype if plan.recipe.dtype == "auto" else plan.recipe.dtype
        scenarios = plan.tools.scenarios(target.scenarios)

        def measure(folder: Path) -> dict[str, Any]:
            return {
                "scenarios": {
                    scenario.name: self._bench(
                        target, artifact, scenario, plan.tools.requests(scenario, texts.test), dtype
                    )
                    for scenario in scenarios
                }
            }

        key = [
            self._identity(artifact),
            plan.baseline_key,
            plan.tools.digest(texts.test),
            [scenario.model_dump(mode="json") for scenario in scenarios],
            [fingerprint(), plan.device, plan.threads, dtype],
        ]
        return self._cached("bench", key, measure, target)

    def _bench(
        self, target: Target, artifact: Path, scenario: LoadPattern, requests: list[Any], dtype: str
    ) -> dict[str, Any]:
        """One scenario's figures."""
        plan = self.plan
        session = plan.tools.sized(self._session([]), scenario, requests)
        request = {"stage": "session", "task": plan.merged.task, "session": asdict(session)}
        sides: dict[str, dict[str, Any]] = {
            "baseline": {"checkpoint": plan.baseline.to_json(), "dtype": dtype},
            "artifact": {"artifact": str(artifact), "target": target.model_dump(mode="json")},
        }
        with tempfile.TemporaryDirectory(prefix="lora2edge-") as folder:
            commands = {}
            for name, side in sides.items():
                path = Path(folder) / f"{name}.json"
                path.write_text(json.dumps({**request, "kind": name, **side}), encoding="utf-8")
                commands[name] = Command(tuple(stage_command(path, target.python if name == "artifact" else None)))
            return plan.tools.bench(commands["baseline"], commands["artifact"], requests, scenario, self.progress)

    def _merge_base(self) -> dict[str, Any] | None:
        return self.plan.bases.record(self.plan.merge_base)

    # ------------------------------------------------------------ the record

    def _cached(
        self,
        stage: str,
        parts: list[Any],
        measure: Callable[[Path], dict[str, Any]],
        target: Target | None = None,
        *,
        resumable: bool = False,
    ) -> Finished:
        """The stage's result from the cache, or measured now and kept."""
        key = stage_key(stage, self.plan.model_key, *parts)
        entry = self.cache.find(stage, key)
        if entry is None:
            with self.cache.writing(stage, key, resumable=resumable) as folder:
                write_json(folder / _RESULT, measure(folder))
            entry = self.cache.entry(stage, key)
        result = json.loads((entry.path / _RESULT).read_text(encoding="utf-8"))
        return self._note(
            stage, Finished(result, entry.path, key, entry.reused, entry.measured_at, entry.seconds), target
        )

    def _note(self, stage: str, finished: Finished, target: Target | None) -> Finished:
        self.record.append(
            {
                "name": f"{stage} {target.name}" if target else stage,
                "seconds": round(finished.seconds, 3),
                "reused": finished.reused,
                "measured_at": finished.measured_at,
                "phases": finished.result.get("phases", []),
            }
        )
        return finished

    def _identity(self, artifact: Path) -> list[Any]:
        """What an artifact's figures are keyed by: what it was made from, and what its files hold."""
        manifest = open_artifact(artifact).manifest
        return [manifest.key, dict(manifest.files)]

    def _session(self, samples: Sequence[AnySample]) -> SessionOptions:
        """For running `samples`, and answers to them."""
        longest = max((len(sample.ids) for sample in samples), default=0)
        plan = self.plan
        room = longest + plan.tools.answer_tokens
        return SessionOptions(plan.device, plan.threads, _SLOTS, room, plan.recipe.trust_remote_code)


def _lowered(folder: Path, key: str, *, reused: bool) -> Finished:
    record = read_record(folder)
    return Finished(record, folder, key, reused, record["measured_at"], record["seconds"])
