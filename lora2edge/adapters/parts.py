"""What an adapter does to one parameter of the model, whatever its kind."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from lora2edge.contracts import FloatArray


class Part(Protocol):
    """One parameter's change, known from the adapter's header and configuration. Holds no weight."""

    @property
    def module(self) -> str:
        """Path of the module in the model, e.g. `model.layers.0.self_attn.q_proj`."""
        ...

    @property
    def parameter(self) -> str:
        """Name of the parameter in the module: `weight`, `bias`, …"""
        ...

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of the adapter's tensors that it uses: each tensor belongs to at least one part."""
        ...

    def misfit(self, shape: tuple[int, ...]) -> str | None:
        """Why it does not fit a parameter of `shape`, or None.

        `shape` is PEFT's: `[out, in]` for a linear layer, whichever way round the checkpoint stores it.
        """
        ...

    def load(self) -> Update:
        """Reads its tensors. Called once for a while of use, not once per slab."""
        ...


class Update(Protocol):
    """A part with its tensors in memory. Safe to call from several threads."""

    def apply(self, rows: FloatArray, start: int, stop: int) -> FloatArray:
        """Rows `start:stop` of the merged parameter from those of the unmerged one.

        `rows`: `[stop - start, …]` float32 in PEFT's orientation (rows are outputs), all columns; the caller's own
        array, which may be overwritten and returned. The result is float32, unrounded, of the same shape.
        """
        ...
