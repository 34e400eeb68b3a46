"""Divergence, intervals, gates and accuracy against PyTorch's losses and sums by hand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lora2edge.contracts import Item, Sample
from lora2edge.errors import GateError, UnsupportedError
from lora2edge.quality import divergence as divergence_module
from lora2edge.quality.divergence import Divergence, compare, sample_nll
from lora2edge.quality.gain import estimate, gain, gain_kept, percentile_estimate
from lora2edge.quality.gates import judge
from lora2edge.quality.tasks import accuracy_by_label, answer, matches, short_items
from lora2edge.target import Gate, Target


def sample(prompt: int, response: int, seed: int = 0, text: str = "b", **labels: str) -> Sample:
    ids = np.random.default_rng(seed).integers(0, 50, prompt + response).tolist()
    item = Item(({"role": "user", "content": "a"}, {"role": "assistant", "content": text}), labels)
    return Sample(tuple(ids), prompt, item)


def logits(samples: Sequence[Sample], seed: int, scale: float = 2.0) -> list[Any]:
    generator = np.random.default_rng(seed)
    return [(scale * generator.standard_normal((len(s.positions), 50))).astype(np.float32) for s in samples]


# ---------------------------------------------------------------- divergence


@pytest.mark.parametrize("slab", [1, 1 << 20])
def test_sums_are_pytorchs(monkeypatch: pytest.MonkeyPatch, slab: int) -> None:
    monkeypatch.setattr(divergence_module, "_SLAB_BYTES", slab)
    samples = [sample(3, 7), sample(1, 2, 1), sample(9, 1, 2)]
    ours, theirs = logits(samples, 0), logits(samples, 1)
    calls: list[None] = []
    found = compare(ours, theirs, samples, lambda: calls.append(None))
    assert len(calls) == 3
    for index, (one, p, q) in enumerate(zip(samples, ours, theirs, strict=True)):
        p, q = torch.tensor(p).double(), torch.tensor(q).double()
        target = torch.tensor(one.ids[one.prompt_length :])
        assert found.nll_reference[index] == pytest.approx(float(F.cross_entropy(p, target, reduction="sum")))
        assert found.nll_artifact[index] == pytest.approx(float(F.cross_entropy(q, target, reduction="sum")))
        kl = F.kl_div(q.log_softmax(-1), p.log_softmax(-1), reduction="none", log_target=True).sum(-1)
        assert found.kl[index] == pytest.approx(float(kl.sum()))
        assert found.flips[index] == int((p.argmax(-1) != q.argmax(-1)).sum())
        at = sum(found.count[:index])
        np.testing.assert_allclose(found.kl_positions[at : at + len(kl)], kl, rtol=1e-6)
    assert found.positions == 10
    np.testing.assert_allclose(sample_nll(ours, samples), found.nll_reference)


def test_the_kl_of_nearly_equal_logits_is_not_noise() -> None:
    """A float32 softmax has errors of 1e-7; the merge proof needs differences of 1e-12."""
    samples = [sample(1, 200)]
    ours = logits(samples, 0, 8.0)
    assert compare(ours, ours, samples).kl_mean == 0
    nudged = [values.copy() for values in ours]
    nudged[0][:, 0] += np.float32(2e-6)
    moved = (nudged[0][:, 0].astype(np.float64) - ours[0][:, 0])[:, None]
    p = torch.tensor(ours[0]).double().softmax(-1)[:, :1].numpy()
    expected = float((p * (1 - p) * moved**2 / 2).mean())
    assert compare(ours, nudged, samples).kl_mean == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_broken_logits_fail(bad: float) -> None:
    samples = [sample(1, 3), sample(1, 3)]
    ours, theirs = logits(samples, 0), logits(samples, 1)
    theirs[1][2, 7] = bad
    with pytest.raises(GateError, match="artifact gives logits that are not finite, at sample 1"):
        compare(ours, theirs, samples)
    with pytest.raises(GateError):
        sample_nll(theirs, samples)


def test_vocabularies_of_two_sizes_are_refused() -> None:
    samples = [sample(1, 3)]
    with pytest.raises(UnsupportedError) as caught:
        compare(logits(samples, 0), [np.zeros((3, 49), np.float32)], samples)
    assert "[3, 50] and [3, 49]" in caught.value.why


# ---------------------------------------------------------------- intervals


def measured(base: Sequence[float], tuned: Sequence[float], artifact: Sequence[float], count: int = 10) -> Any:
    size = len(base)
    found = Divergence(
        nll_reference=np.array(tuned, float),
        nll_artifact=np.array(artifact, float),
        kl=np.full(size, 0.5),
        flips=np.zeros(size),
        count=np.full(size, count),
        kl_positions=np.full(size * count, 0.05, np.float32),
    )
    return np.array(base, float), found


def test_gain_and_gain_kept_by_hand() -> None:
    generator = np.random.default_rng(0)
    base = 30 + generator.standard_normal(200)
    tuned, artifact = base - 10 + generator.standard_normal(200), base - 9 + generator.standard_normal(200)
    sums, found = measured(base, tuned, artifact)
    bought = gain(sums, found.nll_reference, found.count, 0)
    assert bought.value == pytest.approx((base - tuned).sum() / 2000)
    assert bought.low < 1.0 < bought.high
    kept, reason = gain_kept(sums, found, 0)
    assert reason == ""
    assert kept.value == pytest.approx((base - artifact).sum() / (base - tuned).sum())
    assert kept.low < 0.9 < kept.high
    assert gain_kept(sums, replace(found, nll_artifact=found.nll_reference), 0)[0].low == 1.0


def test_gain_kept_means_nothing_without_a_gain() -> None:
    noise = np.random.default_rng(0).standard_normal(50)
    kept, reason = gain_kept(*measured(30 + noise, 30 - noise, 30 + noise), 0)
    assert kept is None and "reaches 0" in reason
    kept, reason = gain_kept(*measured([30], [20], [21]), 0)
    assert kept is None and "one item" in reason


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    """95 % intervals of a mean over 60 items; the binomial's own limits for 200 trials are 92 and 98 %."""
    generator = np.random.default_rng(1)
    held = 0
    for trial in range(200):
        count = generator.integers(5, 40, 60).astype(float)
        kl = count * generator.gamma(4.0, 0.025, 60)
        found = estimate(lambda kl, count: kl / count, {"kl": kl, "count": count}, trial, 1000)
        held += found.low <= 0.1 <= found.high
    assert 0.90 <= held / 200 <= 0.985


