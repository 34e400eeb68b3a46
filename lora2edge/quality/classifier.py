"""Quality of a classifier: the baseline, recorded once, and artifacts against it.

Figures are taken over decisions: one a text, or one a word where tokens are classified. The gain is NLL(base) −
NLL(baseline) of the right class, nats per decision. Where the base has no head of its own, because the adapter brought
it, base + random head would be another model at every load: the base then is chance, the same probability for every
class, and NLL(base) is ln(classes). A head that the base's own folder holds is used as it is, trained or not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from lora2edge.contracts import Classifier, LabelledSample, Progress
from lora2edge.errors import UnsupportedError
from lora2edge.quality.classes import Confusions, macro_f1_loss
from lora2edge.quality.divergence import Divergence, compare, sample_nll
from lora2edge.quality.gain import Estimate, estimate, gain, gain_kept, percentile_estimate
from lora2edge.quality.recorded import RECORD, open_recorded
from lora2edge.quality.states import Runner
from lora2edge.storage import write_json
from lora2edge.texts import labelled_digest, read_labelled, write_labelled

if TYPE_CHECKING:
    from lora2edge.contracts import FloatArray

LOGIT_ERROR = 1e-4
"""Of the largest logit. Two orders of summation in float32 differ by 1e-7 to 1e-5; a delta scaled by 1.01 shows at 1e-3
where the adapter moves logits by a tenth of the largest."""
BASE, CHANCE = "base", "chance"
_SCHEMA = 1
_SAMPLES, _LOGITS = "samples.jsonl", "logits.npy"
_UNSEEN = 0.025
"""Chance of meeting nothing of what is as frequent as the exact binomial bound (Clopper and Pearson, 1934)."""
_BATCH_TOKENS = 1024
"""Padded tokens that are classified together."""


class TorchClassifier(Classifier, Protocol):
    """What a classifier in PyTorch can do beyond any."""

    has_base_head: bool
    """Whether the base has a classification head without the adapter."""

    @property
    def vocabulary(self) -> int: ...
    def grow_vocabulary(self, rows: int) -> None: ...
    def adapter_off(self) -> AbstractContextManager[None]: ...


@dataclass(frozen=True, slots=True)
class ClassLogits:
    """Class logits of samples: they are few, and kept as they are."""

    rows: list[FloatArray]
    """`[n, classes]` float32 of each sample."""

    def logits(self) -> Iterator[FloatArray]:
        return iter(self.rows)


class ClassifierReference:
    """A recorded baseline: samples, its logits at the scored positions, losses of the base."""

    def __init__(self, path: Path, record: dict[str, Any]) -> None:
        self.path = path
        self.samples: list[LabelledSample] = read_labelled(path / _SAMPLES)
        self.figures: dict[str, Any] = record["figures"]
        """What `record_classifier` returned."""
        self.labels: list[str] = record["labels"]
        self.unit: str = record["unit"]
        self.base_nll = np.array(record["base_nll"], np.float64)
        """Per sample, summed over its decisions, nats."""
        stored = np.load(path / _LOGITS, allow_pickle=False)
        ends = np.cumsum([len(sample.positions) for sample in self.samples])
        self.rows: list[FloatArray] = np.split(stored, ends[:-1])
        """The baseline's logits, `[n, classes]` float32 of each sample."""


