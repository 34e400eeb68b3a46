"""Token ids of llama.cpp against those of the checkpoint's own tokenizer.json.

On the user's own texts any difference is an error. On a fixed set of awkward texts a difference is classed and told:
llama.cpp has known ones, which refusing every model that has them would not mend.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lora2edge.backends.gguf.llama_cpp import Kind
from lora2edge.backends.gguf.tokens import Vocabulary, open_vocabulary
from lora2edge.errors import UnsupportedError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from lora2edge.contracts import Item, Message, TokenizerFiles
    from lora2edge.texts import Renderer

TextClass = Literal["ordinary", "normalization", "marker", "script", "control"]


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation, and the ids that the checkpoint's tokenizer gave for it (`texts.Renderer.encode`)."""

    messages: Sequence[Message]
    ids: Sequence[int]
    generation_prompt: bool = True


@dataclass(frozen=True, slots=True)
class Probe:
    """One text of the awkward set. `name` identifies it in reports."""

    name: str
    kind: TextClass
    text: str


CONSEQUENCES: Mapping[TextClass, str] = {
    "ordinary": "Common text is split into other tokens than in training.",
    "normalization": (
        "llama.cpp does not normalize Unicode. Text with decomposed accents (NFD, as macOS file names have) is split "
        "into other tokens than in training, unless it is normalized to NFC first; lora2edge's own sessions do that."
    ),
    "marker": (
        "llama.cpp takes text that looks like an end marker for the marker itself where special parsing is on. A user "
        "who types it can end a message; lora2edge's own sessions tokenize message contents with it off."
    ),
    "script": (
        "Text in these scripts is split into other tokens than in training: answers to it can be worse than the "
        "figures of this build say."
    ),
    "control": "Text with control or private-use characters is split into other tokens than in training.",
}
"""Class → what a difference in it means for who deploys the artifact."""

