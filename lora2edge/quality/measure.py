"""Quality of an artifact against the recorded baseline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lora2edge.contracts import Progress, Sample, Session
from lora2edge.quality.divergence import Divergence, compare
from lora2edge.quality.gain import Estimate, estimate, gain_kept, percentile_estimate
from lora2edge.quality.reference import Reference
from lora2edge.quality.tasks import accuracy_by_label, answer, matches


def measure_quality(session: Session, reference: Reference, *, seed: int, progress: Progress) -> dict[str, Any]:
    """Perplexity, KL, flips, gain kept and accuracy of `session`, JSON-ready, with 95 % intervals.

    nll and KL are nats per response token, flips and accuracies fractions, `ppl_ratio` artifact / baseline.
    `intervals` has `{"value", "low", "high"}` of each figure that has one, by the names that gates use. Raises
    GateError where a logit is not finite, UnsupportedError where the vocabularies differ in size.
    """
    samples = reference.samples
    progress.start("quality: logits", len(samples), "samples")
    artifact = session.logits([sample.ids[:-1] for sample in samples], [list(sample.positions) for sample in samples])
    divergence = compare(reference.all_logits(), artifact, samples, progress.advance)
    base_nll = np.array(reference.base_nll, np.float64)
    kept, kept_reason = gain_kept(base_nll, divergence, seed)
    intervals = _intervals(divergence, seed)
    if kept is not None:
        intervals["gain_kept"] = kept
    accuracy = _measure_accuracy(session, reference, seed, progress)
    if accuracy["estimate"] is not None:
        intervals["accuracy"] = accuracy["estimate"]
    progress.finish()
    return {
        "ppl": float(np.exp(intervals["nll"].value)),
        "nll": intervals["nll"].value,
        "kl_mean": intervals["kl_mean"].value,
        "kl_p99": intervals["kl_p99"].value,
        "flips": intervals["flips"].value,
        "top1_agreement": divergence.top1_agreement,
        "accuracy": accuracy["estimate"].value if accuracy["estimate"] else None,
        "accuracy_by": accuracy["by"],
        "accuracy_reason": accuracy["reason"],
        "gain_kept": kept.to_json() if kept else None,
        "gain_kept_reason": kept_reason,
        "intervals": {name: found.to_json() for name, found in intervals.items()},
        "positions": divergence.positions,
        "items": len(samples),
    }


def _intervals(divergence: Divergence, seed: int) -> dict[str, Estimate]:
    count = divergence.count.astype(np.float64)
    return {
        "nll": _per_token(divergence.nll_artifact, count, seed),
        "kl_mean": _per_token(divergence.kl, count, seed),
        "flips": _per_token(divergence.flips, count, seed),
        "kl_p99": percentile_estimate(divergence, 99, seed),
        "ppl_ratio": estimate(
            lambda artifact, tuned, count: np.exp((artifact - tuned) / count),
            {"artifact": divergence.nll_artifact, "tuned": divergence.nll_reference, "count": count},
            seed,
        ),
    }


def _per_token(sums: Any, count: Any, seed: int) -> Estimate:
    return estimate(lambda total, count: total / count, {"total": sums, "count": count}, seed)


def _measure_accuracy(session: Session, reference: Reference, seed: int, progress: Progress) -> dict[str, Any]:
    chosen: Sequence[Sample] = [reference.samples[index] for index in reference.answered]
    if not chosen:
        return {"estimate": None, "by": {}, "reason": reference.accuracy_reason}
    progress.start("quality: answers", len(chosen), "answers")
    renderer = reference.renderer()
    answers = answer(session, chosen, stop=reference.end_ids, advance=progress.advance)
    right = matches([renderer.decode(ids) for ids in answers], chosen)
    hits = np.array(right, np.float64)
    return {
        "estimate": _per_token(hits, np.ones_like(hits), seed),
        "by": accuracy_by_label(right, chosen),
        "reason": "",
    }