def record_classifier(
    baseline: TorchClassifier,
    open_base: Callable[[], TorchClassifier],
    samples: Sequence[LabelledSample],
    folder: Path,
    *,
    seed: int,
    progress: Progress,
) -> dict[str, Any]:
    """Measures baseline and base on `samples` into the existing `folder`; returns the baseline's figures, JSON-ready.

    `open_base` is not called where the base has no head. Closes `baseline` first, so that one model is in memory at a
    time. Raises GateError where a logit is not finite.
    """
    facts, names, headed = asdict(baseline.facts), list(baseline.labels), baseline.has_base_head
    unit, vocabulary = unit_of(samples), baseline.vocabulary
    write_labelled(folder / _SAMPLES, samples)
    progress.start("baseline: classes", len(samples), "samples")
    rows = _take_and_close(baseline, samples, progress)
    np.save(folder / _LOGITS, np.concatenate(rows))
    nll = sample_nll(rows, samples)
    base_rows: list[FloatArray] = [np.zeros_like(each) for each in rows]
    if headed:
        base = open_base()
        base.grow_vocabulary(vocabulary)
        progress.start("base: classes", len(samples), "samples")
        base_rows = _take_and_close(base, samples, progress)
        _check_classes(base_rows, len(names))
    progress.finish()
    base_nll = sample_nll(base_rows, samples)
    count = np.array([len(sample.positions) for sample in samples], np.int64)
    tuned = Confusions(rows, samples, len(names))
    figures = {
        "facts": facts,
        "unit": unit,
        "labels": names,
        "nll": float(nll.sum() / count.sum()),
        **_agreement_figures(tuned, names, seed),
        "gain": gain(base_nll, nll, count, seed).to_json(),
        "base": {"kind": BASE if headed else CHANCE, "nll": float(base_nll.sum() / count.sum())}
        | _base_agreement(base_rows if headed else None, samples, len(names)),
    }
    record = {
        "schema": _SCHEMA,
        "samples": labelled_digest(samples),
        "labels": names,
        "unit": unit,
        "base_nll": base_nll.tolist(),
        "figures": figures,
    }
    write_json(folder / RECORD, record)
    return figures


def open_classifier_reference(path: Path) -> ClassifierReference:
    """The baseline recorded in folder `path`. Raises DataError where it is incomplete or of another version."""
    return open_recorded(path, _SCHEMA, ClassifierReference)


def measure_classifier(
    classifier: Classifier, reference: ClassifierReference, *, seed: int, progress: Progress
) -> dict[str, Any]:
    """Accuracy, macro-F1, flips, KL and gain kept of `classifier`, JSON-ready, with 95 % intervals.

    nll and KL are nats per decision, the others fractions; `macro_f1_loss` is baseline − artifact. `flips_bound`: where
    no decision differs, which a bootstrap takes for certain, how many of other items could. `intervals` has
    `{"value", "low", "high"}` of each figure that has one, by the names that gates use. Raises GateError where a logit
    is not finite, UnsupportedError where the classes are others than the baseline's.
    """
    samples = reference.samples
    if list(classifier.labels) != reference.labels:
        raise UnsupportedError(
            "other-classes",
            "baseline and artifact have other classes",
            why=f"{', '.join(reference.labels[:5])}, and {', '.join(classifier.labels[:5])}",
            hint="the artifact is of another model: build it again",
        )
    progress.start("quality: classes", len(samples), "samples")
    rows = run_classifier(classifier, samples, progress)
    progress.finish()
    divergence = compare(reference.rows, rows, samples)
    tuned = Confusions(reference.rows, samples, len(reference.labels))
    own = Confusions(rows, samples, len(reference.labels))
    kept, kept_reason = gain_kept(reference.base_nll, divergence, seed, reference.unit)
    intervals = {
        **_intervals(divergence, seed),
        "accuracy": own.accuracy(seed),
        "macro_f1": own.macro_f1(seed),
        "macro_f1_loss": macro_f1_loss(tuned, own, seed),
    }
    if kept is not None:
        intervals["gain_kept"] = kept
    return {
        **{name: found.value for name, found in intervals.items() if name != "gain_kept"},
        "agreement": divergence.top1_agreement,
        "flips_bound": None if divergence.flips.any() else 1 - _UNSEEN ** (1 / len(samples)),
        "by_class": own.by_class(reference.labels),
        "gain_kept": kept.to_json() if kept else None,
        "gain_kept_reason": kept_reason,
        "intervals": {name: found.to_json() for name, found in intervals.items()},
        "positions": divergence.positions,
        "items": len(samples),
        "unit": reference.unit,
    }


