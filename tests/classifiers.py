"""Tiny classifiers, adapters and labelled data, made by the tests that use them, as tests/tiny.py does language models.

Everything is a pure function of its arguments.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.tiny import VOCAB, bpe_tokenizer, randomize, shake_adapter

CLASSES = ("fever", "fracture", "rash")
TAGS = ("O", "B-DRUG", "I-DRUG")
_SIGNS = {
    "fever": ("chills", "a high temperature", "sweating at night", "a hot forehead"),
    "fracture": ("a swollen wrist", "a fall from a ladder", "pain in the hip", "a broken ankle"),
    "rash": ("red spots", "itching skin", "blisters on the arm", "a peeling patch"),
}
_DRUGS = (("warfarin",), ("acetylsalicylic", "acid"), ("insulin", "glargine"), ("ibuprofen",))
_WORDS = ("takes", "daily", "with", "water", "since", "May", "and", "sleeps", "well")


def make_classifier(
    folder: Path,
    kind: str = "bert",
    task: str = "SequenceClassification",
    *,
    labels: Sequence[str] = CLASSES,
    dtype: str = "float32",
    head: bool = True,
    **config: Any,
) -> Path:
    """A checkpoint folder with a classification head, or, without `head`, of the language model that training starts
    from. `kind`: bert, roberta, distilbert (WordPiece, or byte-level BPE for roberta) or llama."""
    import torch
    import transformers

    encoder = kind != "llama"
    sizes: dict[str, Any] = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
        "vocab_size": VOCAB, "pad_token_id": 0, "max_position_embeddings": 96,
    }  # fmt: skip
    if kind == "distilbert":
        sizes = {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48, "vocab_size": VOCAB, "pad_token_id": 0}
    if kind == "roberta":
        sizes |= {"pad_token_id": 1, "type_vocab_size": 1}
    if not encoder:
        sizes |= {"num_key_value_heads": 2, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    sizes |= {"id2label": dict(enumerate(labels)), "label2id": {name: index for index, name in enumerate(labels)}}
    if not head:
        del sizes["id2label"], sizes["label2id"]
    language = "MaskedLM" if encoder else "CausalLM"
    auto = getattr(transformers, f"AutoModelFor{task if head else language}")
    model = auto.from_config(transformers.CONFIG_MAPPING[kind](**sizes | config)).float().eval()
    randomize(model, 0)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    (wordpiece_tokenizer() if encoder and kind != "roberta" else bpe_tokenizer(VOCAB - 8)).save_pretrained(folder)
    return folder


def make_classifier_adapter(
    folder: Path,
    base: Path,
    task: str = "SEQ_CLS",
    *,
    labels: Sequence[str] = CLASSES,
    targets: Sequence[str] = ("query", "value"),
    save: Sequence[str] = ("classifier",),
    strength: float = 0.15,
) -> Path:
    """A PEFT adapter for `base`, with its head; every trained parameter is moved away from its start."""
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    name = {"SEQ_CLS": "SequenceClassification", "TOKEN_CLS": "TokenClassification"}[task]
    torch.manual_seed(0)
    model = getattr(transformers, f"AutoModelFor{name}").from_pretrained(
        base, num_labels=len(labels), dtype=torch.float32
    )
    live = get_peft_model(
        model, LoraConfig(r=4, lora_alpha=8, task_type=task, target_modules=list(targets), modules_to_save=list(save))
    )
    shake_adapter(live, strength)
    live.save_pretrained(folder)
    return folder


def make_labelled_data(path: Path, n: int = 60) -> Path:
    """`n` lines `{"text", "label", "ward"}`, every text different; class names and indices in turns."""
    lines = []
    for index in range(n):
        label = CLASSES[index % 3]
        text = f"Case {index}: {_SIGNS[label][index // 3 % 4]}, room {index * 7 % 50}."
        lines.append({"text": text, "label": index % 3 if index % 5 == 0 else label, "ward": f"w{index % 2}"})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def make_tagged_data(path: Path, n: int = 40) -> Path:
    """`n` lines `{"tokens", "labels"}`: a drug of one or two words among others."""
    lines = []
    for index in range(n):
        drug = _DRUGS[index % len(_DRUGS)]
        before, after = (_WORDS[(index * step + step) % len(_WORDS)] for step in (1, 2))
        words = [f"P{index}", before, *drug, after]
        labels: list[Any] = ["O", 0, "B-DRUG", *["I-DRUG"] * (len(drug) - 1), "O"]
        if index % 9 == 0:
            labels[0] = -100
        lines.append({"tokens": words, "labels": labels})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


@functools.cache
def wordpiece_tokenizer() -> Any:
    """WordPiece as BERT has it: lower case, [CLS] text [SEP] pair [SEP], segment ids; VOCAB - 8 ids at most."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    corpus = [f"Case {index}: {sign}, room {index}." for signs in _SIGNS.values() for index, sign in enumerate(signs)]
    tokenizer.train_from_iterator([*corpus, " ".join(_WORDS), *map(" ".join, _DRUGS), "0123456789 p"], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0", pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )  # fmt: skip
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]", model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip
