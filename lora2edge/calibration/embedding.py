"""The token embedding of a model that is run: of its rows only those of the tokens that occur are ever read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lora2edge.contracts import Checkpoint

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lora2edge.contracts import FloatArray

    Change = Callable[[NDArray[np.int64], FloatArray], FloatArray]

_NEAR_ROWS = 8
"""Rows of the embedding that lie closer together are read in one go."""
_RUN_ROWS = 1024


class TokenEmbedding:
    """A model's embedding, on the meta device at first; whole or, after `compact`, of the rows that occur."""

    def __init__(
        self, view: Checkpoint, model: Any, homes: Mapping[str, Sequence[str]], ids: Iterable[int], device: str
    ) -> None:
        """`homes`: the parameters that each tensor of the view fills; `ids`: the tokens that will occur."""
        self._view, self._model, self._device = view, model, device
        self.ids = np.unique([*ids])
        """Those that occur, ascending."""
        self._tensor = self._find_tensor(homes)
        self._is_compact = self._is_forgotten = False

    @property
    def can_be_compact(self) -> bool:
        """Whether it is one parameter of a plain embedding, which one tensor of the view fills."""
        return self._tensor is not None

    def compact(self) -> None:
        """Gives the module only the rows that occur; its own code (a factor, a type) goes on working."""
        import torch

        module = self._model.get_input_embeddings()
        rows = torch.from_numpy(self._rows()).to(module.weight.dtype).to(self._device)
        module.weight, module.padding_idx = torch.nn.Parameter(rows, requires_grad=False), None
        known = torch.from_numpy(self.ids).to(self._device)
        module.register_forward_pre_hook(lambda module, given: (self._places(known, given[0]), *given[1:]))
        self._is_compact = True

    def change(self, change: Change) -> None:
        """Other rows for the tokens that occur. `change(ids, rows)`: ids ascending, their rows in the view and those to
        be had, `[ids, hidden]` float32."""
        import torch

        weight = self._model.get_input_embeddings().weight
        rows = torch.from_numpy(change(self.ids, self._rows()))
        with torch.no_grad():
            weight[slice(None) if self._is_compact else torch.from_numpy(self.ids)] = rows.to(weight)

    def forget(self) -> None:
        """Only its shape is wanted any more."""
        import torch

        if self._is_compact and not self._is_forgotten:
            module = self._model.get_input_embeddings()
            module.weight = torch.nn.Parameter(torch.zeros_like(module.weight[:1]), requires_grad=False)
            self._is_forgotten = True

    def _find_tensor(self, homes: Mapping[str, Sequence[str]]) -> str | None:
        """The view's tensor of it; None where it is not one parameter."""
        import torch

        module = self._model.get_input_embeddings()
        path = next((path for path, found in self._model.named_modules() if found is module), None)
        if path is None or not isinstance(module, torch.nn.Embedding):
            return None
        places = dict(self._model.named_parameters(remove_duplicate=False))
        named = [name for name, found in homes.items() if any(places.get(home) is module.weight for home in found)]
        return min(named, key=lambda name: f"{path}.weight" not in homes[name], default=None)

    def _rows(self) -> FloatArray:
        """Of the tokens that occur, as the view has them: `[ids, hidden]` float32."""
        assert self._tensor
        rows = np.empty((len(self.ids), *self._view.tensors[self._tensor].shape[1:]), np.float32)
        for start, stop, wanted in _runs(self.ids):
            values = self._view.rows(self._tensor, int(wanted[0]), int(wanted[-1]) + 1)
            rows[start:stop] = values[wanted - wanted[0]]
        return rows

    def _places(self, known: Any, ids: Any) -> Any:
        """Which of its rows the ids are."""
        import torch

        return torch.zeros_like(ids) if self._is_forgotten else torch.searchsorted(known, ids)


def _runs(ids: NDArray[np.int64]) -> Iterator[tuple[int, int, NDArray[np.int64]]]:
    """Sorted ids in stretches that are worth one read each: where in `ids` they begin and end, and the ids."""
    breaks = np.flatnonzero(np.diff(ids) > _NEAR_ROWS) + 1
    start = 0
    for stop in (*breaks.tolist(), len(ids)):
        while start < stop:
            end = min(stop, start + _RUN_ROWS)
            yield start, end, ids[start:end]
            start = end