def run_classifier(
    classifier: Classifier, samples: Sequence[LabelledSample], progress: Progress | None = None
) -> list[FloatArray]:
    """`[n, classes]` float32 at the scored positions of each sample, in order. Texts of like length run together.

    Raises UnsupportedError where the classifier gives another shape than its labels and the text have.
    """
    found: dict[int, FloatArray] = {}
    for group in _groups([len(sample.ids) for sample in samples]):
        answers = classifier.classify([samples[index].encoded for index in group])
        for index, logits in zip(group, answers, strict=True):
            sample = samples[index]
            whole = np.asarray(logits, np.float32).reshape(-1, logits.shape[-1])
            if whole.shape[0] != (len(sample.ids) if sample.item.words else 1):
                raise UnsupportedError(
                    "class-shape",
                    f"the classifier gives {list(logits.shape)} logits for a text of {len(sample.ids)} tokens",
                    why="a text has one row of them, or one a token where tokens are classified",
                )
            found[index] = whole[list(sample.positions)]
            if progress:
                progress.advance()
    rows = [found[index] for index in range(len(samples))]
    _check_classes(rows, len(classifier.labels))
    return rows


def unit_of(samples: Sequence[LabelledSample]) -> str:
    """What one decision is about: "text" or "word"."""
    return "word" if samples[0].item.words else "text"


def take_classes(session: TorchClassifier, samples: Sequence[LabelledSample], progress: Progress) -> ClassLogits:
    """Runs `samples` through the session, and closes it."""
    return ClassLogits(_take_and_close(session, samples, progress))


def take_live_classes(
    session: TorchClassifier, samples: Sequence[LabelledSample], progress: Progress
) -> tuple[ClassLogits, Divergence]:
    """The live model's logits, and how far they are from those of the base (see above); closes the session."""
    try:
        live = run_classifier(session, samples, progress)
        base: list[FloatArray] = [np.zeros_like(rows) for rows in live]
        if session.has_base_head:
            with session.adapter_off():
                base = run_classifier(session, samples, progress)
        return ClassLogits(live), compare(live, base, samples)
    finally:
        session.close()


CLASSIFIER = Runner(take_classes, take_live_classes, LOGIT_ERROR)


def _take_and_close(
    session: TorchClassifier, samples: Sequence[LabelledSample], progress: Progress
) -> list[FloatArray]:
    try:
        return run_classifier(session, samples, progress)
    finally:
        session.close()


def _agreement_figures(found: Confusions, names: Sequence[str], seed: int) -> dict[str, Any]:
    accuracy, macro = found.accuracy(seed), found.macro_f1(seed)
    return {
        "accuracy": accuracy.value,
        "macro_f1": macro.value,
        "by_class": found.by_class(names),
        "intervals": {"accuracy": accuracy.to_json(), "macro_f1": macro.to_json()},
    }


def _base_agreement(
    rows: Sequence[FloatArray] | None, samples: Sequence[LabelledSample], classes: int
) -> dict[str, float | None]:
    """The base's accuracy and macro-F1; None of chance, which prefers no class."""
    if rows is None:
        return {"accuracy": None, "macro_f1": None}
    found = Confusions(rows, samples, classes)
    return {"accuracy": found.accuracy(0).value, "macro_f1": found.macro_f1(0).value}


def _intervals(divergence: Divergence, seed: int) -> dict[str, Estimate]:
    count = divergence.count.astype(np.float64)

    def mean(total: Any) -> Estimate:
        return estimate(lambda total, count: total / count, {"total": total, "count": count}, seed)

    return {
        "nll": mean(divergence.nll_artifact),
        "kl_mean": mean(divergence.kl),
        "kl_p99": percentile_estimate(divergence, 99, seed),
        "flips": mean(divergence.flips),
    }


def _check_classes(rows: Sequence[FloatArray], classes: int) -> None:
    if rows and rows[0].shape[1] != classes:
        raise UnsupportedError(
            "class-count",
            f"the model gives {rows[0].shape[1]} logits for {classes} classes",
            why="id2label in config.json is of another head",
            hint="mend id2label in the base's config.json",
        )


def _groups(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Indices in batches of similar length, each at most `_BATCH_TOKENS` when padded, or one text."""
    group: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: lengths[index]):
        if group and (len(group) + 1) * lengths[index] > _BATCH_TOKENS:
            yield group
            group = []
        group.append(index)
    if group:
        yield group
