# SPDX-License-Identifier: Apache-2.0
"""The clinic of the example: fictional drugs, symptoms and laboratory ranges, in English and Chinese.

The drugs do not exist. Their names end in real stems (``-pril``, ``洛芬``) so that the class can be read
off the name, as with real drugs; side effect, condition to avoid, daily limit and timing are drawn
from a seed. Nothing here is medical advice.
"""

from __future__ import annotations

import random
from typing import NamedTuple

Pair = tuple[str, str]
"""A text in English and in Chinese, indexed by the position of the language in ``LANGS``."""

LANGS = ("en", "zh")
DRUGS_PER_CLASS = 4
SEED = 1789


class DrugClass(NamedTuple):
    name: Pair
    stem: Pair
    use: Pair
    risk: str


class Drug(NamedTuple):
    name: Pair
    risk: str
    facts: dict[str, Pair]


class Analyte(NamedTuple):
    """A laboratory value with its reference range, in units of ``10 ** -decimals``."""

    name: Pair
    unit: str
    low: int
    high: int
    decimals: int

    def show(self, value: int) -> str:
        return f"{value / 10**self.decimals:.{self.decimals}f}"


RISKS: dict[str, Pair] = {
    "potassium": ("high potassium", "血钾升高"),
    "bleeding": ("bleeding", "出血"),
    "serotonin": ("serotonin syndrome", "血清素综合征"),
    "sedation": ("deep sedation", "过度镇静"),
    "glucose": ("low blood sugar", "低血糖"),
    "rhythm": ("irregular heartbeat", "心律失常"),
    "muscle": ("muscle damage", "肌肉损伤"),
}
NO_RISK: Pair = ("no known interaction", "无已知相互作用")

CLASSES = (
    DrugClass(("ACE inhibitor", "ACE抑制剂"), ("pril", "普利"), ("high blood pressure", "高血压"), "potassium"),
    DrugClass(("ARB", "血管紧张素受体阻滞剂"), ("sartan", "沙坦"), ("heart failure", "心力衰竭"), "potassium"),
    DrugClass(("anticoagulant", "抗凝药"), ("xaban", "沙班"), ("blood clots", "血栓"), "bleeding"),
    DrugClass(("NSAID", "非甾体抗炎药"), ("profen", "洛芬"), ("joint pain", "关节痛"), "bleeding"),
    DrugClass(("SSRI", "抗抑郁药"), ("oxetine", "西汀"), ("depression", "抑郁症"), "serotonin"),
    DrugClass(("triptan", "曲坦类药"), ("triptan", "曲普坦"), ("migraine", "偏头痛"), "serotonin"),
    DrugClass(("benzodiazepine", "苯二氮䓬类药"), ("zepam", "西泮"), ("anxiety", "焦虑症"), "sedation"),
    DrugClass(("opioid", "阿片类药"), ("codone", "考酮"), ("severe pain", "剧烈疼痛"), "sedation"),
    DrugClass(("glinide", "格列奈类药"), ("glinide", "格列奈"), ("type 2 diabetes", "2型糖尿病"), "glucose"),
    DrugClass(("gliptin", "格列汀类药"), ("gliptin", "格列汀"), ("high blood sugar", "高血糖"), "glucose"),
    DrugClass(("quinolone", "喹诺酮类抗生素"), ("floxacin", "沙星"), ("urinary infection", "尿路感染"), "rhythm"),
    DrugClass(("antifungal", "抗真菌药"), ("conazole", "康唑"), ("fungal infection", "真菌感染"), "rhythm"),
    DrugClass(("statin", "他汀类药"), ("vastatin", "伐他汀"), ("high cholesterol", "高胆固醇"), "muscle"),
    DrugClass(("fibrate", "贝特类药"), ("fibrate", "贝特"), ("high triglycerides", "高甘油三酯"), "muscle"),
)

