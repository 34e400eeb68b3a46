"""One model with its texts and its recorded baseline: what an artifact's quality is measured against."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lora2edge.cache import Cache
from lora2edge.contracts import Session
from lora2edge.pipeline import Finished, Pipeline
from lora2edge.plan import load_all_texts, plan_build
from lora2edge.progress import SILENT
from lora2edge.quality import open_reference
from lora2edge.quality.divergence import Divergence, compare
from lora2edge.quality.gain import Estimate, estimate, gain_kept, percentile_estimate
from lora2edge.quality.reference import Reference, inputs_of
from lora2edge.recipe import DataFiles, Recipe
from lora2edge.target import Target


class Measured:
    """Lowers targets of one model in the folder `work`, which keeps them, and measures them on the same test text."""

    def __init__(self, base: Path, adapter: Path, data: DataFiles, targets: Sequence[Target], work: Path, threads: int):
        self.work, self.threads = work, threads
        work.mkdir(parents=True, exist_ok=True)
        recipe = Recipe(base=str(base), adapter=str(adapter), data=data, threads=threads)
        self.plan = plan_build(recipe, list(targets))
        self.texts = load_all_texts(self.plan)
        self.pipeline = Pipeline(self.plan, Cache(work / "cache"), SILENT)
        self.calibration = self.pipeline.calibrate(self.texts)
        self.recorded = self.pipeline.record_baseline(self.texts)
        self.reference: Reference = open_reference(self.recorded.path)
        self.gain = self.recorded.result["gain"]
        self.base_nll = np.array(self.reference.base_nll, np.float64)

    def lower(self, target: Target) -> Finished:
        return self.pipeline.lower(target, self.calibration, self.work / target.folder)

    def divergence(self, session: Session) -> Divergence:
        """The session's distance from the live adapter on the test text."""
        ids, keep = inputs_of(self.reference.samples)
        return compare(self.reference.all_logits(), session.logits(ids, keep), self.reference.samples)

    def figures(self, found: Divergence) -> dict[str, Any]:
        """What reports state of an artifact, with intervals."""
        count = found.count.astype(np.float64)
        kept, reason = gain_kept(self.base_nll, found, seed=0)
        intervals: dict[str, Estimate | None] = {
            "kl_mean": estimate(lambda kl, count: kl / count, {"kl": found.kl, "count": count}, 0),
            "kl_p99": percentile_estimate(found, 99, 0),
            "flips": estimate(lambda flips, count: flips / count, {"flips": found.flips, "count": count}, 0),
            "ppl": estimate(lambda nll, count: np.exp(nll / count), {"nll": found.nll_artifact, "count": count}, 0),
            "gain_kept": kept,
        }
        stated = {name: value.to_json() if value else None for name, value in intervals.items()}
        return {**stated, "gain_kept_reason": reason}

    def compared(self, ours: Divergence, peer: Divergence) -> dict[str, Any]:
        """Ours against the peer's, sample by sample."""
        count = ours.count.astype(np.float64)
        pairs = {
            "kl_ratio": estimate(lambda ours, peer: ours / peer, {"ours": ours.kl, "peer": peer.kl}, 0),
            "flips_difference": estimate(
                lambda more, count: more / count, {"more": ours.flips - peer.flips, "count": count}, 0
            ),
            "gain_kept_difference": estimate(
                lambda less, base, tuned: less / (base - tuned),
                {
                    "less": peer.nll_artifact - ours.nll_artifact,
                    "base": self.base_nll,
                    "tuned": ours.nll_reference,
                },
                0,
            ),
        }
        return {name: value.to_json() for name, value in pairs.items()}
