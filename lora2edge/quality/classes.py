"""Predicted classes against the right ones: accuracy, F1 of each class, macro-F1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lora2edge.contracts import LabelledSample
from lora2edge.quality.gain import Estimate, estimate

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lora2edge.contracts import FloatArray

    Float64Array = NDArray[np.float64]


class Confusions:
    """What one model predicted, item by item. The class is the likeliest one, of equal ones the first."""

    def __init__(self, logits: Sequence[FloatArray], samples: Sequence[LabelledSample], classes: int) -> None:
        """`logits`: `[n, classes]` float32 of each sample's scored positions, in order."""
        shape = (len(samples), classes)
        self.hits: Float64Array = np.zeros(shape)
        """`[S, classes]`: right predictions of each item, by class."""
        self.gold: Float64Array = np.zeros(shape)
        """How often each class is right."""
        self.predicted: Float64Array = np.zeros(shape)
        """How often each class was predicted."""
        for index, (rows, sample) in enumerate(zip(logits, samples, strict=True)):
            chosen, right = rows.argmax(1), np.asarray(sample.targets)
            np.add.at(self.gold[index], right, 1)
            np.add.at(self.predicted[index], chosen, 1)
            np.add.at(self.hits[index], right[chosen == right], 1)

    @property
    def sums(self) -> dict[str, Float64Array]:
        """For `estimate`."""
        return {"hits": self.hits, "gold": self.gold, "predicted": self.predicted}

    def accuracy(self, seed: int) -> Estimate:
        """Share of right predictions, over texts or words."""
        return estimate(accuracy, self.sums, seed)

    def macro_f1(self, seed: int) -> Estimate:
        """`macro_f1`, with its interval over items."""
        return estimate(macro_f1, self.sums, seed)

    def by_class(self, names: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Name → `support` (how often it is right), `precision`, `recall` and `f1`; None where there is nothing to
        divide by."""
        hits, gold, predicted = (values.sum(axis=0) for values in (self.hits, self.gold, self.predicted))
        return {
            name: {
                "support": int(gold[index]),
                "precision": _share(hits[index], predicted[index]),
                "recall": _share(hits[index], gold[index]),
                "f1": _share(2 * hits[index], gold[index] + predicted[index]),
            }
            for index, name in enumerate(names)
        }


def accuracy(hits: Any, gold: Any, predicted: Any) -> Any:
    """`[…, classes]` counts → right predictions / all."""
    return hits.sum(-1) / gold.sum(-1)


def macro_f1(hits: Any, gold: Any, predicted: Any) -> Any:
    """`[…, classes]` counts → mean of 2·hits / (gold + predicted) over the classes that the gold labels have.

    scikit-learn's `f1_score(gold, predicted, labels=sorted(set(gold)), average="macro")`. A class that is only
    predicted costs its victims' recall, and is no class of the mean: one stray prediction would weigh as much as a
    whole class.
    """
    there = gold > 0
    each = np.where(there, 2 * hits / np.maximum(gold + predicted, 1), 0.0)
    return each.sum(-1) / there.sum(-1)


def macro_f1_loss(baseline: Confusions, artifact: Confusions, seed: int) -> Estimate:
    """macro-F1 of the baseline − that of the artifact, both on the same items in each resample."""

    def loss(hits: Any, gold: Any, predicted: Any, own_hits: Any, own_predicted: Any) -> Any:
        return macro_f1(hits, gold, predicted) - macro_f1(own_hits, gold, own_predicted)

    return estimate(loss, {**baseline.sums, "own_hits": artifact.hits, "own_predicted": artifact.predicted}, seed)


def _share(part: float, whole: float) -> float | None:
    return float(part / whole) if whole else None
