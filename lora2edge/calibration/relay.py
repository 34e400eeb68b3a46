"""What passes hidden states on in the place of a layer that is not in memory."""

from __future__ import annotations

from typing import Any, Protocol


class Running(Protocol):
    """What a relay has to know of the pass."""

    cache: Any
    captured: Any
    loaded: int | None
    outputs: int | None


def make_relay(model: Running, index: int, layer: Any) -> Any:
    """A module that passes on the hidden states it is given, in the form that `layer` would; its other attributes are
    the layer's. In a cache it leaves keys and values of width one: how long the cache is, is read from any layer."""
    import torch

    class Relay(torch.nn.Module):  # type: ignore[misc]
        def __getattr__(self, name: str) -> Any:
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(layer, name)

        def forward(self, *arguments: Any, **named: Any) -> Any:
            hidden = arguments[0] if arguments else named["hidden_states"]
            if model.loaded is not None and model.loaded + 1 == index:
                model.captured = hidden
            if model.cache is not None:
                nothing = hidden.new_zeros(hidden.shape[0], 1, hidden.shape[1], 1)
                model.cache.update(nothing, nothing, index)
            return (hidden, *[None] * (model.outputs - 1)) if model.outputs else hidden

    return Relay()
