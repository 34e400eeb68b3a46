"""Hidden states of a pass on the disk: rows of tokens, batch after batch, without padding."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from lora2edge.calibration.layers import Batch
from lora2edge.journal import GrowingFile


class HiddenStates:
    """A file of them, read in the order in which it was written."""

    def __init__(self, path: Path, dtype: Any, width: int) -> None:
        """`dtype`: torch's, of the file; `width`: values of a row."""
        self._dtype, self._width = dtype, width
        self._handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._offset = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._handle)

    def read(self, batch: Batch) -> Any:
        """`[B, T, width]` of the batch that comes next; zeros where padding is. Raises OSError past the end."""
        import torch

        seen = batch.seen()
        states = torch.zeros(*seen.shape, self._width, dtype=self._dtype)
        states[seen] = self.read_rows(batch.tokens)
        return states

    def read_rows(self, count: int) -> Any:
        """`[count, width]`: the next rows."""
        import torch

        raw = np.empty(count * self._width * self._dtype.itemsize, np.uint8)
        if os.preadv(self._handle, [raw.data], self._offset) != len(raw):
            raise OSError(f"a file of hidden states is too short at {self._offset}")
        self._offset += len(raw)
        return torch.from_numpy(raw).view(self._dtype).view(-1, self._width)


def append_states(file: GrowingFile, states: Any, batch: Batch) -> None:
    """Appends the rows of `states`, `[B, T, width]`, that are tokens."""
    import torch

    rows = states.cpu()[batch.seen()].contiguous()
    file.append(memoryview(rows.view(torch.uint8).numpy()).cast("B"))
