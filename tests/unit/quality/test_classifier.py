"""A classifier's figures: known numbers, and formulas written out here."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora2edge.contracts import Encoded, LabelledItem, LabelledSample, SessionFacts
from lora2edge.errors import GateError, UnsupportedError
from lora2edge.progress import SILENT
from lora2edge.quality import judge, measure_classifier, open_classifier_reference, record_classifier
from lora2edge.quality.classes import Confusions, macro_f1_loss
from lora2edge.target import Target

NAMES = ["a", "b", "c"]


def sample(*targets: int, ids: int = 4, words: bool = False) -> LabelledSample:
    item = LabelledItem(targets, text="" if words else "t", words=("w",) * len(targets) if words else ())
    positions = tuple(range(1, 1 + len(targets))) if words else (0,)
    return LabelledSample(Encoded(tuple(range(ids))), positions, targets, item)


def one_hot(*classes: int) -> Any:
    return np.eye(3, dtype=np.float32)[list(classes)] * 4


class Fake:
    """Answers with given logits, by the first token id of each text."""

    has_base_head = True
    vocabulary = 10

    def __init__(self, rows: dict[int, Any], labels: list[str] | None = None) -> None:
        self.rows, self.labels, self.closed, self.batches = rows, labels or NAMES, 0, []
        self.facts = SessionFacts("fake", "cpu", "float32", 4, 1, 99, "", "")

    def encode(self, text: str, pair: str | None = None) -> Encoded:
        return Encoded(())

    def classify(self, batch: Any) -> list[Any]:
        self.batches.append(len(batch))
        return [self.rows[text.ids[0]] for text in batch]

    def grow_vocabulary(self, rows: int) -> None:
        assert rows == 10

    def close(self) -> None:
        self.closed += 1


def texts(gold: list[int]) -> list[LabelledSample]:
    """Each text's first id is its number."""
    return [
        LabelledSample(Encoded((index, *range(index % 3))), (0,), (target,), LabelledItem((target,), "t"))
        for index, target in enumerate(gold)
    ]


def test_macro_f1_of_known_numbers() -> None:
    gold, predicted = [0, 0, 0, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 0, 2]
    found = Confusions([one_hot(index) for index in predicted], texts(gold), 3)
    # a: 2 of 3 found, 2 of 3 right: 2/3. b: 3 of 5 found, 3 of 4 right: 6/9. c is no class of the gold labels.
    assert found.accuracy(0).value == 5 / 8
    assert found.macro_f1(0).value == pytest.approx((2 / 3 + 2 / 3) / 2)
    table = found.by_class(NAMES)
    assert table["b"] == {"support": 5, "precision": 3 / 4, "recall": 3 / 5, "f1": pytest.approx(2 / 3)}
    assert table["c"] == {"support": 0, "precision": 0.0, "recall": None, "f1": 0.0}


def test_macro_f1_is_that_of_its_definition_in_every_resample() -> None:
    """The interval's ends against a bootstrap written out: items are drawn, F1 is made from the drawn predictions."""
    random = np.random.default_rng(5)
    gold = random.integers(0, 3, 60)
    predicted = np.where(random.random(60) < 0.7, gold, random.integers(0, 3, 60))

    def by_hand(right: Any, chosen: Any) -> float:
        scores = []
        for each in sorted(set(right.tolist())):
            hits = int(((right == each) & (chosen == each)).sum())
            scores.append(2 * hits / (int((right == each).sum()) + int((chosen == each).sum())))
        return float(np.mean(scores))

    drawn = []
    for _ in range(4000):
        index = random.integers(0, 60, 60)
        drawn.append(by_hand(gold[index], predicted[index]))
    found = Confusions([one_hot(index) for index in predicted], texts(gold.tolist()), 3).macro_f1(seed=1)
    assert found.value == pytest.approx(by_hand(gold, predicted))
    assert [found.low, found.high] == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.01)


