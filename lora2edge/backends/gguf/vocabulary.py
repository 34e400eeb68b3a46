"""The tokenizer: tokenizer.json → llama.cpp's vocabulary, special ids and chat templates.

Two kinds are known: byte-level BPE (`gpt2`), and SentencePiece-like BPE with byte fallback (`llama`), whose merges
llama.cpp replays by score. Whatever llama.cpp cannot replay is refused before a weight is read.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora2edge.backends.gguf.container import Metadata
from lora2edge.backends.gguf.pretokenizers import pre_tokenizer_name
from lora2edge.backends.gguf.tokens import NORMALIZER_KEY
from lora2edge.checkpoint import read_tokenizer_file
from lora2edge.contracts import TokenizerFiles
from lora2edge.errors import CheckpointError, UnsupportedError

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
# Below every merge rank: text that no merge makes is put together last. Ids of added tokens come after all others.
_NO_MERGE, _NO_TEXT = -1e6, -1e7
_SPACE = "▁"
# llama.cpp ends generation at these whatever the file says (src/llama-vocab.cpp).
_KNOWN_ENDS = frozenset(
    {
        "<|eot_id|>",
        "<|im_end|>",
        "<|end|>",
        "<|return|>",
        "<|call|>",
        "<|flush|>",
        "<|calls|>",
        "<end_of_turn>",
        "<|endoftext|>",
        "</s>",
        "<|eom_id|>",
        "<EOT>",
        "_<EOT>",
        "[EOT]",
        "[EOS]",
        "<|end_of_text|>",
        "<end_of_utterance>",
        "<eos>",
        "<｜end▁of▁sentence｜>",
    }
)
_SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
"""transformers' name of a special token → llama.cpp's."""
SPECIAL_IDS = tuple(f"{kind}_token_id" for kind in _SPECIAL)
"""What is read from config.json."""
_PHI3_KEEPS_SPACE = frozenset({"<unk>", "<s>", "<|endoftext|>"})


@dataclass(frozen=True, slots=True)
class TokenizerSection:
    """What the file's tokenizer section will hold."""

    metadata: Metadata
    pre_tokenizer: str
    """llama.cpp's name; "default" for SentencePiece."""
    normalizer: str | None
    """"NFC" where text must be normalized before llama.cpp sees it, which does not do it."""
    template_sha256: str | None
    strips_like_phi3: bool
    """Whether special tokens swallow the space that follows: llama.cpp does that for models named Phi-3 only."""
    notes: tuple[str, ...]


def read_vocabulary(files: TokenizerFiles, config: Mapping[str, Any], rows: int) -> TokenizerSection:
    """The vocabulary, filled up to the embedding's `rows`. Raises UnsupportedError, CheckpointError."""
    tokenizer = read_tokenizer_file(files, "tokenizer.json")
    if not tokenizer:
        raise UnsupportedError(
            "gguf-tokenizer",
            "the checkpoint has no tokenizer.json",
            why="other tokenizer files are not read",
            hint="AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)",
        )
    settings = read_tokenizer_file(files, "tokenizer_config.json")
    generation = read_tokenizer_file(files, "generation_config.json")
    model = tokenizer.get("model") or {}
    sentencepiece = bool(model.get("byte_fallback"))
    _check_model(model)
    tokens, types = _tokens(tokenizer, rows, sentencepiece)
    metadata: Metadata = {"tokenizer.ggml.tokens": ("strings", tokens), "tokenizer.ggml.token_type": ("i32s", types)}
    if sentencepiece:
        pre, normalizer = "default", None
        model_name = "llama"
        metadata["tokenizer.ggml.scores"] = ("f32s", _scores(model, tokens, types))
        metadata["tokenizer.ggml.add_space_prefix"] = ("bool", _space_prefix(tokenizer))
    else:
        pre, normalizer = pre_tokenizer_name(tokenizer), _byte_level_normalizer(tokenizer)
        model_name = "gpt2"
        metadata["tokenizer.ggml.merges"] = ("strings", _merges(model))
    special, notes = _special(tokenizer, settings, generation, config, tokens)
    if normalizer:
        metadata[NORMALIZER_KEY] = ("str", normalizer)
    metadata |= {"tokenizer.ggml.model": ("str", model_name), "tokenizer.ggml.pre": ("str", pre), **special}
    templates = _templates(files, settings)
    for name, text in templates.items():
        suffix = "" if name == "default" else "." + re.sub(r"[^A-Za-z0-9]", "_", name)
        metadata[f"tokenizer.chat_template{suffix}"] = ("str", text)
    named = sorted(name for name in templates if name != "default")
    if named:
        metadata["tokenizer.chat_templates"] = ("strings", [re.sub(r"[^A-Za-z0-9]", "_", name) for name in named])
    strips, stripping_notes = _stripping(tokenizer)
    template = templates.get("default")
    return TokenizerSection(
        metadata=metadata,
        pre_tokenizer=pre,
        normalizer=normalizer,
        template_sha256=hashlib.sha256(template.encode()).hexdigest() if template else None,
        strips_like_phi3=strips,
        notes=(*notes, *stripping_notes),
    )


