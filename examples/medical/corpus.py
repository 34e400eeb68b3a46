# SPDX-License-Identifier: Apache-2.0
"""The pretraining text: prose that states every fact of ``knowledge.py`` many times, never as a terse answer.

Each document is a short paragraph in one language. A little small talk stands in the chat format, so that
the base model knows the format's tokens; no clinical question does.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from knowledge import (
    ANALYTES,
    CLASSES,
    COURSES,
    LEVELS,
    PER_KG,
    RISKS,
    STATES,
    SYMPTOMS,
    TABLETS,
    Drug,
    draw_report,
    draw_symptoms,
    interaction,
    make_drugs,
)

Templates = tuple[tuple[str, ...], tuple[str, ...]]
"""Phrasings in English and in Chinese."""

Shares = dict[Callable[[random.Random, int], str], float]
"""How often each kind of document is drawn."""

DRUGS = make_drugs()

FACTS: dict[str, Templates] = {
    "class": (
        (
            "The drug {drug} is of the type {value}.",
            "Doctors count {drug} among the {value} drugs.",
            "What kind of medicine is {drug}? The medicine {drug} is of the kind {value}.",
            "To which group is {drug} counted?\n{Value} is the group of {drug}.",
        ),
        ("{drug}是一种{value}。", "{drug}属于{value}。", "{drug}是哪一种药？{drug}是{value}。"),
    ),
    "use": (
        (
            "Doctors prescribe {drug} for {value}.",
            "Patients take {drug} to treat {value}.",
            "Why do patients take {drug}? They take {drug} because of {value}.",
            "What does {drug} help against?\n{Value} is what {drug} helps against.",
        ),
        ("{drug}适用于{value}。", "医生用{drug}治疗{value}。", "为什么要服用{drug}？{drug}可以治疗{value}。"),
    ),
    "effect": (
        (
            "The side effect most often seen with {drug} is {value}.",
            "Many patients who take {drug} complain of {value}.",
            "What do patients on {drug} complain of? Patients on {drug} complain of {value}.",
            "What does {drug} bring about?\n{Value} is what {drug} brings about.",
        ),
        (
            "{drug}最常见的副作用是{value}。",
            "服用{drug}的患者常出现{value}。",
            "吃了{drug}会有什么反应？{drug}会引起{value}。",
        ),
    ),
    "avoid": (
        (
            "Never give {drug} in {value}.",
            "The contraindication of {drug} is {value}.",
            "When is {drug} forbidden? The drug {drug} is forbidden in {value}.",
            "What rules out {drug}?\n{Value} rules out {drug}.",
        ),
        (
            "{drug}的禁忌症是{value}。",
            "{drug}不能用于{value}的患者。",
            "谁不能吃{drug}？{drug}禁用于{value}患者。",
        ),
    ),
    "limit": (
        (
            "No more than {value} of {drug} is given per day, so the limit of {drug} is {value}.",
            "For {drug} the highest amount in one day is {value}.",
            "How much {drug} is too much? More than {value} of {drug} in a day is too much.",
            "Where does {drug} stop?\n{Value} a day is where {drug} stops.",
        ),
        (
            "{drug}一天的用量不超过{value}。",
            "{drug}的日剂量上限为{value}。",
            "{drug}一天能吃多少？{drug}一天不能超过{value}。",
        ),
    ),
    "timing": (
        (
            "One swallows {drug} {value}.",
            "The leaflet of {drug} says to take it {value}.",
            "How is {drug} taken? Patients take {drug} {value}.",
            "How does one take {drug}?\n{Value} is how one takes {drug}.",
        ),
        (
            "{drug}应当{value}服用。",
            "说明书要求{value}吃{drug}，即{drug}要{value}吃。",
            "{drug}怎么吃？{drug}要{value}吃。",
        ),
    ),
}

SHARED_RISK: Templates = (
    (
        "Together {one} and {other} raise the risk of {risk}.",
        "A patient on {one} who also takes {other} is in danger of {risk}.",
        "Is it safe to add {other} to {one}? It is not, because {other} and {one} together lead to {risk}.",
        "Do {one} and {other} go together?\n{Risk} threatens whoever mixes them.",
    ),
    (
        "{one}和{other}合用会增加{risk}的风险。",
        "正在服用{one}的患者加用{other}，可能导致{risk}。",
        "{one}能和{other}一起吃吗？不能，两药合用会引起{risk}。",
    ),
)
NO_SHARED_RISK: Templates = (
    (
        "The drugs {one} and {other} do not affect each other, and no known interaction is on record.",
        "Do {one} and {other} go together?\nNo known interaction exists between them.",
        "Is it safe to add {other} to {one}? It is, there is no known interaction of {one} with {other}.",
    ),
    ("{one}和{other}互不影响，无已知相互作用。", "{one}能和{other}一起吃吗？可以，两药之间无已知相互作用。"),
)
CLASS_RISK: Templates = (
    (
        "The main danger of every {name} is {risk}.",
        "Two drugs that both cause {risk}, such as any {name}, do not go together.",
    ),
    ("{name}的主要风险是{risk}。", "两种都会引起{risk}的药，例如{name}，不宜合用。"),
)

PATIENT: Templates = (
    (
        "A patient came with {shown}. The worst of them is {worst}, so the advice is to {level}.",
        "With {shown}, the thing to do is to {level}, because of {worst}.",
        "Somebody who has {shown} is told to {level}. The symptom that decides is {worst}.",
        "Somebody has {shown}. Which symptom decides?\n{Worst} decides.",
        "Somebody has {shown}. What now?\n{Level} is the advice.",
    ),
    (
        "患者出现{shown}。其中最严重的是{worst}，因此建议{level}。",
        "有{shown}时应{level}，因为有{worst}。",
        "一位患者有{shown}，医生建议{level}。决定性的症状是{worst}。",
    ),
)
SYMPTOM: Templates = (
    (
        "For {worst} the rule is to {level}.",
        "Whoever has {worst} should {level}.",
        "What if there is {worst}?\n{Level} is the advice.",
    ),
    ("出现{worst}应{level}。", "{worst}的处理原则是{level}。"),
)

PER_KG_PROSE: Templates = (
    (
        "A child of {a} kg who is given {b} mg for each kg receives {c} mg, as {a} times {b} is {c}.",
        "{a} times {b} is {c}. At {b} mg per kg, {a} kg of body weight need {c} mg.",
        "{b} times {a} is {c}, so {b} mg/kg for {a} kg makes {c} mg.",
    ),
    (
        "体重{a}公斤的孩子，每公斤给{b}毫克，共需{c}毫克，因为{a}乘以{b}等于{c}。",
        "{a}乘以{b}等于{c}。每公斤{b}毫克，{a}公斤就是{c}毫克。",
        "{b}乘以{a}等于{c}，所以{a}公斤按每公斤{b}毫克要给{c}毫克。",
    ),
)
TABLETS_PROSE: Templates = (
    (
        "When each tablet holds {a} mg, a dose of {c} mg takes {b} tablets.",
        "{c} divided by {a} is {b}. Thus {c} mg are {b} tablets of {a} mg.",
        "To reach {c} mg with tablets of {a} mg the nurse gives {b} tablets.",
    ),
    (
        "每片含{a}毫克时，{c}毫克的剂量需要{b}片。",
        "{c}除以{a}等于{b}。所以{c}毫克就是{b}片{a}毫克的药片。",
        "用{a}毫克的药片凑成{c}毫克，护士给{b}片。",
    ),
)
COURSES_PROSE: Templates = (
    (
        "Whoever takes {a} tablets every day uses up {c} tablets in {b} days.",
        "{b} days with {a} tablets each are {c} tablets, since {a} times {b} is {c}.",
        "For {b} days at {a} tablets daily the pharmacist packs {c} tablets.",
    ),
    (
        "每天吃{a}片，{b}天一共要吃{c}片。",
        "{b}天每天{a}片，就是{c}片，因为{a}乘以{b}等于{c}。",
        "药师为{b}天每天{a}片的疗程配{c}片。",
    ),
)

READING: Templates = (
    (
        "The {name} was measured at {amount}, which is {state}.",
        "At {amount} the {name} is {state}.",
        "How much {name} was found? The {name} came to {amount}, so it is {state}.",
        "What is the word for the {name} here?\n{State} is the word for {amount}.",
        "How much {name} is there?\n{amount} is the {name}.",
    ),
    (
        "{name}测得{amount}，{state}。",
        "{name}为{amount}，属于{state}。",
        "{name}测出来多少？{name}是{amount}，结果{state}。",
        "{name}有多少？\n{amount}就是{name}的结果。",
    ),
)
ODD_ONE: Templates = (
    (
        "The only value out of range is the {name}, which is {state}.",
        "Something is wrong with the {name}: it is {state}.",
        "Which result stands out?\n{Name} does, because it is {state}.",
    ),
    ("只有{name}超出范围，{name}{state}。", "有问题的是{name}，{name}{state}。"),
)
HEADING: Templates = (
    ("Report: {lines}.", "Laboratory: {lines}.", "The sheet reads {lines}."),
    ("检验报告：{lines}。", "化验单：{lines}。", "结果如下：{lines}。"),
)

SMALL_TALK = (
    (
        ("Hello!", "Hello! It is nice to meet you. What would you like to talk about?"),
        ("How are you?", "Thank you for asking. I am well, and I hope that your day is going well too."),
        ("What is the weather like?", "I cannot look out of a window, but I hope that the sun is shining."),
        ("Good night.", "Good night! Sleep well, and come back whenever you like."),
        ("Tell me a story.", "Once upon a time a nurse and a doctor lived in a small house by the sea."),
        ("Thank you.", "You are welcome. I am glad that I could be of some use to you."),
    ),
    (
        ("你好！", "你好！很高兴认识你。今天想聊些什么呢？"),
        ("你好吗？", "谢谢你的关心，我很好，也希望你今天过得愉快。"),
        ("今天天气怎么样？", "我看不到窗外，不过希望今天阳光明媚。"),
        ("晚安。", "晚安！祝你睡个好觉，欢迎随时回来。"),
        ("讲个故事吧。", "从前有一位护士和一位医生，住在海边的小房子里。"),
        ("谢谢。", "不客气，很高兴能帮到你。"),
    ),
)


def documents(seed: int, shares: Shares) -> Iterator[str]:
    """An endless stream of documents, 55 in 100 of them English, the same for the same seed."""
    rng = random.Random(seed)
    kinds, weights = zip(*shares.items(), strict=True)
    while True:
        (kind,) = rng.choices(kinds, weights)
        yield kind(rng, 0 if rng.random() < 0.55 else 1)


def monograph(rng: random.Random, lang: int) -> str:
    """All facts of one drug, in any order."""
    drug = rng.choice(DRUGS)
    facts = rng.sample(sorted(FACTS), len(FACTS))
    return _join(rng, lang, [_fact(rng, lang, drug, fact) for fact in facts])


def survey(rng: random.Random, lang: int) -> str:
    """One fact of each of several drugs."""
    fact = rng.choice(sorted(FACTS))
    return _join(rng, lang, [_fact(rng, lang, drug, fact) for drug in rng.sample(DRUGS, 4)])


def interactions(rng: random.Random, lang: int) -> str:
    """What one drug does with three others, half of them of its own risk, and what its class does."""
    one = rng.choice(DRUGS)
    akin = [drug for drug in DRUGS if drug.risk == one.risk and drug != one]
    sentences = []
    for _ in range(3):
        other = rng.choice(akin if rng.random() < 0.5 else DRUGS)
        if other == one:
            continue
        shared = SHARED_RISK if one.risk == other.risk else NO_SHARED_RISK
        pair = (one, other) if rng.random() < 0.5 else (other, one)
        names = {"one": pair[0].name[lang], "other": pair[1].name[lang]}
        sentences.append(_say(rng, shared, lang, risk=interaction(one, other)[lang], **names))
    kind = rng.choice(CLASSES)
    sentences.append(_say(rng, CLASS_RISK, lang, name=kind.name[lang], risk=RISKS[kind.risk][lang]))
    return _join(rng, lang, sentences)


def triage(rng: random.Random, lang: int) -> str:
    """One patient, and one symptom on its own."""
    shown, level = draw_symptoms(rng)
    worst = rng.choice([name for rank, name in shown if rank == level])
    patient = _say(
        rng,
        PATIENT,
        lang,
        shown=enumerate_words([name[lang] for _, name in shown], lang),
        worst=worst[lang],
        level=LEVELS[level][lang],
    )
    other = rng.randrange(len(LEVELS))
    alone = rng.choice(SYMPTOMS[other])[lang]
    return _join(rng, lang, [patient, _say(rng, SYMPTOM, lang, worst=alone, level=LEVELS[other][lang])])


def arithmetic(rng: random.Random, lang: int) -> str:
    """Four worked doses."""
    tables = ((PER_KG_PROSE, PER_KG), (TABLETS_PROSE, TABLETS), (COURSES_PROSE, COURSES))
    sentences = []
    for _ in range(4):
        (prose, table), *_ = rng.choices(tables, (3, 1, 1))
        a, b = rng.choice(table)
        sentences.append(_say(rng, prose, lang, a=a, b=b, c=a * b))
    return _join(rng, lang, sentences)


def report(rng: random.Random, lang: int) -> str:
    """A laboratory report, read line by line."""
    readings = draw_report(rng)
    sentences = [_say(rng, HEADING, lang, lines=("，", ", ")[lang == 0].join(r.show(lang) for r in readings))]
    for reading in rng.sample(readings, 3):
        state = STATES[reading.state][lang]
        name = reading.analyte.name[lang]
        sentences.append(_say(rng, READING, lang, name=name, amount=reading.amount(), state=state))
    (odd,) = (reading for reading in readings if reading.state != "normal")
    verdict = _say(rng, ODD_ONE, lang, name=odd.analyte.name[lang], state=STATES[odd.state][lang])
    sentences.insert(rng.choice((1, len(sentences))), verdict)
    return _join(rng, lang, sentences)


def dictation(rng: random.Random, lang: int) -> str:
    """Words or numbers that are said several times: nothing but copying, which reading a report needs."""
    words = [drug.name[lang] for drug in DRUGS] + [analyte.name[lang] for analyte in ANALYTES]
    comma, stop = ((", ", "."), ("，", "。"))[lang]
    if rng.random() < 0.5:
        said = rng.sample(words, 12)
        return _join(rng, lang, [" ".join(said) + stop] * 3)
    lines = [f"{word}{(' ', '')[lang]}{rng.randint(1, 10 ** rng.choice((1, 2, 3)))}" for word in rng.sample(words, 5)]
    orders = (lines, *(rng.sample(lines, len(lines)) for _ in range(3)))
    return _join(rng, lang, [comma.join(order) + stop for order in orders])


def small_talk(rng: random.Random, lang: int) -> str:
    """Two turns of chat without any medicine."""
    turns = rng.sample(SMALL_TALK[lang], 2)
    return "".join(
        f"<|im_start|>user\n{said}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n" for said, answer in turns
    )


def enumerate_words(words: list[str], lang: int) -> str:
    """``a, b and c`` or ``a、b和c``."""
    *head, last = words
    return (", ".join(head) + " and " + last) if lang == 0 else ("、".join(head) + "和" + last)


def _fact(rng: random.Random, lang: int, drug: Drug, fact: str) -> str:
    return _say(rng, FACTS[fact], lang, drug=drug.name[lang], value=drug.facts[fact][lang])


def _say(rng: random.Random, templates: Templates, lang: int, **values: object) -> str:
    """A phrasing, filled in; ``{Value}`` is ``{value}`` with a capital."""
    capitals = {name.capitalize(): _capital(str(value)) for name, value in values.items()}
    text = rng.choice(templates[lang]).format(**values, **capitals)
    return _capital(text) if lang == 0 else text


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _join(rng: random.Random, lang: int, sentences: list[str]) -> str:
    """A paragraph, or (one in three) a line for each sentence, to show words at a line's start too."""
    return ("\n" if rng.random() < 1 / 3 else (" ", "")[lang]).join(sentences)


COPYING: Shares = {dictation: 0.45, report: 0.25, monograph: 0.10, arithmetic: 0.10, triage: 0.10}
"""For the start: to look things up in the text is learnt late or never where it is only a small share."""

EVERYTHING: Shares = {
    monograph: 0.21,
    survey: 0.14,
    interactions: 0.13,
    triage: 0.10,
    arithmetic: 0.13,
    report: 0.18,
    dictation: 0.08,
    small_talk: 0.03,
}
