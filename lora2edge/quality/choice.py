"""Which of several merged models answers most like the live one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from lora2edge.contracts import AnySample, Progress
from lora2edge.quality.divergence import Divergence, compare
from lora2edge.quality.gain import Estimate, estimate
from lora2edge.quality.proof import PROOF_POSITIONS
from lora2edge.quality.states import LANGUAGE, Runner, first_samples


def choose_nearest(
    open_live: Callable[[], Any],
    candidates: Mapping[str, Callable[[], Any]],
    samples: Sequence[AnySample],
    *,
    seed: int,
    progress: Progress,
    runner: Runner = LANGUAGE,
) -> dict[str, Any]:
    """KL(live ‖ candidate) and perplexity of each candidate on the first of `samples`, JSON-ready; the least is chosen.

    `chosen` names it, `decided` tells whether the 95 % interval of the difference of the two KLs leaves out 0.
    `candidates` has `{"kl_mean", "nll"}` of each, nats per token with 95 % intervals; `nll` is the live model's.
    One session is open at a time. Raises GateError where a logit is not finite.
    """
    chosen = first_samples(samples, PROOF_POSITIONS)
    progress.start("base of the merge", (1 + len(candidates)) * len(chosen), "samples")
    live = runner.take(open_live(), chosen, progress)
    found = {
        name: compare(live.logits(), runner.take(session(), chosen, progress).logits(), chosen)
        for name, session in candidates.items()
    }
    progress.finish()
    best, *others = sorted(found, key=lambda name: found[name].kl_mean)
    gaps = [_gap(found[best], found[other], seed) for other in others]
    return {
        "chosen": best,
        "decided": all(gap.low is not None and gap.low > 0 for gap in gaps),
        "candidates": {name: _figures(divergence, seed) for name, divergence in found.items()},
        "nll": _per_token(found[best].nll_reference, found[best], seed).to_json(),
        "items": len(chosen),
        "positions": found[best].positions,
    }


def _figures(divergence: Divergence, seed: int) -> dict[str, Any]:
    return {
        "kl_mean": _per_token(divergence.kl, divergence, seed).to_json(),
        "nll": _per_token(divergence.nll_artifact, divergence, seed).to_json(),
    }


def _gap(best: Divergence, other: Divergence, seed: int) -> Estimate:
    """How much farther the other is, on the same items."""
    return _per_token(other.kl - best.kl, best, seed)


def _per_token(sums: Any, divergence: Divergence, seed: int) -> Estimate:
    count = divergence.count.astype(np.float64)
    return estimate(lambda total, count: total / count, {"total": sums, "count": count}, seed)
