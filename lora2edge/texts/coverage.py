"""What a set of samples covers, and how much of the test text is also in the calibration text."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from lora2edge.contracts import AnySample, Item, Sample

_GRAM = 13
"""Tokens that rarely follow each other twice by chance; the length is GPT-3's (arXiv:2005.14165, appendix C)."""
_MOSTLY = 0.5
_LANGUAGE_LABELS = ("lang", "language", "locale")
_SCRIPTS = (
    ("ja", re.compile(r"[\u3040-\u30ff]")),
    ("ko", re.compile(r"[\uac00-\ud7af]")),
    ("zh", re.compile(r"[\u4e00-\u9fff]")),
    ("ru", re.compile(r"[\u0400-\u04ff]")),
    ("ar", re.compile(r"[\u0600-\u06ff]")),
    ("en", re.compile(r"[A-Za-z]")),
)
"""A letter of a script stands for its commonest language: without labels nothing better is cheap."""


def describe_coverage(samples: Sequence[Sample]) -> dict[str, Any]:
    """JSON-ready: `lengths` in tokens (least, median, most), `roles` (messages of each), `languages` (samples of each),
    and the data's label that these are from: where it has none, they are guessed from the script."""
    lengths = sorted(len(sample.ids) for sample in samples)
    roles = Counter(message["role"] for sample in samples for message in sample.item.messages)
    label = next((name for name in _LANGUAGE_LABELS if any(name in sample.item.labels for sample in samples)), None)
    if label:
        languages = Counter(sample.item.labels.get(label, "?") for sample in samples)
    else:
        languages = Counter(guess_language(sample.item) for sample in samples)
    return {
        "lengths": [lengths[0], lengths[len(lengths) // 2], lengths[-1]] if lengths else [],
        "roles": dict(sorted(roles.items())),
        "languages": dict(sorted(languages.items())),
        "languages_from": label or "the script",
    }


def guess_language(item: Item) -> str:
    """By the script of most letters; one of a language that mixes scripts with others' counts more. "?" for none."""
    return guess_script("".join(message["content"] for message in item.messages))


def guess_script(text: str) -> str:
    """The same of a text."""
    counts = {language: len(script.findall(text)) for language, script in _SCRIPTS}
    counts["zh"] *= 3  # a character is about a word
    if counts["ja"] > counts["zh"] // 12 and counts["ja"]:
        counts["ja"] += counts["zh"]
    best = max(counts, key=lambda language: counts[language])
    return best if counts[best] else "?"


def find_overlap(calibration: Sequence[AnySample], test: Sequence[AnySample]) -> dict[str, Any]:
    """How much of the test text the calibration text holds, in stretches of 13 tokens; JSON-ready.

    What all samples begin with (template, system prompt) is left out. `share` of the test samples' stretches,
    `mostly`: test samples of which at least half is there, `warning` where there are any.
    """
    rows = [sample.ids[:-1] for sample in (*calibration, *test)]
    pairs = zip(min(rows, default=()), max(rows, default=()), strict=False)  # in the order of a dictionary
    start = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    known = set(itertools.chain.from_iterable(_grams(sample, start) for sample in calibration))
    found = total = mostly = 0
    for sample in test:
        grams = _grams(sample, start)
        hits = sum(gram in known for gram in grams)
        found, total = found + hits, total + len(grams)
        mostly += bool(grams) and hits >= _MOSTLY * len(grams)
    overlap: dict[str, Any] = {"share": round(found / total, 4) if total else 0.0, "mostly": mostly}
    if mostly:
        overlap["warning"] = (
            f"at least half of each of {mostly} of {len(test)} test samples is also in the calibration text: "
            "what is measured on them is too good"
        )
    return overlap


def _grams(sample: AnySample, start: int) -> list[tuple[int, ...]]:
    """All stretches behind `start`; of a sample that is shorter, itself."""
    ids = sample.ids[start:]
    return [tuple(ids[at : at + _GRAM]) for at in range(max(1, len(ids) - _GRAM + 1))] if ids else []
