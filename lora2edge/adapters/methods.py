"""The methods by which several adapters become one change, and the settings of each.

With dW_i = (adapter i alone on the base) - W, whatever kind it is of:

- `sum`: W + Σ w_i dW_i. PEFT's "cat", and what it computes with several plain LoRA adapters active at once.
- `sequence`: each adapter acts on the result of those before it; a view of a view (`merge`).
- `svd`, `ties_svd`, `dare_linear_svd`, `dare_ties_svd`, `magnitude_prune_svd`: the changes dW_i combined, then cut to
  a rank.
- `linear`, `ties`, `dare_linear`, `dare_ties`, `magnitude_prune`: the factors A_i and B_i of plain LoRA combined, each
  by itself, as PEFT's add_weighted_adapter does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lora2edge.errors import AdapterError

SUM, SEQUENCE = "sum", "sequence"
FACTORED = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
TRUNCATED = ("svd", "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd")
METHODS = (SUM, SEQUENCE, *FACTORED, *TRUNCATED)


@dataclass(frozen=True, slots=True)
class Combination:
    """How several adapters become one change."""

    method: str = SUM
    density: float | None = None
    """Share of the entries that pruning keeps, in (0, 1]."""
    majority_sign: str | None = None
    """TIES: "total" or "frequency"."""
    svd_rank: int | None = None
    """None: the largest rank of the adapters."""
    seed: int | None = None
    """DARE's."""

    @staticmethod
    def from_json(data: Mapping[str, Any] | None) -> Combination:
        """The settings in `data`, with defaults. Raises AdapterError for one that the method lacks or does not know."""
        given = {key: value for key, value in (data or {}).items() if value is not None}
        method = str(given.get("method", SUM))
        if method not in METHODS:
            raise AdapterError(
                "combine-method", f"adapters cannot be combined by {method!r}", why=f"known: {', '.join(METHODS)}",
                hint="--combine sum",
            )  # fmt: skip
        stem = method.removesuffix("_svd")
        pruned, elected = stem not in {SUM, SEQUENCE, "linear", "svd"}, stem.endswith("ties")
        belongs = {"density": pruned, "majority_sign": elected, "svd_rank": method in TRUNCATED}
        for key, known in belongs.items():
            if key in given and not known:
                raise AdapterError(
                    "combine-option", f"{key} has no meaning for {method}",
                    why=f"it belongs to {', '.join(name for name in METHODS if _takes(name, key))}",
                    hint=f"leave --{key.replace('_', '-')} out, or choose another --combine",
                )  # fmt: skip
        density = given.get("density")
        if pruned and not (isinstance(density, int | float) and 0 < density <= 1):
            raise AdapterError(
                "combine-option", f"{method} needs a density in (0, 1], it is {density}",
                why="the share of the entries that are kept; the papers take 0.2 (TIES) and 0.1 to 0.5 (DARE)",
                hint="--density 0.5",
            )  # fmt: skip
        rank = given.get("svd_rank")
        if rank is not None and not (isinstance(rank, int) and rank > 0):
            raise AdapterError("combine-option", f"svd_rank is {rank}, expected a whole number from 1")
        sign = given.get("majority_sign", "total")
        if sign not in {"total", "frequency"}:
            raise AdapterError("combine-option", f"majority_sign is {sign!r}, expected total or frequency")
        return Combination(
            method,
            float(density) if pruned and density is not None else None,
            sign if elected else None,
            rank,
            int(given.get("seed", 0)) if stem.startswith("dare") else None,
        )

    def to_json(self) -> dict[str, Any]:
        """The settings that the method has."""
        return {key: value for key, value in asdict(self).items() if value is not None}


def _takes(method: str, option: str) -> bool:
    stem = method.removesuffix("_svd")
    if option == "svd_rank":
        return method in TRUNCATED
    return stem.endswith("ties") or (option == "density" and stem.startswith(("dare", "magnitude")))
