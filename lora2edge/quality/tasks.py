"""Exact-match accuracy: greedy answers against short reference answers."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from lora2edge.contracts import Sample, Session

MEDIAN_TOKENS = 24
ITEM_TOKENS = 32
MOST_ITEMS = 600
_MORE_TOKENS = 8
_LABEL_VALUES = 24


def short_items(samples: Sequence[Sample]) -> tuple[list[int], str]:
    """Indices of the samples whose answers are compared word for word; [] and the reason where that is no measure.

    Exact match is one where answers are short: a median response of at most 24 tokens, of which items of at most
    32 tokens count (the end marker included), at most 600 of them. Samples come in the order of a hash, so the
    first 600 are a fair choice.
    """
    lengths = [len(sample.positions) for sample in samples]
    median = statistics.median(lengths)
    if median > MEDIAN_TOKENS:
        return [], (
            f"responses have a median of {median:g} tokens: two good answers of more than {MEDIAN_TOKENS} are rarely "
            "the same word for word"
        )
    return [index for index, length in enumerate(lengths) if length <= ITEM_TOKENS][:MOST_ITEMS], ""


def answer(
    session: Session,
    samples: Sequence[Sample],
    *,
    stop: Sequence[int],
    advance: Callable[[], None] = lambda: None,
) -> list[list[int]]:
    """Greedy answers' token ids, in the samples' order; as many requests at a time as the session has slots."""
    if not samples:
        return []
    longest = max(len(sample.positions) for sample in samples) + _MORE_TOKENS

    def one(sample: Sample) -> list[int]:
        found = list(session.generate(sample.ids[: sample.prompt_length], max_new=longest, stop=stop))
        advance()
        return found

    with ThreadPoolExecutor(max(1, session.facts.slots)) as pool:
        return list(pool.map(one, samples))


def matches(answers: Sequence[str], samples: Sequence[Sample]) -> list[bool]:
    """Whether each answer is the reference response, white space at both ends left out. Nothing else is forgiven."""
    return [text.strip() == sample.item.response.strip() for text, sample in zip(answers, samples, strict=True)]


def accuracy_by_label(right: Sequence[bool], samples: Sequence[Sample]) -> dict[str, dict[str, float]]:
    """Label → value → share of right answers, for labels of 2 to 24 values."""
    found: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for hit, sample in zip(right, samples, strict=True):
        for label, value in sample.item.labels.items():
            found[label][value].append(hit)
    return {
        label: {value: _share(hits) for value, hits in sorted(values.items())}
        for label, values in sorted(found.items())
        if _tells(values)
    }


def _tells(values: Mapping[str, Sequence[bool]]) -> bool:
    return 2 <= len(values) <= _LABEL_VALUES


def _share(hits: Sequence[bool]) -> float:
    return sum(hits) / len(hits)
