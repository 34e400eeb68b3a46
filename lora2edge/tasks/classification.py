"""Sequence and token classifiers: texts have a class each, or words have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from lora2edge.adapters import MergedCheckpoint
from lora2edge.backends.hf import HfClassifier, open_live_classifier, open_merged_classifier
from lora2edge.bench.batches import make_texts
from lora2edge.bench.classify import bench_classifier
from lora2edge.bench.process import Command
from lora2edge.bench.scenario import ClassifyScenario, classify_scenarios
from lora2edge.calibration import store_labelled
from lora2edge.contracts import (
    Checkpoint,
    CheckpointRef,
    Classifier,
    Encoded,
    LabelledSample,
    Progress,
    Session,
    SessionOptions,
)
from lora2edge.errors import UnsupportedError
from lora2edge.quality import CLASSIFIER, measure_classifier, open_classifier_reference, record_classifier
from lora2edge.recipe import DataFiles
from lora2edge.texts import (
    LabelledReader,
    TextEncoder,
    Texts,
    check_classes,
    class_names,
    labelled_digest,
    load_labelled,
    load_labelled_calibration,
    longest_text,
    segment_count,
)

_MAX_LENGTH = 4096
"""Longest text that is scored, in tokens; longer ones are left out and counted."""


class Classification:
    """Implements Tools."""

    runner = CLASSIFIER
    answer_tokens = 0

    def check(self, view: Checkpoint) -> None:
        """Refuses regressions, independent labels, decoders without a padding token, and adapters of several tasks."""
        check_classes(view)
        steps = view.steps if isinstance(view, MergedCheckpoint) else ()
        if other := next((step for step in steps if step.task != view.task), None):
            raise UnsupportedError(
                "combine-tasks",
                f"with {other.adapters[-1].path.name} it is a {other.task} model, with all adapters a {view.task} one",
                why="each step of a sequence is proved on the same texts, and they have no text in common",
                hint="`lora2edge merge` the first adapters into a folder, and build the classifier on that as --base",
            )

    def check_text(self, view: Checkpoint) -> None:
        """There is no template."""

    def check_data(self, view: Checkpoint, path: Path) -> None:
        _reader(view).read(path)

    def room(self, view: Checkpoint) -> int:
        return min(_MAX_LENGTH, longest_text(view) or _MAX_LENGTH)

    def load_texts(
        self,
        data: DataFiles | str,
        view: Checkpoint,
        *,
        max_length: int,
        calibration_tokens: int,
        test_tokens: int | None,
    ) -> Texts[LabelledSample]:
        reader, encoder = _reader(view), TextEncoder(view.tokenizer, segment_count(view))
        how = {"max_length": max_length, "calibration_tokens": calibration_tokens}
        if test_tokens is None:
            return load_labelled_calibration(data, reader, encoder, **how)
        return load_labelled(data, reader, encoder, **how, test_tokens=test_tokens)

    def digest(self, samples: Sequence[LabelledSample]) -> str:
        return labelled_digest(samples)

    def open_live(self, ref: CheckpointRef, options: SessionOptions, *, dtype: str) -> HfClassifier:
        return open_live_classifier(ref, options, dtype=dtype)

    def open_merged(self, view: Checkpoint, options: SessionOptions, *, dtype: str, rounded: bool) -> HfClassifier:
        return open_merged_classifier(view, options, dtype=dtype, rounded=rounded)

    def calibrate(
        self, view: MergedCheckpoint, samples: Sequence[LabelledSample], folder: Path, progress: Progress, **how: Any
    ) -> dict[str, Any]:
        """Keeps the samples: a backend runs them through what it made, and nothing has to be run before."""
        return {"digest": store_labelled(folder, samples).digest, "dtype": None, "experts": None}

    def record(
        self,
        baseline: HfClassifier,
        open_base: Callable[[], HfClassifier],
        samples: Sequence[LabelledSample],
        folder: Path,
        *,
        seed: int,
        progress: Progress,
    ) -> dict[str, Any]:
        return record_classifier(baseline, open_base, samples, folder, seed=seed, progress=progress)

    def measure(
        self, session: Session | Classifier, reference: Path, *, seed: int, progress: Progress
    ) -> dict[str, Any]:
        recorded = open_classifier_reference(reference)
        return measure_classifier(cast("Classifier", session), recorded, seed=seed, progress=progress)

    def scenarios(self, names: Sequence[str]) -> list[ClassifyScenario]:
        return classify_scenarios(names)

    def requests(self, scenario: ClassifyScenario, samples: Sequence[LabelledSample]) -> list[Encoded]:
        return make_texts(scenario, [sample.encoded for sample in samples])

    def sized(self, options: SessionOptions, scenario: ClassifyScenario, requests: Sequence[Encoded]) -> SessionOptions:
        return replace(options, slots=max(scenario.batch_sizes), max_length=max(len(text.ids) for text in requests))

    def bench(
        self,
        baseline: Command,
        artifact: Command,
        requests: Sequence[Encoded],
        scenario: ClassifyScenario,
        progress: Progress,
    ) -> dict[str, Any]:
        return bench_classifier(baseline, artifact, requests, scenario, progress).to_json()


def _reader(view: Checkpoint) -> LabelledReader:
    return LabelledReader(class_names(view.config), view.task)