def _check_model(model: Mapping[str, Any]) -> None:
    if model.get("type") != "BPE":
        raise UnsupportedError(
            "gguf-tokenizer", f"the tokenizer is a {model.get('type')} model", why="BPE is known, with or without bytes"
        )
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise UnsupportedError(
                "gguf-tokenizer", f"the tokenizer's {key} is set", why="llama.cpp has nothing like it"
            )


def _tokens(tokenizer: Mapping[str, Any], rows: int, sentencepiece: bool) -> tuple[list[str], list[int]]:
    """Text and type of every id. Ids that nothing is written for are unused."""
    model = tokenizer["model"]
    texts: list[str | None] = [None] * rows
    types = [_UNUSED] * rows
    for text, index in model["vocab"].items():
        _fits(text, index, rows)
        texts[index], types[index] = text, _NORMAL
        if sentencepiece and len(text) == 6 and re.fullmatch("<0x[0-9A-F]{2}>", text):
            types[index] = _BYTE
    if sentencepiece:
        # Gemma 2 has a tab in the place of <0x09>, which llama.cpp takes as well.
        missing = [byte for byte in range(256) if f"<0x{byte:02X}>" not in model["vocab"]]
        if any(byte > 127 or chr(byte) not in model["vocab"] for byte in missing):
            raise UnsupportedError(
                "gguf-tokenizer",
                f"the tokenizer falls back to bytes, and has {256 - len(missing)} of the 256",
                why="llama.cpp needs them all",
            )
    for added in tokenizer.get("added_tokens", []):
        text, index = added["content"], added["id"]
        _fits(text, index, rows)
        control = added.get("special") or _looks_special(text)
        # A run of spaces is stored as text has it: llama.cpp looks for it before spaces become ▁.
        texts[index] = text if control else text.replace(_SPACE, " ")
        types[index] = _CONTROL if control else _USER_DEFINED
        if text == model.get("unk_token"):
            types[index] = _UNKNOWN
    taken = {text for text in texts if text is not None}
    if len(taken) != sum(text is not None for text in texts):
        twice = sorted({text for text in texts if text is not None and texts.count(text) > 1})[:4]
        raise UnsupportedError(
            "gguf-tokenizer",
            f"two ids have the same text: {', '.join(map(repr, twice))}",
            why="llama.cpp cannot load that",
        )
    return [text if text is not None else _filler(index, taken) for index, text in enumerate(texts)], types


def _fits(text: str, index: int, rows: int) -> None:
    if not 0 <= index < rows:
        raise CheckpointError(
            "vocabulary-size",
            f"the tokenizer's {text!r} has id {index}, the embedding has {rows} rows",
            why="the tokenizer does not belong to this checkpoint, or its embedding was not resized",
        )


def _filler(index: int, taken: set[str]) -> str:
    text = f"[PAD{index}]"
    while text in taken:
        text += "_"
    return text


def _looks_special(text: str) -> bool:
    """Markers that some checkpoints do not flag as special. As llama.cpp's converter has it: it matters to whoever
    types one into a message, which must not become a marker."""
    return (
        text in {"<pad>", "<mask>", "<2mass>", "[@BOS@]"}
        or (text.startswith("<|") and text.endswith("|>"))
        or (text.startswith("<｜") and text.endswith("｜>"))
        or (text.startswith("<unused") and text.endswith(">"))
    )