def test_the_loss_is_paired() -> None:
    """One more error in 60 is a small loss with a narrow interval, though each F1's own is wide."""
    random = np.random.default_rng(5)
    gold = random.integers(0, 3, 60)
    old = np.where(random.random(60) < 0.7, gold, (gold + 1) % 3)
    new = old.copy()
    new[np.flatnonzero(old == gold)[0]] = (gold[np.flatnonzero(old == gold)[0]] + 1) % 3
    before, after = (Confusions([one_hot(index) for index in rows], texts(gold.tolist()), 3) for rows in (old, new))
    loss = macro_f1_loss(before, after, seed=0)
    assert loss.value == pytest.approx(before.macro_f1(0).value - after.macro_f1(0).value) and loss.value > 0
    assert loss.low is not None and loss.high is not None and loss.low > -1e-9
    wide = before.macro_f1(0)
    assert wide.high is not None and wide.low is not None and loss.high - loss.low < (wide.high - wide.low) / 2


def record(folder: Path, tuned: Fake, base: Fake | None, samples: list[LabelledSample]) -> dict[str, Any]:
    folder.mkdir()

    def open_base() -> Any:
        assert base is not None
        return base

    return record_classifier(tuned, open_base, samples, folder, seed=0, progress=SILENT)


def test_figures_of_texts(tmp_path: Path) -> None:
    random = np.random.default_rng(2)
    gold = random.integers(0, 3, 50).tolist()
    logits = {name: random.normal(size=(50, 3)).astype(np.float32) * 2 for name in ("base", "tuned")}
    logits["tuned"][np.arange(50), gold] += 2
    logits["artifact"] = logits["tuned"] + random.normal(size=(50, 3)).astype(np.float32) * 0.3
    sides = {name: Fake(dict(enumerate(rows))) for name, rows in logits.items()}
    baseline = record(tmp_path / "r", sides["tuned"], sides["base"], texts(gold))
    assert sides["tuned"].closed == sides["base"].closed == 1
    quality = measure_classifier(sides["artifact"], open_classifier_reference(tmp_path / "r"), seed=0, progress=SILENT)

    def softmax(rows: Any) -> Any:
        weights = np.exp(rows.astype(np.float64))
        return weights / weights.sum(1, keepdims=True)

    p = {name: softmax(rows) for name, rows in logits.items()}
    nll = {name: float(-np.log(found[np.arange(50), gold]).mean()) for name, found in p.items()}
    kl = (p["tuned"] * np.log(p["tuned"] / p["artifact"])).sum(1)
    flips = (logits["tuned"].argmax(1) != logits["artifact"].argmax(1)).mean()
    assert quality["kl_mean"] == pytest.approx(kl.mean()) and quality["kl_p99"] == pytest.approx(np.percentile(kl, 99))
    assert quality["flips"] == pytest.approx(flips) and quality["agreement"] == pytest.approx(1 - flips)
    assert quality["nll"] == pytest.approx(nll["artifact"])
    assert baseline["gain"]["value"] == pytest.approx(nll["base"] - nll["tuned"])
    kept = (nll["base"] - nll["artifact"]) / (nll["base"] - nll["tuned"])
    assert quality["gain_kept"]["value"] == pytest.approx(kept)
    assert quality["accuracy"] == pytest.approx((logits["artifact"].argmax(1) == gold).mean())
    assert baseline["base"] == {
        "kind": "base",
        "nll": pytest.approx(nll["base"]),
        "accuracy": pytest.approx((logits["base"].argmax(1) == gold).mean()),
        "macro_f1": pytest.approx(baseline["base"]["macro_f1"]),
    }
    for figure in ("kl_mean", "flips", "accuracy", "macro_f1", "macro_f1_loss", "gain_kept"):
        found = quality["intervals"][figure]
        assert found["low"] <= found["value"] <= found["high"]
    assert (quality["positions"], quality["items"], quality["unit"]) == (50, 50, "text")
    assert quality["flips"] > 0 and quality["flips_bound"] is None


def test_a_head_that_came_with_the_adapter_is_measured_against_chance(tmp_path: Path) -> None:
    gold = [0, 1, 2] * 10
    tuned = Fake({index: one_hot(target)[0] for index, target in enumerate(gold)})
    tuned.has_base_head = False
    baseline = record(tmp_path / "r", tuned, None, texts(gold))
    assert baseline["base"] == {"kind": "chance", "nll": pytest.approx(math.log(3)), "accuracy": None, "macro_f1": None}
    own = -math.log(math.exp(4) / (math.exp(4) + 2))
    assert baseline["gain"]["value"] == pytest.approx(math.log(3) - own, abs=1e-6)