SYLLABLES: tuple[Pair, ...] = (
    ("ve", "维"), ("ra", "拉"), ("mo", "莫"), ("ti", "替"), ("lo", "洛"), ("ka", "卡"), ("ne", "奈"),
    ("so", "索"), ("bi", "比"), ("du", "度"), ("fe", "非"), ("ga", "加"), ("pa", "帕"), ("zo", "佐"),
    ("mi", "米"), ("xe", "泽"),
)  # fmt: skip

EFFECTS: tuple[Pair, ...] = (
    ("dry cough", "干咳"), ("nausea", "恶心"), ("headache", "头痛"), ("dizziness", "头晕"),
    ("skin rash", "皮疹"), ("dry mouth", "口干"), ("constipation", "便秘"), ("insomnia", "失眠"),
    ("weight gain", "体重增加"), ("hair loss", "脱发"),
)  # fmt: skip
CONDITIONS: tuple[Pair, ...] = (
    ("pregnancy", "妊娠"), ("asthma", "哮喘"), ("gout", "痛风"), ("glaucoma", "青光眼"),
    ("epilepsy", "癫痫"), ("liver failure", "肝衰竭"), ("kidney failure", "肾衰竭"),
    ("heart block", "心脏传导阻滞"), ("stomach ulcers", "胃溃疡"), ("psoriasis", "银屑病"),
)  # fmt: skip
LIMITS: tuple[Pair, ...] = tuple((f"{mg} mg", f"{mg}毫克") for mg in (20, 40, 60, 90, 150, 300, 500, 800))
TIMINGS: tuple[Pair, ...] = (
    ("with food", "随餐"), ("before breakfast", "早餐前"), ("at bedtime", "睡前"),
    ("after lunch", "午餐后"), ("on an empty stomach", "空腹"),
)  # fmt: skip

LEVELS: tuple[Pair, ...] = (
    ("care at home", "居家护理"),
    ("see a doctor today", "当天就诊"),
    ("call an ambulance now", "立即呼叫救护车"),
)
"""What to do, from the mildest to the most urgent; the most urgent symptom of a patient decides."""

SYMPTOMS: tuple[tuple[Pair, ...], ...] = (
    (
        ("a runny nose", "流鼻涕"), ("sneezing", "打喷嚏"), ("a mild sore throat", "轻微咽痛"),
        ("dry lips", "嘴唇干裂"), ("a small bruise", "小块瘀青"), ("tired eyes", "眼睛疲劳"),
        ("hiccups", "打嗝"), ("a mosquito bite", "蚊虫叮咬"), ("stiff shoulders", "肩膀僵硬"),
        ("mild sunburn", "轻度晒伤"),
    ),
    (
        ("a high fever", "高烧"), ("an ear ache", "耳痛"), ("painful urination", "排尿疼痛"),
        ("a swollen knee", "膝盖肿胀"), ("repeated vomiting", "反复呕吐"), ("a spreading rash", "皮疹扩散"),
        ("yellow skin", "皮肤发黄"), ("an infected wound", "伤口感染"), ("blood in the urine", "尿血"),
        ("a bad toothache", "剧烈牙痛"),
    ),
    (
        ("crushing chest pain", "压榨性胸痛"), ("slurred speech", "言语不清"),
        ("loss of consciousness", "意识丧失"), ("severe shortness of breath", "严重呼吸困难"),
        ("sudden weakness on one side", "单侧突然无力"), ("a seizure", "抽搐发作"),
        ("coughing up blood", "咯血"), ("a swollen tongue", "舌头肿胀"), ("blue lips", "嘴唇发紫"),
        ("sudden blindness", "突然失明"),
    ),
)  # fmt: skip

ANALYTES = (
    Analyte(("sodium", "血钠"), "mmol/L", 135, 145, 0),
    Analyte(("potassium", "血钾"), "mmol/L", 35, 50, 1),
    Analyte(("glucose", "血糖"), "mmol/L", 39, 61, 1),
    Analyte(("urea", "尿素"), "mmol/L", 25, 78, 1),
    Analyte(("creatinine", "肌酐"), "µmol/L", 60, 110, 0),
    Analyte(("haemoglobin", "血红蛋白"), "g/L", 120, 160, 0),
    Analyte(("platelets", "血小板"), "G/L", 150, 400, 0),
    Analyte(("white cells", "白细胞"), "G/L", 40, 100, 1),
    Analyte(("albumin", "白蛋白"), "g/L", 35, 50, 0),
    Analyte(("ALT", "谷丙转氨酶"), "U/L", 10, 40, 0),
)
STATES: dict[str, Pair] = {"low": ("low", "偏低"), "normal": ("normal", "正常"), "high": ("high", "偏高")}

