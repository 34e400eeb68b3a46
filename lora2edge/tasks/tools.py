"""What a build needs to know how to do with a checkpoint, whatever its task. Samples are the task's own kind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from lora2edge.adapters import MergedCheckpoint
from lora2edge.bench.process import Command
from lora2edge.contracts import Checkpoint, CheckpointRef, Classifier, Progress, Session, SessionOptions
from lora2edge.quality.states import Runner
from lora2edge.recipe import DataFiles
from lora2edge.texts import Texts


class Tools(Protocol):
    """Implemented for language models and for classifiers."""

    runner: Runner
    """How samples are run through a session, for the merge proof and the choice of a base."""

    def check(self, view: Checkpoint) -> None:
        """Raises InputError for a checkpoint that cannot be proved and measured. Reads no weight."""
        ...

    def check_text(self, view: Checkpoint) -> None:
        """Raises InputError for a tokenizer or template that no text can be made ready with."""
        ...

    def check_data(self, view: Checkpoint, path: Path) -> None:
        """Reads a file of the user's. Raises DataError."""
        ...

    def room(self, view: Checkpoint) -> int:
        """Most tokens that a session's slot of this model holds."""
        ...

    @property
    def answer_tokens(self) -> int:
        """Room in a slot beside the longest sample."""
        ...

    def load_texts(
        self,
        data: DataFiles | str,
        view: Checkpoint,
        *,
        max_length: int,
        calibration_tokens: int,
        test_tokens: int | None,
    ) -> Texts[Any]:
        """Calibration and test samples; all of the data as calibration samples where `test_tokens` is None."""
        ...

    def digest(self, samples: Sequence[Any]) -> str:
        """sha256 over samples: what figures over them are keyed by."""
        ...

    def open_live(self, ref: CheckpointRef, options: SessionOptions, *, dtype: str) -> Session | Classifier:
        """The base folder in PyTorch with the adapters live on it."""
        ...

    def open_merged(
        self, view: Checkpoint, options: SessionOptions, *, dtype: str, rounded: bool
    ) -> Session | Classifier:
        """A view in PyTorch; nothing is written."""
        ...

    def calibrate(
        self, view: MergedCheckpoint, samples: Sequence[Any], folder: Path, progress: Progress, **how: Any
    ) -> dict[str, Any]:
        """Writes the calibration into `folder`; `digest`, `experts` and `dtype` of it, JSON-ready."""
        ...

    def record(
        self,
        baseline: Any,
        open_base: Callable[[], Any],
        samples: Sequence[Any],
        folder: Path,
        *,
        seed: int,
        progress: Progress,
    ) -> dict[str, Any]:
        """Measures baseline and base into `folder`."""
        ...

    def measure(
        self, session: Session | Classifier, reference: Path, *, seed: int, progress: Progress
    ) -> dict[str, Any]:
        """Quality of the artifact against the recorded baseline."""
        ...

    def scenarios(self, names: Sequence[str]) -> list[Any]:
        """The load patterns of a target that suit this task."""
        ...

    def requests(self, scenario: Any, samples: Sequence[Any]) -> list[Any]:
        """What `scenario` sends, made from test samples."""
        ...

    def sized(self, options: SessionOptions, scenario: Any, requests: Sequence[Any]) -> SessionOptions:
        """`options` with the slots and their length that `requests` need."""
        ...

    def bench(
        self, baseline: Command, artifact: Command, requests: Sequence[Any], scenario: Any, progress: Progress
    ) -> dict[str, Any]:
        """One scenario's figures, JSON-ready."""
        ...