def test_intervals_repeat_and_depend_on_the_seed() -> None:
    values = np.random.default_rng(0).gamma(2.0, 1.0, 30)
    one, same, other = (estimate(lambda x: x / 30, {"x": values}, seed) for seed in (3, 3, 4))
    assert one == same and one.value == other.value and one.low != other.low


def test_the_99th_percentile_and_its_interval() -> None:
    generator = np.random.default_rng(0)
    kls = generator.exponential(1.0, 4000).astype(np.float32)
    _, found = measured([1] * 100, [1] * 100, [1] * 100, 40)
    result = percentile_estimate(replace(found, kl_positions=kls), 99, 0)
    assert result.value == pytest.approx(np.percentile(kls, 99))
    assert result.low < np.log(100) < result.high
    assert result.high - result.low < 2


# ---------------------------------------------------------------- gates


def quality(**figures: tuple[float, float | None, float | None]) -> dict[str, Any]:
    intervals = {name: dict(zip(("value", "low", "high"), ends, strict=True)) for name, ends in figures.items()}
    return {
        "gain_kept": intervals.get("gain_kept"),
        "accuracy": None,
        "gain_kept_reason": "no gain",
        "intervals": intervals,
    }


def target(**gates: Gate) -> Target:
    return Target(name="a/b", backend="gguf", precision="q8_0", gates=gates)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("gate", "ends", "verdict"),
    [
        (Gate(max=0.05), (0.03, 0.02, 0.05), "pass"),
        (Gate(max=0.05), (0.03, 0.02, 0.051), "inconclusive"),
        (Gate(max=0.05), (0.07, 0.051, 0.09), "fail"),
        (Gate(min=0.95), (0.97, 0.95, 0.99), "pass"),
        (Gate(min=0.95), (0.97, 0.94, 0.99), "inconclusive"),
        (Gate(min=0.95), (0.9, 0.8, 0.94), "fail"),
        (Gate(min=0.9, max=1.1), (1.0, 0.95, 1.05), "pass"),
        (Gate(min=0.9, max=1.1), (1.2, 1.15, 1.25), "fail"),
        (Gate(max=0.05), (float("nan"), 0.0, 0.01), "fail"),
        (Gate(max=0.05), (0.01, None, None), "inconclusive"),
        (Gate(max=0.05), (0.01, 0.0, float("inf")), "inconclusive"),
    ],
)
def test_a_gate_judges_the_whole_interval(gate: Gate, ends: Any, verdict: str) -> None:
    gates, total = judge(target(kl_mean=gate), quality(kl_mean=ends))
    assert (gates[0]["verdict"], total) == (verdict, verdict)
    warned, total = judge(target(kl_mean=gate.model_copy(update={"action": "warn"})), quality(kl_mean=ends))
    assert (warned[0]["verdict"], total) == (verdict, "pass")