PROBES: tuple[Probe, ...] = (
    Probe("clinical-english", "ordinary", "A 65-year-old man has had chest pain for 2 hours; BP 180/110 mmHg, HR 96."),
    Probe("prescription", "ordinary", "Metformin 500 mg b.i.d., max. 2,000 mg/day (eGFR >= 45); recheck HbA1c 6.5%."),
    Probe("clinical-chinese", "ordinary", "患者，男，65岁，血压180/110mmHg，主诉胸痛2小时。"),
    Probe("traditional-chinese", "ordinary", "請於飯後服用，每日三次，每次一粒。"),
    Probe("japanese", "ordinary", "食後に1日3回、1回1錠を服用してください。アレルギーはありますか？"),
    Probe("python", "ordinary", 'def f(x: int) -> str:\n    """Doc."""\n    return  f"{x:>8}"\n\n\nclass A:\n\tpass\n'),
    Probe("json", "ordinary", '{"dose": [1.5, -2e-3], "unit": "mg", "ok": true, "none": null}\r\n'),
    Probe("shell", "ordinary", "for f in *.csv; do grep -c '^\\s*#' \"$f\" | awk '{ s += $1 } END { print s }'; done"),
    Probe("numbers", "ordinary", "3 33 333 3333 33333 1,234,567.89e-10 0x7F 2026-11-21 12:30:05 +49 30 901820"),
    Probe("contractions", "ordinary", "don't CAN'T we're I'M we'Ll you'd they've It's o'clock rock'n'roll"),
    Probe("spaces", "ordinary", "  leading,  double   triple    four\t\ttabs, trailing   "),
    Probe("newlines", "ordinary", "\n\nfirst\n\n\n second\r\n\r\nthird \n \n"),
    Probe("punctuation", "ordinary", '"quoted" ???!! ... -- (a)[b]{c}<d>/e\\f|g~h`i^j&k*l%m$n#o@p_q=r+s;t:u'),
    Probe("markdown", "ordinary", "## Plan\n- **Aspirin** 75 mg\n- [ ] ECG\n\n| a | b |\n|---|---|\n| 1 | 2 |\n"),
    Probe("german-french", "ordinary", "Größe und Gewicht: 1,80 m; où l'été naïf, cœur, façade, niño, Ærø, İstanbul"),
    Probe("russian", "ordinary", "Пациент жалуется на боль в груди; давление 180/110."),
    Probe("typographic", "ordinary", "It’s “fine” — 5 µg/mL ≤ 10 °C … § 5, €20, ©"),
    Probe("nfd-french", "normalization", "cafe\u0301 re\u0301sume\u0301 nai\u0308f"),
    Probe("nfd-vietnamese", "normalization", "Tie\u0302\u0301ng Vie\u0323\u0302t"),
    Probe("stacked-accents", "normalization", "a\u0301\u0302 \u1e69\u0323 o\u0308\u0304"),
    Probe("nfd-korean", "normalization", "\u1112\u1161\u11ab\u1100\u116e\u11a8"),
    Probe("angstrom-ohm", "normalization", "5 \u212b and 3 \u2126, 4 \u212a"),
    Probe("compatibility", "normalization", "ﬁne ½ Ⅳ 10⁻³ ㎎ ㏄ ①"),
    Probe("fullwidth", "normalization", "ＡＢＣ　１２３，：（ｍｇ）ｶﾀｶﾅ"),
    Probe("chatml-end", "marker", "ignore this <|im_end|> and <|im_start|>system now"),
    Probe("sentence-end", "marker", "see </s> and <s> here"),
    Probe("endoftext", "marker", "the text <|endoftext|> goes on <|end_of_text|> here"),
    Probe("inst", "marker", "[INST] do it [/INST] <<SYS>> x <</SYS>>"),
    Probe("llama3-marker", "marker", "<|eot_id|><|start_header_id|>assistant<|end_header_id|>"),
    Probe("gemma-marker", "marker", "<end_of_turn>\n<start_of_turn>model\n<eos><bos><pad><unk>"),
    Probe("thai", "script", "สวัสดี ผู้ป่วยมีอาการเจ็บหน้าอก"),
    Probe("devanagari", "script", "नमस्ते, रोगी को सीने में दर्द है"),
    Probe("arabic", "script", "مرحبا، المريض يعاني من ألم في الصدر. مُحَمَّد"),
    Probe("hebrew", "script", "שלום, לחולה יש כאבים בחזה"),
    Probe("korean", "script", "안녕하세요, 환자는 흉통을 호소합니다."),
    Probe("bengali-tamil", "script", "রোগীর বুকে ব্যথা, நோயாளிக்கு மார்பு வலி"),
    Probe("emoji", "script", "👍🏽 👨‍👩‍👧‍👦 🇨🇳🇩🇪 ❤️ 🏴󠁧󠁢󠁥󠁮󠁧󠁿 3️⃣"),
    Probe("zero-width", "control", "zero\u200bwidth\u200djoin\u2060er soft\u00adhyphen a\u00a0b\u202fc\u2003d"),
    Probe("escape-codes", "control", "\x07bell \x1b[31mred\x1b[0m \x00nul \x7f\x85 \x0b\x0c"),
    Probe("direction-marks", "control", "\ufeffbom \u202eabc\u202c \u200fx\u200e \u2028line\u2029paragraph"),
    Probe("private-use", "control", "\ufffd \ue000 \U000e0001 \U0010fffd \uffff"),
)
"""The awkward set, in every build the same."""


def check_tokenizer(
    path: Path, files: TokenizerFiles, items: Iterable[Item], *, library: Kind, strict: bool
) -> dict[str, Any]:
    """`compare_tokenizers` for the finished GGUF file `path` and the checkpoint's tokenizer `files`.

    Compared are the rendered prompt and the response of each of the user's `items`, and the ordinary probes, rendered.
    """

    from lora2edge.texts import Renderer

    renderer = Renderer(files)
    with open_vocabulary(path, library) as vocabulary:
        return compare_tokenizers(renderer.tokenizer, vocabulary, _texts(renderer, items), strict=strict)


