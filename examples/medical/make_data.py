# SPDX-License-Identifier: Apache-2.0
"""Write ``data/{train,calibration,test}.jsonl``: clinical questions with short answers, English and Chinese.

A question is identified by what it asks (the drug and the attribute, the two drugs, the symptoms, the
operands, the report), whatever its phrasing or language. Questions are split before they are phrased,
so nothing that the test split asks is asked in ``train`` or ``calibration``.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from corpus import Templates, enumerate_words
from knowledge import (
    COURSES,
    LANGS,
    LEVELS,
    PER_KG,
    STATES,
    TABLETS,
    Pair,
    draw_report,
    draw_symptoms,
    interaction,
    make_drugs,
)

HERE = Path(__file__).parent
SEED = 20

FRAMES: Templates = (
    ("{}", "A patient asks: {}", "{} Answer briefly.", "Short answer, please. {}"),
    ("{}", "患者问：{}", "{}请直接回答。", "请简短回答：{}"),
)
DRUG: dict[str, Templates] = {
    "class": (
        ("Which class does {} belong to?", "What class of drug is {}?", "Name the drug class of {}."),
        ("{}属于哪类药物？", "{}是什么类别的药？"),
    ),
    "use": (
        ("What is {} used for?", "Which condition does {} treat?", "Name the indication of {}."),
        ("{}用于治疗什么？", "{}的适应症是什么？"),
    ),
    "effect": (
        ("What is the main side effect of {}?", "Which side effect is typical of {}?", "What may {} cause?"),
        ("{}的主要不良反应是什么？", "{}常引起什么副作用？"),
    ),
    "avoid": (
        (
            "In which condition must {} be avoided?",
            "Who should not take {}?",
            "Name the contraindication for {}.",
        ),
        ("哪种患者应避免使用{}？", "{}禁用于什么情况？"),
    ),
    "limit": (
        (
            "What is the maximum daily dose of {}?",
            "How much {} may be taken per day?",
            "Name the daily limit for {}.",
        ),
        ("{}的每日最大剂量是多少？", "每天最多可以服用多少{}？"),
    ),
    "timing": (
        ("When should {} be taken?", "What is the right time to take {}?", "How should a patient take {}?"),
        ("{}应该什么时候服用？", "{}的服药时间是？"),
    ),
}
INTERACTION: Templates = (
    (
        "What happens if {} is taken with {}?",
        "Name the interaction between {} and {}.",
        "Which risk do {} and {} share?",
    ),
    ("{}与{}同服有什么后果？", "{}和{}有什么相互作用？"),
)
URGENCY: Templates = (
    ("I have {}. What should I do?", "The patient reports {}. How urgent is it?", "Triage: {}."),
    ("我有{}，该怎么办？", "分诊：患者有{}。"),
)
RED_FLAG: Templates = (
    (
        "Which is the most urgent: {}?",
        "Name the red flag among {}.",
        "The patient reports {}. Which matters most?",
    ),
    ("{}中最紧急的是哪一个？", "患者有{}，哪个症状最危险？"),
)
DOSAGE: dict[str, Templates] = {
    "per_kg": (
        (
            "A child weighs {a} kg and needs {b} mg/kg. What is the dose?",
            "Dose for {a} kg at {b} mg per kg?",
            "How many mg does a patient of {a} kg get at {b} mg/kg?",
        ),
        ("患儿体重{a}公斤，每公斤{b}毫克，剂量是多少？", "按每公斤{b}毫克，{a}公斤的患者需要多少毫克？"),
    ),
    "tablets": (
        (
            "The dose is {c} mg and a tablet has {a} mg. How many tablets?",
            "How many {a} mg tablets make {c} mg?",
            "Tablets of {a} mg, dose {c} mg: how many?",
        ),
        ("剂量{c}毫克，每片{a}毫克，需要几片？", "{a}毫克的药片，{c}毫克是几片？"),
    ),
    "course": (
        (
            "{a} tablets a day for {b} days: how many tablets?",
            "How many tablets last {b} days at {a} per day?",
            "A course of {b} days, {a} tablets daily. What is the total?",
        ),
        ("每天{a}片，连服{b}天，共几片？", "疗程{b}天，每日{a}片，总共需要多少片？"),
    ),
}
DOSE_ANSWER: dict[str, Pair] = {
    "per_kg": ("{} mg", "{}毫克"),
    "tablets": ("{} tablets", "{}片"),
    "course": ("{} tablets", "{}片"),
}
PANEL: Templates = (
    ("Report: {lines}. {ask}", "Blood test: {lines}. {ask}"),
    ("检验报告：{lines}。{ask}", "化验单：{lines}。{ask}"),
)
READING: dict[str, Templates] = {
    "amount": (
        ("What is the {}?", "How high is the {}?", "Copy the value of {}."),
        ("{}是多少？", "{}的数值是？"),
    ),
    "state": (
        ("Is the {} low, normal or high?", "How do you judge the {}?", "Interpret the {}."),
        ("{}偏低、正常还是偏高？", "如何判断{}？"),
    ),
    "odd": (
        ("Which value is abnormal?", "Which result is out of range?", "Find the abnormal value."),
        ("哪项指标异常？", "哪个结果不正常？"),
    ),
}


class Question(NamedTuple):
    """What is asked, and every (prompt, response, language) that asks it."""

    key: tuple[object, ...]
    phrasings: list[tuple[str, str, str]]


def drugs(rng: random.Random) -> Iterator[Question]:
    for drug in make_drugs():
        for fact, value in drug.facts.items():
            asked = [[text.format(drug.name[lang]) for text in DRUG[fact][lang]] for lang in (0, 1)]
            yield Question((drug.name[0], fact), _phrase(asked, value))


def interactions(rng: random.Random) -> Iterator[Question]:
    """Every pair that interacts, and twice as many that do not."""
    formulary = make_drugs()
    pairs = [(one, other) for i, one in enumerate(formulary) for other in formulary[:i]]
    sharing = [pair for pair in pairs if pair[0].risk == pair[1].risk]
    others = rng.sample([pair for pair in pairs if pair[0].risk != pair[1].risk], 2 * len(sharing))
    for one, other in sharing + others:
        asked = [
            [
                text.format(*names)
                for text in INTERACTION[lang]
                for names in _both_ways(one.name[lang], other.name[lang])
            ]
            for lang in (0, 1)
        ]
        yield Question(tuple(sorted((one.name[0], other.name[0]))), _phrase(asked, interaction(one, other)))


def triage(rng: random.Random) -> Iterator[Question]:
    seen: set[tuple[object, ...]] = set()
    while len(seen) < 1400:
        shown, level = draw_symptoms(rng)
        key = tuple(sorted(name[0] for _, name in shown))
        if key in seen:
            continue
        seen.add(key)
        listed = [enumerate_words([name[lang] for _, name in shown], lang) for lang in (0, 1)]
        if level and rng.random() < 0.5:
            (answer,) = (name for rank, name in shown if rank == level)
            templates = RED_FLAG
        else:
            answer, templates = LEVELS[level], URGENCY
        asked = [[text.format(listed[lang]) for text in templates[lang]] for lang in (0, 1)]
        yield Question(key, _phrase(asked, answer))


def dosage(rng: random.Random) -> Iterator[Question]:
    for kind, table in (("per_kg", PER_KG), ("tablets", TABLETS), ("course", COURSES)):
        for a, b in table:
            asked = [[text.format(a=a, b=b, c=a * b) for text in DOSAGE[kind][lang]] for lang in (0, 1)]
            number = b if kind == "tablets" else a * b
            en, zh = DOSE_ANSWER[kind]
            yield Question((kind, a, b), _phrase(asked, (en.format(number), zh.format(number))))


def report(rng: random.Random) -> Iterator[Question]:
    """Readings of reports; the key is the report, so a test report is never shown in training."""
    seen: set[tuple[object, ...]] = set()
    for _ in range(5000):
        kind = rng.choice(sorted(READING))
        drawn = draw_report(rng)
        (odd,) = (reading for reading in drawn if reading.state != "normal")
        picked = odd if kind == "odd" or rng.random() < 0.4 else rng.choice(drawn)
        # A result is read on its own; the abnormal one is looked for beside a normal one.
        beside = [reading for reading in drawn if reading is not odd][:1] if kind == "odd" else []
        readings = [picked, *beside]
        rng.shuffle(readings)
        key = tuple(sorted((reading.analyte.name[0], reading.value) for reading in readings))
        if key in seen:
            continue
        seen.add(key)
        name = picked.analyte.name
        answers: dict[str, Pair] = {
            "amount": (picked.amount(),) * 2,
            "state": STATES[picked.state],
            "odd": name,
        }
        asked: list[list[str]] = []
        for lang in (0, 1):
            lines = (", ", "，")[lang].join(reading.show(lang) for reading in readings)
            asks = [text.format(name[lang]) for text in READING[kind][lang]]
            asked.append([frame.format(lines=lines, ask=ask) for frame in PANEL[lang] for ask in asks])
        yield Question(key, _phrase(asked, answers[kind]))


def _both_ways(one: str, other: str) -> tuple[tuple[str, str], tuple[str, str]]:
    return (one, other), (other, one)


def _phrase(asked: list[list[str]], answer: Pair) -> list[tuple[str, str, str]]:
    shown = (answer[0][0].upper() + answer[0][1:], answer[1])
    return [
        (frame.format(text), shown[lang], LANGS[lang])
        for lang in (0, 1)
        for text in asked[lang]
        for frame in FRAMES[lang]
    ]


# (topic, share of its questions that only the test split asks, phrasings per question in test, in training)
TOPICS = (
    (drugs, 0.20, 2, 8),
    (interactions, 0.10, 2, 3),
    (triage, 0.08, 1, 2),
    (dosage, 0.22, 4, 12),
    (report, 0.04, 1, 1),
)
CALIBRATION_ITEMS = 320


def _pick(rng: random.Random, question: Question, count: int) -> list[tuple[str, str, str]]:
    """``count`` different phrasings, each English with probability 0.6 as far as there are enough."""
    english, chinese = ([asked for asked in question.phrasings if asked[2] == lang] for lang in LANGS)
    wanted = sum(rng.random() < 0.6 for _ in range(count))
    wanted = min(max(wanted, count - len(chinese)), len(english))
    return rng.sample(english, wanted) + rng.sample(chinese, count - wanted)


def make_splits() -> dict[str, list[dict[str, str]]]:
    """The rows of each split."""
    rng = random.Random(SEED)
    learn: list[dict[str, str]] = []
    test: list[dict[str, str]] = []
    for topic, share, per_test, per_train in TOPICS:
        questions = list(topic(rng))
        rng.shuffle(questions)
        held_out = round(share * len(questions))
        groups = ((test, questions[:held_out], per_test), (learn, questions[held_out:], per_train))
        assert not {q.key for q in questions[:held_out]} & {q.key for q in questions[held_out:]}
        for rows, asked, count in groups:
            for question in asked:
                for prompt, response, lang in _pick(rng, question, count):
                    rows.append({"prompt": prompt, "response": response, "topic": topic.__name__, "lang": lang})
    rng.shuffle(learn)
    assert not {row["prompt"] for row in test} & {row["prompt"] for row in learn}
    return {"train": learn[CALIBRATION_ITEMS:], "calibration": learn[:CALIBRATION_ITEMS], "test": test}


def main() -> None:
    (HERE / "data").mkdir(exist_ok=True)
    for name, rows in make_splits().items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (HERE / "data" / f"{name}.jsonl").write_text(text, encoding="utf-8")
        print(name, len(rows), dict(Counter(f"{row['topic']}/{row['lang']}" for row in rows)))


if __name__ == "__main__":
    main()