def test_a_gate_without_its_figure_rests_on_kl() -> None:
    kept = Gate(min=0.95)
    for gates, ends, verdict in (
        ({"gain_kept": kept, "kl_mean": Gate(max=0.05)}, (0.03, 0.02, 0.04), "pass"),
        ({"gain_kept": kept, "kl_mean": Gate(max=0.05)}, (0.3, 0.2, 0.4), "fail"),
        ({"gain_kept": kept}, (0.03, 0.02, 0.04), "inconclusive"),
    ):
        found, total = judge(target(**gates), quality(kl_mean=ends))
        assert found[0]["verdict"] == total == verdict
        assert found[0]["value"] is None and "no gain" in found[0]["reason"] and "kl_mean" in found[0]["reason"]


def test_bounds_are_printed_and_one_failure_fails() -> None:
    gates, total = judge(
        target(kl_mean=Gate(max=0.05), flips=Gate(min=0.001, max=0.1)),
        quality(kl_mean=(0.01, 0.01, 0.01), flips=(0.5, 0.4, 0.6)),
    )
    assert [gate["bound"] for gate in gates] == ["≤ 0.05", "≥ 0.001 and ≤ 0.1"]
    assert total == "fail"
    assert judge(target(), quality()) == ([], "pass")


# ---------------------------------------------------------------- accuracy


def test_long_answers_are_not_matched_word_for_word() -> None:
    assert short_items([sample(2, n) for n in (3, 5, 40, 6)]) == ([0, 1, 3], "")
    assert short_items([sample(2, 32), sample(2, 3), sample(2, 16)])[0] == [0, 1, 2]
    chosen, reason = short_items([sample(2, 25)] * 3)
    assert chosen == [] and "median of 25 tokens" in reason
    assert len(short_items([sample(2, 3)] * 700)[0]) == 600


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 6), st.lists(st.integers(1, 9), min_size=1, max_size=12))
def test_answers_keep_their_order(slots: int, lengths: list[int]) -> None:
    class Echo:
        facts = SimpleNamespace(slots=slots)

        def generate(self, ids: Sequence[int], *, max_new: int, stop: Sequence[int]) -> Iterator[int]:
            assert max_new == max(lengths) + 8 and list(stop) == [1]
            return iter([*ids, 7])

    samples = [sample(3, length, seed) for seed, length in enumerate(lengths)]
    assert answer(Echo(), samples, stop=[1]) == [[*one.ids[:3], 7] for one in samples]  # type: ignore[arg-type]


def test_only_white_space_at_the_ends_is_forgiven() -> None:
    samples = [sample(1, 2, text="Yes, daily.")] * 4
    assert matches([" Yes, daily.\n", "yes, daily.", "Yes,  daily.", "Yes, daily"], samples) == [True, *[False] * 3]


def test_accuracy_by_label() -> None:
    samples = [sample(1, 2, lang="en", id=str(n), same="x") for n in range(30)]
    samples += [sample(1, 2, lang="zh", id=str(n), same="x") for n in range(30, 34)]
    found = accuracy_by_label([True] * 15 + [False] * 15 + [True] * 3 + [False], samples)
    assert found == {"lang": {"en": 0.5, "zh": 0.75}}
