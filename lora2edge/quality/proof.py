"""The merge proof: the merged model answers like base + live adapter, or there is no build."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from lora2edge.contracts import AnySample, Progress
from lora2edge.errors import GateError, ProofError
from lora2edge.quality.divergence import Divergence, compare
from lora2edge.quality.states import LANGUAGE, Answers, Runner, first_samples

PROOF_POSITIONS = 2000
"""Scored positions of the proof: an error of the merge shows at every one of them."""
MATH_KL = 1e-9
"""Nats per token. Two orders of summation in float32 differ by 1e-13 to 3e-12 (measured on seven architectures);
a delta scaled by 1.01 shows at 1e-4 where the adapter moves answers by 1 nat, one tensor left out at far more."""
NOISE_SHARE = 1e-6
"""Of floor_kl. Float32 has 16 bits more than bfloat16 and KL goes with the square of the error: its noise was measured
at 4e-9 of bfloat16's. This leaves room for models on which 16 bits cost much."""
ROUNDING_KL = 1e-5
ROUNDING_FLOORS = 2.0
WRITTEN_FLOORS = 3.0


@dataclass(frozen=True, slots=True)
class MergeProof:
    """Mean KL in nats per token over positions that predict a response token; live = base + live adapter (PEFT)."""

    math_kl: float
    """KL(live ‖ merged), both float32, merged weights unrounded: the arithmetic of the merge."""
    rounding_kl: float
    """KL(live ‖ merged), computed in float32, merged weights rounded as they are written."""
    kl_mean: float
    """KL(live ‖ merged), both computed in the checkpoint's dtype: what a user of either sees."""
    floor_kl: float
    """KL(live in float32 ‖ live in the checkpoint's dtype): what that dtype costs without any merge."""
    adapter_kl: float
    """KL(live ‖ base), float32: what the adapter does here. Near 0 the proof says little."""
    top1_agreement: float
    """Share of positions with the same most likely token: live in float32, merged in the checkpoint's dtype."""
    top1_agreement_float32: float
    """The same in float32, merged weights rounded as they are written."""
    positions: int
    bounds: dict[str, float]
    """What the first three, and `logit_error` where it is there, had to stay under."""
    logit_error: float | None = None
    """Of a classifier: largest |merged − live| of any logit / largest |live|, both float32, weights unrounded. Where
    the classes are far apart, KL sees little of a wrong logit."""


