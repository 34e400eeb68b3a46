"""Layers that lack a tensor, told from names alone: whoever loads such a checkpoint fills it with random numbers."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from lora2edge.errors import CheckpointError

_LAYER = re.compile(r"(?P<stack>(?:[^.]+\.)*?(?:layers|layer|block|h))\.(?P<number>\d{1,5})\.(?P<rest>.+)")
_COUNTS = ("num_hidden_layers", "n_layer", "num_layers")
_VARIED = "block_configs"
"""In the config of models whose layers were thinned out one by one (Nemotron-NAS): nothing can be told of those."""


def find_missing(config: Mapping[str, Any], names: Iterable[str]) -> CheckpointError | None:
    """The refusal where layers are not numbered without a gap, or one lacks what most others have and has no other.

    A layer of another kind (dense among experts, attention among recurrent ones) has tensors of its own.
    """
    stacks: dict[str, dict[int, set[str]]] = {}
    for name in names:
        if found := _LAYER.fullmatch(name):
            stacks.setdefault(found["stack"], {}).setdefault(int(found["number"]), set()).add(found["rest"])
    missing: list[str] = []
    for stack, layers in stacks.items():
        count = _count(config) if len(stacks) == 1 else None
        numbers = range(count if count is not None else max(layers) + 1)
        missing += [f"{stack}.{number}" for number in numbers if number not in layers]
        if _VARIED not in config:
            missing += _thinner(stack, {number: layers[number] for number in numbers if number in layers})
    if not missing:
        return None
    shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3:,} more" if len(missing) > 3 else "")
    return CheckpointError(
        "missing-tensors",
        f"the checkpoint lacks {shown}",
        why="the layers beside it have it, or config.json counts it; a model without it would run on random numbers",
        hint="download or save the checkpoint again; where layers were taken out, config.json has to say so",
    )


def _count(config: Mapping[str, Any]) -> int | None:
    """Layers that the config speaks of, or 100,000, which nothing has."""
    found = (config.get(key) for key in _COUNTS)
    return next((min(value, 100_000) for value in found if isinstance(value, int)), None)


def _thinner(stack: str, layers: Mapping[int, set[str]]) -> list[str]:
    """What single layers lack of that which more than half of them have."""
    kinds = Counter(frozenset(rests) for rests in layers.values())
    usual, often = kinds.most_common(1)[0] if kinds else (frozenset(), 0)
    if 2 * often <= len(layers):
        return []
    return [
        f"{stack}.{number}.{rest}"
        for number, rests in sorted(layers.items())
        if rests < usual
        for rest in sorted(usual - rests)
    ]