def _pairs(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The merges, which are stored as "a b" or as ["a", "b"]."""
    merges = model.get("merges") or []
    try:
        if all(isinstance(item, str) for item in merges):
            return [(a, b) for a, b in map(str.split, merges, itertools.repeat(" "))]
        return [(a, b) for a, b in merges]
    except ValueError as error:
        raise CheckpointError("tokenizer-unreadable", "a merge of tokenizer.json is no pair", why=str(error)) from error


def _merges(model: Mapping[str, Any]) -> list[str]:
    pairs = _pairs(model)
    if not pairs:
        raise UnsupportedError("gguf-tokenizer", "the tokenizer has no merges", why="llama.cpp needs one at least")
    # A space inside a part would read as the separator; in byte-level text it is never written as itself.
    return [f"{a} {b}" if " " not in a + b else f"{a.replace(' ', 'Ġ')} {b.replace(' ', 'Ġ')}" for a, b in pairs]


def _scores(model: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int]) -> list[float]:
    """llama.cpp merges what has the highest score: minus the rank of the first merge that makes the token.

    tokenizer.json does not keep SentencePiece's scores, but their order. With equal scores text is cut wrongly.
    """
    ranks: dict[str, int] = {}
    for rank, (a, b) in enumerate(_pairs(model)):
        ranks.setdefault(a + b, rank)
    scores = []
    for text, kind in zip(tokens, types, strict=True):
        if kind == _BYTE:
            scores.append(0.0)
        elif kind == _NORMAL:
            scores.append(-float(ranks[text]) if text in ranks else _NO_MERGE)
        else:
            scores.append(_NO_TEXT)
    return scores


def _space_prefix(tokenizer: Mapping[str, Any]) -> bool:
    """Whether a ▁ is put before text, after checking that spaces become ▁ and nothing else happens."""
    stored = tokenizer.get("normalizer")
    steps = (stored.get("normalizers", [stored])) if stored else []
    kinds = [step.get("type") for step in steps]
    replaced = any(step == {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE} for step in steps)
    prefix = any(step == {"type": "Prepend", "prepend": _SPACE} for step in steps)
    pre = tokenizer.get("pre_tokenizer") or {}
    parts = pre.get("pretokenizers", [pre]) if pre else []
    metaspace = [part for part in parts if part.get("type") == "Metaspace" and part.get("replacement") == _SPACE]
    # After the normalizer no space is left, so that Gemma's split at spaces does nothing.
    idle = [
        part for part in parts if part.get("type") == "Split" and part.get("pattern") == {"String": " "} and replaced
    ]
    known = set(kinds) <= {"Replace", "Prepend"} and len(kinds) == replaced + prefix
    if not known or len(metaspace) + len(idle) != len(parts) or replaced == bool(metaspace):
        text = json.dumps({"normalizer": stored, "pre_tokenizer": pre or None}, ensure_ascii=False)
        raise UnsupportedError(
            "gguf-tokenizer",
            "the tokenizer does more to text than turning spaces into ▁",
            why=f"llama.cpp does nothing else: {text[:300]}",
        )
    if metaspace:
        scheme = metaspace[0].get("prepend_scheme", "always" if metaspace[0].get("add_prefix_space", True) else "never")
        return bool(scheme != "never")
    return prefix


def _byte_level_normalizer(tokenizer: Mapping[str, Any]) -> str | None:
    stored = tokenizer.get("normalizer")
    steps = (stored.get("normalizers", [stored])) if stored else []
    kinds = [str(step.get("type")) for step in steps]
    if kinds not in ([], ["NFC"]):
        raise UnsupportedError(
            "gguf-tokenizer",
            f"the tokenizer normalizes text: {', '.join(kinds)}",
            why="NFC is known; llama.cpp has none",
        )
    return kinds[0] if kinds else None


def _special(
    tokenizer: Mapping[str, Any],
    settings: Mapping[str, Any],
    generation: Mapping[str, Any],
    config: Mapping[str, Any],
    tokens: Sequence[str],
) -> tuple[Metadata, list[str]]:
    """Ids of the special tokens, and whether encoding adds them."""
    index = {text: i for i, text in enumerate(tokens)}
    ids: dict[str, int] = {}
    for kind, key in _SPECIAL.items():
        named = settings.get(f"{kind}_token")
        text = named.get("content") if isinstance(named, Mapping) else named
        candidates = [index.get(text) if isinstance(text, str) else None]
        candidates += _ids(config.get(f"{kind}_token_id")) + _ids(generation.get(f"{kind}_token_id"))
        found = next((i for i in candidates if i is not None and 0 <= i < len(tokens)), None)
        if found is not None:
            ids[key] = found
    if "eos" not in ids:
        raise UnsupportedError(
            "gguf-tokenizer",
            "no end token is named",
            why="llama.cpp would take token 11 for it",
            hint="set eos_token in tokenizer_config.json, or eos_token_id in config.json",
        )
    metadata: Metadata = {f"tokenizer.ggml.{key}_token_id": ("u32", value) for key, value in ids.items()}
    # llama.cpp keeps one end of sequence and one end of turn, and knows some more by their text.
    ends = [i for i in _ids(generation.get("eos_token_id")) if i is not None and 0 <= i < len(tokens)]
    others = [i for i in ends if i != ids["eos"] and tokens[i] not in _KNOWN_ENDS]
    if others:
        metadata["tokenizer.ggml.eot_token_id"] = ("u32", others[0])
    notes = [f"llama.cpp will not stop at {tokens[i]!r}, an end in generation_config.json" for i in others[1:]]
    for kind in ("bos", "eos"):
        adds = _adds(tokenizer, settings, kind, tokens[ids[kind]] if kind in ids else None)
        metadata[f"tokenizer.ggml.add_{kind}_token"] = ("bool", adds)
    return metadata, notes


def _ids(value: Any) -> list[int | None]:
    values = value if isinstance(value, list) else [value]
    return [item if isinstance(item, int) and not isinstance(item, bool) else None for item in values]


def _adds(tokenizer: Mapping[str, Any], settings: Mapping[str, Any], kind: str, text: str | None) -> bool:
    """Whether encoding adds the token: at the start (bos) or the end (eos). tokenizer_config.json wins."""
    if text is None:
        return False
    said = settings.get(f"add_{kind}_token")
    if isinstance(said, bool):
        return said
    stored = tokenizer.get("post_processor") or {}
    for processor in stored.get("processors", [stored]):
        template = processor.get("single") or []
        if processor.get("type") == "TemplateProcessing" and template:
            edge = template[0 if kind == "bos" else -1]
            return bool(edge.get("SpecialToken", {}).get("id") == text)
    return False


def _templates(files: TokenizerFiles, settings: Mapping[str, Any]) -> dict[str, str]:
    """Chat templates by name. chat_template.jinja wins over tokenizer_config.json, as in transformers."""
    stored = settings.get("chat_template")
    if isinstance(stored, str):
        templates = {"default": stored}
    elif isinstance(stored, list):
        templates = {str(item["name"]): str(item["template"]) for item in stored if "template" in item}
    else:
        templates = {}
    path = files.files.get("chat_template.jinja")
    if path is not None:
        templates["default"] = Path(path).read_text(encoding="utf-8")
    return templates


def _stripping(tokenizer: Mapping[str, Any]) -> tuple[bool, tuple[str, ...]]:
    """Added tokens that swallow spaces beside them. llama.cpp has one such rule, for models that are named Phi-3."""
    added = tokenizer.get("added_tokens", [])
    special = {item["content"] for item in added if item.get("special")}
    right = {item["content"] for item in added if item.get("rstrip")}
    left = {item["content"] for item in added if item.get("lstrip")}
    if not right and not left:
        return False, ()
    if not left and special >= _PHI3_KEEPS_SPACE and right - {"</s>"} == special - _PHI3_KEEPS_SPACE - {"</s>"}:
        return True, ()
    some = ", ".join(sorted(right | left)[:4])
    return False, (f"the tokenizer drops spaces beside {some}; llama.cpp keeps them",)