def verify_merge(
    open_live: Callable[[str], Any],
    open_merged: Callable[[str, bool], Any],
    samples: Sequence[AnySample],
    *,
    dtype: str,
    progress: Progress,
    runner: Runner = LANGUAGE,
) -> MergeProof:
    """Measures the merge against PEFT's live adapter; raises ProofError where the merged model is another one.

    `open_live(dtype)` and `open_merged(dtype, rounded)` open sessions; one is open at a time, and what is kept of
    the live ones is what `runner` takes of them. `dtype` is the checkpoint's.

    The bounds, and why:
    - math_kl ≤ 1e-9, or 1e-6 of floor_kl where that is more: both sides compute the same sum in float32.
    - rounding_kl ≤ 1e-5, or 2 · floor_kl: rounding each weight once cannot cost more than rounding each weight's
      product on its way through the same network, which is the floor; 2 because both are estimates.
      A checkpoint stored in float32 is not rounded: the first bound holds.
    - logit_error ≤ the runner's bound, of a classifier.
    - kl_mean ≤ 1e-5, or 3 · floor_kl: live and merged carry rounding errors of one size that are independent, which
      makes 2 · floor_kl, and the rounded weights add up to one more (measured: 1.1 to 1.7 in all).
    Anything that is not finite is an error.
    """
    chosen = first_samples(samples, PROOF_POSITIONS)
    narrow = dtype != "float32"
    progress.start("merge proof", (6 if narrow else 4) * len(chosen), "samples")
    try:
        live, adapter = runner.take_live(open_live("float32"), chosen, progress)
        exact_answers = runner.take(open_merged("float32", False), chosen, progress)
        mathematics = compare(live.logits(), exact_answers.logits(), chosen)
        logit_error = None if runner.logit_bound is None else _largest_error(live, exact_answers)
        rounding = _against(live, runner.take(open_merged("float32", True), chosen, progress), chosen)
        written, floor_kl, kl_mean = rounding, 0.0, rounding.kl_mean
        if narrow:
            live_narrow = runner.take(open_live(dtype), chosen, progress)
            merged = runner.take(open_merged(dtype, True), chosen, progress)
            floor_kl = compare(live.logits(), live_narrow.logits(), chosen).kl_mean
            kl_mean = compare(live_narrow.logits(), merged.logits(), chosen).kl_mean
            written = compare(live.logits(), merged.logits(), chosen)
    except GateError as error:
        raise ProofError("merge-not-finite", error.what, why=error.why, hint=error.hint) from error
    progress.finish()
    exact = max(MATH_KL, NOISE_SHARE * floor_kl)
    proof = MergeProof(
        math_kl=mathematics.kl_mean,
        rounding_kl=rounding.kl_mean,
        kl_mean=kl_mean,
        floor_kl=floor_kl,
        adapter_kl=adapter.kl_mean,
        top1_agreement=written.top1_agreement,
        top1_agreement_float32=rounding.top1_agreement,
        positions=rounding.positions,
        bounds={
            "math_kl": exact,
            "rounding_kl": max(ROUNDING_KL, ROUNDING_FLOORS * floor_kl) if narrow else exact,
            "kl_mean": max(ROUNDING_KL, WRITTEN_FLOORS * floor_kl) if narrow else exact,
            **({} if runner.logit_bound is None else {"logit_error": runner.logit_bound}),
        },
        logit_error=logit_error,
    )
    _judge(proof)
    return proof


def join_proofs(proofs: Sequence[MergeProof], reference: str) -> dict[str, Any]:
    """One merge's proofs, JSON-ready: the figures of the worst, and all of them as `steps` where there are several.

    `reference` is not empty where each adapter was proved alone, because nothing computes their combination live.
    The worst is the one nearest to a bound, or farthest beyond it.
    """
    worst = max(proofs, key=lambda proof: max(getattr(proof, name) / bound for name, bound in proof.bounds.items()))
    joined = {**asdict(worst), "adapter_kl": min(proof.adapter_kl for proof in proofs), "reference": reference}
    return {**joined, "steps": [asdict(proof) for proof in proofs] if len(proofs) > 1 or reference else []}


def _against(live: Answers, merged: Answers, samples: Sequence[AnySample]) -> Divergence:
    return compare(live.logits(), merged.logits(), samples)


def _largest_error(live: Answers, merged: Answers) -> float:
    """Largest difference of any logit, of the largest logit; NaN where there is one."""
    pairs = list(zip(live.logits(), merged.logits(), strict=True))
    error = np.max([np.abs(theirs - ours).max() for ours, theirs in pairs])
    return float(error / max(np.max([np.abs(ours).max() for ours, _ in pairs]), np.float32(1e-30)))


def _judge(proof: MergeProof) -> None:
    """Raises ProofError with every figure that is over its bound. A NaN is over any bound."""
    figures = {name: getattr(proof, name) for name in proof.bounds}
    missed = [name for name, value in figures.items() if not value <= proof.bounds[name]]
    if missed or not math.isfinite(proof.floor_kl):
        why = ", ".join(f"{name} is {figures[name]:.3g}, allowed are {proof.bounds[name]:.3g}" for name in missed)
        raise ProofError(
            "merge-proof",
            "the merged model does not answer like base + live adapter",
            why=f"{why or 'floor_kl is not finite'}; KL in nats, over {proof.positions} positions",
            hint="do not ship it; check that the adapter was trained on this base, and report this if it was",
        )
