"""Language models: texts are conversations, scored over the tokens of the responses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from lora2edge.adapters import MergedCheckpoint
from lora2edge.backends.hf import HfSession, open_baseline, open_merged
from lora2edge.bench.interleave import bench
from lora2edge.bench.process import Command
from lora2edge.bench.scenario import Scenario, context_needed, language_scenarios, make_requests
from lora2edge.calibration import calibrate
from lora2edge.contracts import Checkpoint, CheckpointRef, Classifier, Progress, Sample, Session, SessionOptions
from lora2edge.errors import UnsupportedError
from lora2edge.quality import measure_quality, open_reference, record_reference
from lora2edge.quality.states import LANGUAGE
from lora2edge.recipe import DataFiles
from lora2edge.texts import (
    Renderer,
    Texts,
    check_template,
    load_calibration,
    load_texts,
    read_items,
    samples_digest,
)

ANSWER_TOKENS = 64
"""Room for a generated answer, beside the longest sample."""
_MAX_LENGTH = 4096
"""Longest sample that is scored, in tokens; longer ones are left out and counted."""


class Language:
    """Implements Tools."""

    runner = LANGUAGE
    answer_tokens = ANSWER_TOKENS

    def check(self, view: Checkpoint) -> None:
        """Refuses to measure what does not continue a text. Merging and lowering to safetensors need no task."""
        if view.task != "causal-lm":
            raise UnsupportedError(
                "task",
                f"{view.task} models cannot be measured yet",
                why="merge proof, importance matrix and quality are taken over a response's tokens, or over classes",
                hint="`lora2edge merge` without --prove writes the merged checkpoint",
            )

    def check_text(self, view: Checkpoint) -> None:
        check_template(view.tokenizer)

    def check_data(self, view: Checkpoint, path: Path) -> None:
        read_items(path)

    def room(self, view: Checkpoint) -> int:
        return min(_MAX_LENGTH, int(view.config.get("max_position_embeddings", _MAX_LENGTH)))

    def load_texts(
        self,
        data: DataFiles | str,
        view: Checkpoint,
        *,
        max_length: int,
        calibration_tokens: int,
        test_tokens: int | None,
    ) -> Texts[Sample]:
        renderer = Renderer(view.tokenizer)
        if test_tokens is None:
            return load_calibration(data, renderer, max_length=max_length, calibration_tokens=calibration_tokens)
        return load_texts(
            data, renderer, max_length=max_length, calibration_tokens=calibration_tokens, test_tokens=test_tokens
        )

    def digest(self, samples: Sequence[Sample]) -> str:
        return samples_digest(samples)

    def open_live(self, ref: CheckpointRef, options: SessionOptions, *, dtype: str) -> HfSession:
        return open_baseline(ref, options, dtype=dtype)

    def open_merged(self, view: Checkpoint, options: SessionOptions, *, dtype: str, rounded: bool) -> HfSession:
        return open_merged(view, options, dtype=dtype, rounded=rounded)

    def calibrate(
        self, view: MergedCheckpoint, samples: Sequence[Sample], folder: Path, progress: Progress, **how: Any
    ) -> dict[str, Any]:
        done = calibrate(view, samples, folder, progress, **how)
        return {"digest": done.digest, "dtype": how["dtype"], "experts": done.experts()}

    def record(
        self,
        baseline: HfSession,
        open_base: Callable[[], HfSession],
        samples: Sequence[Sample],
        folder: Path,
        *,
        seed: int,
        progress: Progress,
    ) -> dict[str, Any]:
        return record_reference(baseline, open_base, samples, folder, seed=seed, progress=progress)

    def measure(
        self, session: Session | Classifier, reference: Path, *, seed: int, progress: Progress
    ) -> dict[str, Any]:
        recorded = open_reference(reference)
        return measure_quality(cast("Session", session), recorded, seed=seed, progress=progress)

    def scenarios(self, names: Sequence[str]) -> list[Scenario]:
        return language_scenarios(names)

    def requests(self, scenario: Scenario, samples: Sequence[Sample]) -> list[list[int]]:
        return make_requests(scenario, [sample.ids[: sample.prompt_length] for sample in samples])

    def sized(self, options: SessionOptions, scenario: Scenario, requests: Sequence[Sequence[int]]) -> SessionOptions:
        return replace(options, slots=scenario.slots, max_length=context_needed(scenario, requests))

    def bench(
        self,
        baseline: Command,
        artifact: Command,
        requests: Sequence[Sequence[int]],
        scenario: Scenario,
        progress: Progress,
    ) -> dict[str, Any]:
        return bench(baseline, artifact, requests, scenario, progress).to_json()
