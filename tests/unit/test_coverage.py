"""What a set of samples covers, and its overlap with another, counted by hand."""

from __future__ import annotations

import pytest

from lora2edge.contracts import Item, Sample
from lora2edge.texts.coverage import describe_coverage, find_overlap, guess_language


def item(text: str, **labels: str) -> Item:
    return Item(({"role": "user", "content": text}, {"role": "assistant", "content": ""}), labels)


def sample(*ids: int, text: str = "a", **labels: str) -> Sample:
    return Sample(ids, 1, item(text, **labels))


@pytest.mark.parametrize(
    ("text", "language"),
    [("What is iron?", "en"), ("缺铁有什么症状？", "zh"), ("每天 200 mg ibuprofen 会伤胃吗？", "zh"),  # noqa: RUF001
     ("鉄欠乏の症状は何ですか", "ja"), ("철분 결핍", "ko"), ("Что такое железо?", "ru"), ("ما هو الحديد", "ar"),
     ("123 !", "?"), ("The point 穴 is pressed for some minutes each day", "en")],
)  # fmt: skip
def test_languages_by_script(text: str, language: str) -> None:
    assert guess_language(item(text)) == language


def test_coverage_is_counted() -> None:
    texts = [sample(1, 2, 3, text="hello"), sample(1, text="你好"), sample(1, 2, text="hi")]
    assert describe_coverage(texts) == {
        "lengths": [1, 2, 3],
        "roles": {"assistant": 3, "user": 3},
        "languages": {"en": 2, "zh": 1},
        "languages_from": "the script",
    }
    labelled = [sample(1, text="hello", lang="de"), sample(1)]
    assert describe_coverage(labelled)["languages"] == {"?": 1, "de": 1}
    assert describe_coverage(labelled)["languages_from"] == "lang"
    assert describe_coverage([])["lengths"] == []


def test_overlap_is_counted_in_stretches_of_13_tokens() -> None:
    template = tuple(range(1000, 1100))
    calibration = [sample(*template, *range(50)), sample(*template, *range(500, 520))]
    own = sample(*template, *range(200, 250))
    assert find_overlap(calibration, [own]) == {"share": 0.0, "mostly": 0}
    partly = sample(*template, *range(13), *range(300, 337))  # 1 of 38 stretches
    assert find_overlap(calibration, [partly]) == {"share": round(1 / 38, 4), "mostly": 0}
    half = sample(*template, *range(25), *range(400, 407))  # 13 of 20
    found = find_overlap(calibration, [half, own])
    assert found["share"] == round(13 / 58, 4)
    assert found["mostly"] == 1
    assert "1 of 2 test samples" in found["warning"]


def test_samples_shorter_than_a_stretch_are_compared_whole() -> None:
    assert find_overlap([sample(1, 2, 3), sample(9)], [sample(1, 2, 3)])["mostly"] == 1
    assert find_overlap([sample(1, 2, 3), sample(9)], [sample(1, 2)])["mostly"] == 0
    assert find_overlap([sample(1, 2)], [sample(1, 2)])["mostly"] == 1