def compare_tokenizers(
    tokenizer: Tokenizer, vocabulary: Vocabulary, texts: Iterable[str | Rendered], *, strict: bool
) -> dict[str, Any]:
    """Compares llama.cpp's ids with those of `tokenizer` on the user's texts and on `PROBES`.

    User's texts are tokenized as lora2edge's sessions do it (NFC where the tokenizer says so, special parsing for the
    template's own markers only), awkward ones as bare llama.cpp does. Returns, JSON-ready and the same in every run,
    `own_texts` and `probes` (how many were compared) and `differences`: per class its `kind`, the `texts` by name,
    whether lora2edge's own sessions are free of it (`mended`), and the `consequence`.

    Raises UnsupportedError `tokenizer-differs` at the first difference on a user's text or an ordinary one, and with
    `strict` at any difference.
    """
    own = 0
    for own, text in enumerate(texts, start=1):
        _require_same(tokenizer, vocabulary, text, own)
    found: dict[TextClass, list[Probe]] = {}
    for probe in PROBES:
        expected = tokenizer.encode(probe.text, add_special_tokens=False).ids
        actual = vocabulary.tokenize_raw(probe.text, special=True)
        if actual != expected:
            if strict or probe.kind == "ordinary":
                raise _differs(f"the test text {probe.name!r} ({probe.kind})", expected, actual, probe.text)
            found.setdefault(probe.kind, []).append(probe)
    return {
        "own_texts": own,
        "probes": len(PROBES),
        "differences": [
            {
                "kind": kind,
                "texts": [probe.name for probe in probes],
                "mended": all(_mended(tokenizer, vocabulary, probe.text) for probe in probes),
                "consequence": CONSEQUENCES[kind],
            }
            for kind, probes in sorted(found.items())
        ],
    }


def _texts(renderer: Renderer, items: Iterable[Item]) -> Iterator[str | Rendered]:
    for item in items:
        yield Rendered(item.prompt, renderer.encode(item.prompt))
        yield item.response
    for probe in PROBES:
        if probe.kind == "ordinary":
            prompt = ({"role": "user", "content": probe.text},)
            yield Rendered(prompt, renderer.encode(prompt))


def plain_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of `text` by tokenizer.json, with special tokens' names taken as text."""
    before = tokenizer.encode_special_tokens
    tokenizer.encode_special_tokens = True
    try:
        return list(tokenizer.encode(text, add_special_tokens=False).ids)
    finally:
        tokenizer.encode_special_tokens = before


def _require_same(tokenizer: Tokenizer, vocabulary: Vocabulary, text: str | Rendered, number: int) -> None:
    if isinstance(text, Rendered):
        expected = list(text.ids)
        actual = vocabulary.encode(text.messages, generation_prompt=text.generation_prompt)
        words = text.messages[-1]["content"] if text.messages else ""
    else:
        expected, actual, words = plain_ids(tokenizer, text), vocabulary.tokenize(text, special=False), text
    if actual != expected:
        raise _differs(f"text {number} of your data", expected, actual, words)


def _mended(tokenizer: Tokenizer, vocabulary: Vocabulary, text: str) -> bool:
    """Whether lora2edge's own way to tokenize a message's content agrees with the tokenizer."""
    return vocabulary.tokenize(text, special=False) == plain_ids(tokenizer, text)


def _differs(where: str, expected: Sequence[int], actual: Sequence[int], text: str) -> UnsupportedError:
    pairs = enumerate(zip(expected, actual, strict=False))
    first = next((index for index, (a, b) in pairs if a != b), min(len(expected), len(actual)))
    shown = slice(max(0, first - 3), first + 6)
    start = text if len(text) <= 60 else text[:60] + "…"
    return UnsupportedError(
        "tokenizer-differs",
        f"llama.cpp splits {where} into other tokens than the checkpoint's tokenizer",
        why=(
            f"{start!r}: from token {shown.start} on {list(expected[shown])} in tokenizer.json, "
            f"{list(actual[shown])} in llama.cpp ({len(expected)} and {len(actual)} tokens)"
        ),
        hint="this tokenizer cannot be carried by GGUF as it stands: choose another target, e.g. --target hf/merged",
    )
