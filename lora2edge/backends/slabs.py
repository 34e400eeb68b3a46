"""What a backend says of a weight that it cannot write."""

from __future__ import annotations

from lora2edge.errors import CheckpointError


def not_finite(name: str) -> CheckpointError:
    """The error for a computed tensor that holds NaN or infinity."""
    return CheckpointError(
        "weight-not-finite",
        f"{name} holds NaN or infinity when it is merged",
        why="the base holds it, or the merge leaves the range of its dtype, or divides by zero (DoRA: a row of zeros)",
        hint="download the base again; where it is sound, train without this module, or with a smaller scale",
    )