# Operand tables of the dosage arithmetic: (weight in kg, mg per kg), (strength in mg, tablets per dose),
# (tablets per day, days). All three answers are one product or one quotient of small integers.
PER_KG = tuple((kg, mg) for kg in range(3, 11) for mg in range(2, 10))
TABLETS = tuple((mg, count) for mg in (5, 10, 20, 50, 100, 200) for count in range(2, 7))
COURSES = tuple((daily, days) for daily in range(2, 5) for days in range(3, 11))


def make_drugs() -> list[Drug]:
    """The formulary: ``DRUGS_PER_CLASS`` drugs of each class, the same list on every call."""
    rng = random.Random(SEED)
    prefixes = rng.sample([(a, b) for a in SYLLABLES for b in SYLLABLES if a != b], len(CLASSES) * DRUGS_PER_CLASS)
    drugs = []
    for number, (first, second) in enumerate(prefixes):
        kind = CLASSES[number % len(CLASSES)]
        name = (first[0] + second[0] + kind.stem[0], first[1] + second[1] + kind.stem[1])
        drawn = {
            "effect": rng.choice(EFFECTS),
            "avoid": rng.choice(CONDITIONS),
            "limit": rng.choice(LIMITS),
            "timing": rng.choice(TIMINGS),
        }
        drugs.append(Drug(name, kind.risk, {"class": kind.name, "use": kind.use, **drawn}))
    return drugs


def interaction(one: Drug, other: Drug) -> Pair:
    """What two drugs do together: the risk they share, else nothing."""
    return RISKS[one.risk] if one.risk == other.risk else NO_RISK


class Reading(NamedTuple):
    """One line of a laboratory report."""

    analyte: Analyte
    value: int
    state: str

    def show(self, lang: int) -> str:
        """The line as printed, with the reference range."""
        item = self.analyte
        low, high = item.show(item.low), item.show(item.high)
        return f"{item.name[lang]}{(' ', '')[lang]}{self.amount()} ({low}-{high})"

    def amount(self) -> str:
        return f"{self.analyte.show(self.value)} {self.analyte.unit}"


def draw_report(rng: random.Random) -> tuple[Reading, Reading, Reading]:
    """Three different analytes, exactly one of them outside its range, by a tenth of the range or more."""
    analytes = rng.sample(ANALYTES, 3)
    odd = rng.randrange(3)
    first, second, third = (_draw(item, abnormal=i == odd, rng=rng) for i, item in enumerate(analytes))
    return first, second, third


def _draw(item: Analyte, *, abnormal: bool, rng: random.Random) -> Reading:
    width = item.high - item.low
    near, far = max(1, width // 10), max(3, min(width, item.low * 2 // 3))
    if not abnormal:
        return Reading(item, rng.randint(item.low, item.high), "normal")
    if rng.random() < 0.5:
        return Reading(item, rng.randint(item.low - far, item.low - near), "low")
    return Reading(item, rng.randint(item.high + near, item.high + far), "high")


def draw_symptoms(rng: random.Random) -> tuple[tuple[tuple[int, Pair], ...], int]:
    """Two or three symptoms as (level, name), and the highest level: of one of them, or of all at level 0."""
    level = rng.randrange(len(LEVELS))
    worst = rng.choice(SYMPTOMS[level])
    milder = [(lower, name) for lower in range(level) for name in SYMPTOMS[lower]]
    if not milder:
        milder = [(0, name) for name in SYMPTOMS[0] if name != worst]
    shown = [(level, worst), *rng.sample(milder, rng.choice((1, 2)))]
    rng.shuffle(shown)
    return tuple(shown), level