def test_words_are_scored_where_they_begin(tmp_path: Path) -> None:
    """Rows of other tokens are not looked at, whatever is in them."""
    samples = [sample(0, 1, ids=5, words=True), sample(2, 2, 0, ids=6, words=True)]
    samples = [
        LabelledSample(Encoded((index, *each.ids[1:])), each.positions, each.targets, each.item)
        for index, each in enumerate(samples)
    ]
    wrong = one_hot(1)
    rows = {
        0: np.concatenate([wrong, one_hot(0, 1), wrong, wrong]),
        1: np.concatenate([wrong, one_hot(2, 2, 1), wrong, wrong]),
    }
    baseline = record(tmp_path / "r", Fake(rows), Fake(rows), samples)
    assert baseline["accuracy"] == 4 / 5 and baseline["unit"] == "word"
    quality = measure_classifier(Fake(rows), open_classifier_reference(tmp_path / "r"), seed=0, progress=SILENT)
    assert (quality["positions"], quality["items"], quality["flips"], quality["kl_mean"]) == (5, 2, 0, 0)
    assert (1 - quality["flips_bound"]) ** 2 == pytest.approx(0.025)
    gates, _ = judge(target(macro_f1_loss={"max": 0.005}), quality)
    assert gates[0]["verdict"] == "pass" and "nothing differs on 2 items" in gates[0]["reason"]


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    rows = dict(enumerate(one_hot(0, 1, 2)))
    record(tmp_path / "r", Fake(rows), Fake(rows), texts([0, 1, 2]))
    reference = open_classifier_reference(tmp_path / "r")
    for labels, code in ((["a", "b", "d"], "other-classes"), (["b", "a", "c"], "other-classes")):
        with pytest.raises(UnsupportedError) as caught:
            measure_classifier(Fake(rows, labels), reference, seed=0, progress=SILENT)
        assert caught.value.code == code
    narrow = {index: row[:2] for index, row in rows.items()}
    with pytest.raises(UnsupportedError) as caught:
        measure_classifier(Fake(narrow), reference, seed=0, progress=SILENT)
    assert caught.value.code == "class-count"
    broken = {**rows, 1: rows[1] * np.float32(np.nan)}
    with pytest.raises(GateError) as failed:
        measure_classifier(Fake(broken), reference, seed=0, progress=SILENT)
    assert failed.value.code == "not-finite"
    by_token = {index: np.stack([row] * 2) for index, row in rows.items()}
    with pytest.raises(UnsupportedError) as caught:
        measure_classifier(Fake(by_token), reference, seed=0, progress=SILENT)
    assert caught.value.code == "class-shape"


def target(**gates: Any) -> Target:
    return Target.model_validate({"name": "t", "backend": "hf", "precision": "stored", "gates": gates})


def classifier_quality(**values: tuple[float, float, float]) -> dict[str, Any]:
    intervals = {name: dict(zip(("value", "low", "high"), found, strict=True)) for name, found in values.items()}
    return {**{name: found["value"] for name, found in intervals.items()}, "intervals": intervals}


def test_gates_on_a_classifier() -> None:
    quality = classifier_quality(
        macro_f1=(0.9, 0.88, 0.92), macro_f1_loss=(0.002, -0.001, 0.004), kl_mean=(0.01, 0.0, 0.02), accuracy=(0.9,) * 3
    )
    gates, verdict = judge(
        target(macro_f1_loss={"max": 0.005}, macro_f1={"min": 0.85}, ppl_ratio={"max": 1.1}), quality
    )
    assert [gate["verdict"] for gate in gates] == ["pass", "pass", "not applicable"] and verdict == "pass"
    assert gates[2]["reason"].startswith("not measured:") and gates[2]["value"] is None
    assert judge(target(macro_f1={"min": 0.9}), quality)[1] == "inconclusive"
    assert judge(target(macro_f1_loss={"max": -0.01}), quality)[1] == "fail"
    language = {"accuracy": None, "gain_kept": None, "intervals": {"kl_mean": quality["intervals"]["kl_mean"]}}
    gates, verdict = judge(target(kl_mean={"max": 0.05}, macro_f1_loss={"max": 0.005}), language)
    assert [gate["verdict"] for gate in gates] == ["pass", "not applicable"] and verdict == "pass"
