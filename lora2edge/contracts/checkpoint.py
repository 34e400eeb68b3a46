"""Checkpoints: what is read row by row, plain or merged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    FloatArray = NDArray[np.float32]


Task = Literal["causal-lm", "masked-lm", "seq2seq-lm", "sequence-classification", "token-classification"]
CLASSIFICATIONS: tuple[Task, ...] = ("sequence-classification", "token-classification")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One stored tensor, as its header gives it."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    """As safetensors writes it: "F32", "F16", "BF16", "I64", …"""
    shard: str
    """File name inside the checkpoint folder."""

    @property
    def size(self) -> int:
        """Number of elements."""
        total = 1
        for length in self.shape:
            total *= length
        return total


@dataclass(frozen=True, slots=True)
class StoredBytes:
    """A range of a file that can be copied as it stands."""

    path: Path
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class AdapterRef:
    """An adapter folder and the weight that it is added with."""

    path: str
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class CheckpointRef:
    """Opens the same view in another process: a base folder and the adapters merged into it."""

    base: str
    adapters: tuple[AdapterRef, ...] = ()
    requantized: Mapping[str, Any] | None = None
    """Settings of bitsandbytes where the base's weights are those that 4-bit training on it saw."""
    trust_remote_code: bool = False
    """Whether the user allowed to run the code that the base comes with, in PyTorch."""
    combine: Mapping[str, Any] | None = None
    """How the adapters become one change (`adapters.Combination`); None: their weighted sum."""

    @staticmethod
    def of(base: Path | str, *adapters: Path | str) -> CheckpointRef:
        """A base folder and adapter folders."""
        return CheckpointRef(str(base), tuple(AdapterRef(str(adapter)) for adapter in adapters))

    @property
    def is_combined(self) -> bool:
        """Whether it is more than one adapter as it was trained."""
        return len(self.adapters) > 1 or any(adapter.weight != 1 for adapter in self.adapters)

    @property
    def alone(self) -> CheckpointRef:
        """The same base without adapters."""
        return replace(self, adapters=())

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> CheckpointRef:
        adapters = tuple(AdapterRef(**item) for item in data["adapters"])
        return CheckpointRef(**{**data, "adapters": adapters})


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """Where a checkpoint's tokenizer, chat template and generation config come from.

    An adapter folder wins over the base folder, file by file, and the tokenizer files go together:
    `tokenizer.json` and `tokenizer_config.json` are never mixed from two folders.
    """

    files: Mapping[str, Path] = field(default_factory=dict)
    """File name → path: `tokenizer.json`, `tokenizer_config.json`, `chat_template.jinja`, …"""


class Checkpoint(Protocol):
    """Config, tokenizer and lazy tensors; plain or merged, consumers can't tell which."""

    @property
    def config(self) -> Mapping[str, Any]: ...
    @property
    def tokenizer(self) -> TokenizerFiles: ...
    @property
    def task(self) -> Task: ...
    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Names as in the files, in the files' order."""
        ...

    @property
    def ref(self) -> CheckpointRef: ...

    def rows(self, name: str, start: int, stop: int) -> FloatArray:
        """Rows `start:stop` (along the first axis) of `name`, float32, unrounded; `[stop - start, …]`.

        The array is the caller's own. Safe to call from several threads, as `delta` is. For a tensor whose stored
        dtype is not a float, raises CheckpointError.
        """
        ...

    def delta(self, name: str, start: int, stop: int) -> FloatArray | None:
        """Rows `start:stop` of the change ΔW that adapters make to `name`, float32; None where they make none."""
        ...

    def stored(self, name: str) -> StoredBytes | None:
        """Where the tensor's bytes lie on disk, unchanged; None where the view computes them."""
        ...

    def module_names(self, name: str) -> list[str]:
        """File name → the parameter name(s) of the same weight in transformers 5, which fuses experts."""
        ...

    def close(self) -> None: ...


class Base(Checkpoint, Protocol):
    """A checkpoint that adapters can be merged into: one that lies in a folder, and says what its files hold."""

    @property
    def path(self) -> Path: ...
    @property
    def is_quantized(self) -> bool:
        """Whether weights of it are made from quantized ones."""
        ...

    def fingerprint(self) -> dict[str, Any]:
        """What the cache keys on, JSON-ready: hashes of small files; header, size, mtime and inode of large ones."""
        ...

    def file_hashes(self) -> dict[str, str]:
        """File name → sha256 of every file that is used, weights included."""
        ...
