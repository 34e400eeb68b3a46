"""How a tokenizer.json splits text before BPE → the name under which llama.cpp has the same code.

llama.cpp holds each pre-tokenizer as compiled-in regexes and knows it by name (src/llama-vocab.cpp, 0.5 and 0.6).
Its own converter finds the name by hashing the tokens of one text; here the structure itself is compared, so that a
tokenizer which was retrained or extended is recognised, and an unknown one is refused instead of guessed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from lora2edge.errors import UnsupportedError

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED_HEAD = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
_CASED_TAIL = r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
_CASED_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LETTERS = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+"
_LLAMA3 = _LETTERS + r"|\p{N}{1,3}" + _REST
_QWEN2 = _LETTERS + r"|\p{N}" + _REST
_QWEN35 = (
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = _CASED_HEAD + _CASED_TAIL + r"|\p{N}" + _CASED_REST
_GPT_4O = _CASED_HEAD + _CONTRACTIONS + "?" + _CASED_TAIL + _CONTRACTIONS + "?" + r"|\p{N}{1,3}" + _CASED_REST
_GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_HAN = "[一-龥\u0800-一가-\ud7ff]+"
_DEEPSEEK_LETTERS = (
    r"\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-ώᾀ-ᾴᾶ-ᾼι"
    r"ῂ-ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤΩℨK-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃]+"
)
_DEEPSEEK_V3_REST = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
).replace('\\"', '"')

# Steps in order ("digits" = each digit alone), and whether whole words skip the merges → llama.cpp's name.
_NAMES: Mapping[tuple[tuple[str, ...], bool], str] = {
    ((_GPT_2,), False): "gpt-2",
    (("digits", _GPT_2), False): "smollm",
    ((r"\p{N}", _GPT_2), False): "smollm",
    ((_LLAMA3,), True): "llama-bpe",
    ((_LLAMA3,), False): "dbrx",
    ((_QWEN2,), False): "qwen2",
    ((_QWEN35,), False): "qwen35",
    ((_TEKKEN,), True): "tekken",
    ((_GPT_4O,), False): "gpt-4o",
    ((r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", _DEEPSEEK_V3_REST), False): "deepseek-v3",
    ((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _HAN, "digits"), False): "deepseek-coder",
    ((r"[\r\n]", _DEEPSEEK_LETTERS, r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+$", _HAN, "digits"), False): "deepseek-llm",
}


def pre_tokenizer_name(tokenizer: Mapping[str, Any]) -> str:
    """llama.cpp's name for the pre-tokenizer of a byte-level BPE. Raises UnsupportedError `gguf-pre-tokenizer`."""
    stored = tokenizer.get("pre_tokenizer") or {}
    steps = tuple(_steps(stored))
    whole_words = bool(tokenizer["model"].get("ignore_merges", False))
    name = _NAMES.get((steps, whole_words))
    if name:
        return name
    text = json.dumps(stored, ensure_ascii=False)
    raise UnsupportedError(
        "gguf-pre-tokenizer",
        "llama.cpp has no pre-tokenizer like this tokenizer.json's",
        why=f"ignore_merges {whole_words}, pre_tokenizer {text[:300]}{'…' if len(text) > 300 else ''}",
        hint="known: " + ", ".join(sorted(set(_NAMES.values()))),
    )


def _steps(stored: Mapping[str, Any]) -> Iterator[str]:
    """The regexes that text goes through, in order; ends with the byte-level step, which has one of its own or none."""
    parts = stored.get("pretokenizers", [stored])
    for index, part in enumerate(parts):
        kind = part.get("type")
        if kind == "Split":
            yield _split(part)
        elif kind == "Digits" and part.get("individual_digits"):
            yield "digits"
        elif kind == "ByteLevel" and index == len(parts) - 1 and not part.get("add_prefix_space"):
            if part.get("use_regex", True):
                yield _GPT_2
            return
        else:
            yield f"unknown {kind}"
    yield "no byte level"


def _split(part: Mapping[str, Any]) -> str:
    """The regex of a Split that keeps every match as a piece of its own; line ends spelled as escapes."""
    pattern = part.get("pattern", {}).get("Regex")
    how = (part.get("behavior"), bool(part.get("invert")))
    if pattern is None or how not in {("Isolated", False), ("Removed", True)}:
        return "unknown Split"
    return str(pattern).replace("\r", r"\r").replace("\n", r"\n")
