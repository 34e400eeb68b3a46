"""A base with the head that an adapter brings for it, as PEFT expects to find it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lora2edge.contracts import Checkpoint, CheckpointRef, StoredBytes, Task, TensorInfo, TokenizerFiles

if TYPE_CHECKING:
    from lora2edge.contracts import FloatArray


class Headed:
    """Implements contracts.Checkpoint: the merged classifier's tensors, those that the base has from the base."""

    def __init__(self, merged: Checkpoint, base: Checkpoint) -> None:
        self._merged, self._base = merged, base
        self._tensors = {name: base.tensors.get(name, info) for name, info in merged.tensors.items()}

    @property
    def config(self) -> Mapping[str, Any]:
        return self._merged.config

    @property
    def tokenizer(self) -> TokenizerFiles:
        return self._merged.tokenizer

    @property
    def task(self) -> Task:
        return self._merged.task

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    @property
    def ref(self) -> CheckpointRef:
        return self._base.ref

    def rows(self, name: str, start: int, stop: int) -> FloatArray:
        return self._of(name).rows(name, start, stop)

    def delta(self, name: str, start: int, stop: int) -> FloatArray | None:
        return self._of(name).delta(name, start, stop)

    def stored(self, name: str) -> StoredBytes | None:
        return self._of(name).stored(name)

    def module_names(self, name: str) -> list[str]:
        return self._of(name).module_names(name)

    def close(self) -> None:
        self._base.close()

    def _of(self, name: str) -> Checkpoint:
        return self._base if name in self._base.tensors else self._merged
