"""What lowers a checkpoint to a runtime's format and opens the result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from lora2edge.contracts.artifact import TensorDamage
from lora2edge.contracts.calibration import Calibration
from lora2edge.contracts.checkpoint import Checkpoint
from lora2edge.contracts.session import Classifier, Session, SessionOptions

if TYPE_CHECKING:
    from lora2edge.target import Target


@dataclass(frozen=True, slots=True)
class Machine:
    """What the plan must know of the machine."""

    cores: int
    ram_bytes: int
    """Available now, not installed."""
    disk_bytes: int
    """Free on the output's file system."""
    cuda: str | None
    """Name of the first GPU, where torch sees one."""
    operations_per_second: float | None = None
    """In float32 matrix products, on all cores; None: measured where it is needed."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a lowering will need, stated in the plan."""

    ram_bytes: int
    disk_bytes: int
    """Of the artifact."""
    seconds: float
    scratch_bytes: int = 0
    """On the disk besides, while it is written."""
    max_length: int | None = None
    """Longest sequence that the artifact can hold, where it is shorter than the checkpoint's."""
    layer_inputs: bool = False
    """Whether the calibration pass has to keep what each layer is given: GPTQ's rounding needs it."""
    notes: tuple[str, ...] = ()


class Progress(Protocol):
    """Where long work says how far it is. Silent in a pipe, a bar on a terminal, JSON lines in a stage process."""

    def start(self, what: str, total: int, unit: str = "") -> None: ...
    def advance(self, amount: int = 1) -> None: ...
    def finish(self) -> None: ...


class Backend(Protocol):
    """Lowers a checkpoint to one runtime's format and opens the result."""

    name: str
    extra: str
    """pip install 'lora2edge[<extra>]'; "" where the core is enough."""

    def check(self, checkpoint: Checkpoint, target: Target, machine: Machine) -> Estimate:
        """What lowering will need. Reads no weight; raises all refusals at once."""
        ...

    def lower(
        self,
        checkpoint: Checkpoint,
        target: Target,
        calibration: Calibration | None,
        out: Path,
        progress: Progress,
    ) -> Lowered:
        """Writes the artifact's files into the existing folder `out` (the caller renames it whole).

        It is empty, or holds what a killed call with equal arguments finished, as `journal.Journal(out)` tells.
        """
        ...

    def open(self, path: Path, target: Target, options: SessionOptions) -> Session | Classifier:
        """Opens the files that `lower` wrote: a Classifier where the checkpoint's task is a classification."""
        ...

    def damage(self, checkpoint: Checkpoint, path: Path, progress: Progress) -> list[TensorDamage]:
        """Reads the finished file back and compares it with the checkpoint, tensor by tensor."""
        ...

    def doctor(self) -> BackendHealth:
        """Whether this backend works here, and why not. Never raises."""
        ...


@runtime_checkable
class Finalizing(Protocol):
    """What a backend may offer besides: work that can only be done on the machine that runs the artifact."""

    def finalize(self, path: Path, target: Target, progress: Progress) -> Mapping[str, Any]:
        """Writes into the artifact's folder what `open` then prefers, with a stamp of what it is for; whole or not at
        all. The artifact's own files stay as they are.

        Returns at least `folder` (where it was written), `size_bytes`, and `reused`: whether it was there already.
        """
        ...


@dataclass(frozen=True, slots=True)
class Lowered:
    """What a lowering has to say for the manifest."""

    versions: Mapping[str, str]
    notes: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class BackendHealth:
    """One line of `lora2edge doctor`."""

    name: str
    works: bool
    detail: str
    """Versions and the kernels' build where it works, the reason where it does not."""
    hint: str = ""
