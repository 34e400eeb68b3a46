"""Makes a small encoder and trains a classifier's LoRA adapter on the medical example's questions.

Usage: python benchmarks/make_classifier.py OUT [--seeds 1 2 3] [--documents 10000] [--epochs 8]

The class of a question is its answer where there are few: how urgent symptoms are, which risk two drugs share; else
what it is about. 15 classes, in English and Chinese, split as the example's data are. OUT gets `base`, a BERT of 3.5 M
parameters that was trained on the text of examples/medical/corpus.py to fill in masked words, and saved as such
(`BertForMaskedLM`); `adapter-SEED`, rank 16 on all linear layers, with the pooler and the head that the base lacks; and
`data`. 163 s of CPU for the base and 80 s for each adapter, on one core; everything is seeded.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch.nn import functional
from transformers import AutoModelForSequenceClassification, BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

MEDICAL = Path(__file__).parent.parent / "examples" / "medical"
SPLITS = ("train", "calibration", "test")
SEED = 7
VOCAB = 1536
LENGTH = 128
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
PAD, _, CLS, SEP, MASK = range(5)
LAYERS = ("query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense")
MASKED = 0.2
"""Share of the tokens that pretraining hides: more than BERT's 0.15, since the texts are simple and the time short."""
PRETRAINING_BATCH, BATCH = 16, 32
PER_CLASS = 200

Example = tuple[list[int], int]
"""Token ids and class."""


# ---------------------------------------------------------------- data


def class_table() -> dict[tuple[str, str], str]:
    """(topic, answer in either language) → class, of the answers that are classes."""
    from knowledge import LEVELS, NO_RISK, RISKS

    closed = {"triage": LEVELS, "interactions": (*RISKS.values(), NO_RISK)}
    return {
        (topic, answer.lower()): english
        for topic, pairs in closed.items()
        for english, chinese in pairs
        for answer in (english, chinese)
    }


def write_data(folder: Path) -> list[str]:
    """`SPLIT.jsonl` of lines with `text` and `label`; returns the classes in the order of their logits."""
    folder.mkdir(parents=True, exist_ok=True)
    table = class_table()
    found: Counter[str] = Counter()
    for split in SPLITS:
        rows = [json.loads(line) for line in (MEDICAL / "data" / f"{split}.jsonl").read_text("utf-8").splitlines()]
        lines = [
            {
                "text": row["prompt"],
                "label": table.get((row["topic"], row["response"].lower()), row["topic"]),
                "topic": row["topic"],
                "lang": row["lang"],
            }
            for row in rows
        ]
        counts = Counter(line["label"] for line in lines)
        found += counts
        print(split, len(lines), dict(counts.most_common()))
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")
    return sorted(found)


def read_data(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# ---------------------------------------------------------------- base


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """WordPiece in lower case with each Chinese character alone, as BERT's."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=VOCAB, special_tokens=list(SPECIAL), show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    # Whole names of drugs go, so that their stems, which tell the class, are tokens of their own.
    kept = [token for token in tokenizer.get_vocab() if len(token) <= (10 if token.startswith("##") else 7)]
    kept.sort(key=tokenizer.token_to_id)
    tokenizer.model = models.WordPiece({token: index for index, token in enumerate(kept)}, unk_token="[UNK]")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)],
    )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **{f"{name[1:-1].lower()}_token": name for name in SPECIAL},
        model_max_length=LENGTH,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    ).save_pretrained(folder)


def make_base(folder: Path, classes: Sequence[str], count: int) -> None:
    """Trains and saves the masked language model; its configuration names the classes of the task to come."""
    from corpus import documents, interactions, monograph, survey, triage

    # Without what needs numbers: reports and arithmetic, which would take a third of the time.
    shares = {interactions: 0.4, monograph: 0.2, survey: 0.2, triage: 0.2}
    texts = list(itertools.islice(documents(SEED, shares), count))
    tokenizer = train_tokenizer(texts[::3])
    torch.manual_seed(SEED)
    config = BertConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=1024,
        max_position_embeddings=LENGTH,
        pad_token_id=PAD,
        # Regularization that a model of this size, trained for minutes, does better without.
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        id2label=dict(enumerate(classes)),
        label2id={name: index for index, name in enumerate(classes)},
    )
    model = BertForMaskedLM(config)
    ids = [encoding.ids[:LENGTH] for encoding in tokenizer.encode_batch(texts)]
    print(f"{sum(map(len, ids)):,} tokens, {model.num_parameters():,} parameters")

    def loss_of(batch: list[list[int]]) -> torch.Tensor:
        tokens, attention = pad(batch)
        hidden = (torch.rand(tokens.shape) < MASKED) & (tokens >= len(SPECIAL))
        draw = torch.rand(tokens.shape)
        noise = torch.randint(len(SPECIAL), config.vocab_size, tokens.shape)
        seen = torch.where(hidden & (draw < 0.9), torch.where(draw < 0.8, MASK, noise), tokens)
        # Only hidden tokens go through the output layer.
        states = model.bert(input_ids=seen, attention_mask=attention).last_hidden_state[hidden]
        return functional.cross_entropy(model.cls(states).float(), tokens[hidden])

    inner = [p for name, p in model.named_parameters() if p.ndim == 2 and ".layer." in name]
    outer = [p for name, p in model.named_parameters() if not (p.ndim == 2 and ".layer." in name)]
    # Muon for the matrices inside the layers needs about half the steps that AdamW needs.
    optimizers = [
        torch.optim.Muon(inner, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(outer, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    train(model, batches(ids, len, random.Random(SEED), PRETRAINING_BATCH), loss_of, optimizers, peak=2e-3)
    model.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)


# ---------------------------------------------------------------- adapter


def make_adapter(folder: Path, base: Path, data: Path, seed: int, epochs: int) -> None:
    """What a user does who has a language model and labelled texts."""
    torch.manual_seed(seed)
    model: Any = AutoModelForSequenceClassification.from_pretrained(base, dtype=torch.float32)
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    rows = read_data(data / "train.jsonl")
    found = tokenizer.encode_batch([row["text"] for row in rows])
    examples = [(each.ids, model.config.label2id[row["label"]]) for each, row in zip(found, rows, strict=True)]
    live = get_peft_model(
        model,
        LoraConfig(
            task_type="SEQ_CLS",
            r=16,
            lora_alpha=32,
            lora_dropout=0.0,
            target_modules=list(LAYERS),
            modules_to_save=["classifier", "pooler"],  # what the masked language model lacks
        ),
    )
    live.print_trainable_parameters()

    def loss_of(batch: list[Example]) -> torch.Tensor:
        tokens, attention = pad([ids for ids, _ in batch])
        logits = live(input_ids=tokens, attention_mask=attention).logits
        return functional.cross_entropy(logits.float(), torch.tensor([label for _, label in batch]))

    rng = random.Random(seed)
    plan = [batch for _ in range(epochs) for batch in batches(balanced(examples, rng), text_length, rng, BATCH)]
    trained = [p for p in live.parameters() if p.requires_grad]
    train(live, plan, loss_of, [torch.optim.AdamW(trained, weight_decay=0.0)], peak=1e-3)
    live.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's model card, all blanks


def balanced(examples: Sequence[Example], rng: random.Random) -> list[Example]:
    """At most `PER_CLASS` examples of each class: the risks that two drugs share are rare and hard to learn."""
    drawn: list[Example] = []
    for label in sorted({label for _, label in examples}):
        of_class = [example for example in examples if example[1] == label]
        drawn += rng.sample(of_class, min(PER_CLASS, len(of_class)))
    return drawn


def text_length(example: Example) -> int:
    return len(example[0])


def check(base: Path, adapter: Path, data: Path) -> tuple[float, float]:
    """Accuracy and macro-F1 of the live adapter on the test questions, by transformers and PEFT alone."""
    model: Any = AutoModelForSequenceClassification.from_pretrained(base, dtype=torch.float32)
    live = PeftModel.from_pretrained(model, str(adapter)).eval()
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    rows = read_data(data / "test.jsonl")
    gold = [model.config.label2id[row["label"]] for row in rows]
    chosen: list[int] = []
    with torch.inference_mode():
        for first in range(0, len(rows), BATCH):
            encoded = tokenizer.encode_batch([row["text"] for row in rows[first : first + BATCH]])
            tokens, attention = pad([each.ids for each in encoded])
            chosen += live(input_ids=tokens, attention_mask=attention).logits.argmax(-1).tolist()
    pairs = Counter(zip(gold, chosen, strict=True))
    each = [2 * pairs[label, label] / (gold.count(label) + chosen.count(label)) for label in sorted(set(gold))]
    return sum(a == b for a, b in zip(gold, chosen, strict=True)) / len(gold), sum(each) / len(each)


# ---------------------------------------------------------------- training


def batches(items: Sequence[Any], length: Callable[[Any], int], rng: random.Random, size: int) -> list[list[Any]]:
    """All items once, in batches of like length, so that little is padding."""
    order = rng.sample(range(len(items)), len(items))
    found = []
    for first in range(0, len(order), 16 * size):
        near = sorted(order[first : first + 16 * size], key=lambda index: length(items[index]))
        found += [[items[index] for index in near[at : at + size]] for at in range(0, len(near), size)]
    rng.shuffle(found)
    return found


def pad(rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and attention mask, `[rows, longest]` int64."""
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[PAD] * (width - len(row))] for row in rows])
    return ids, (torch.arange(width) < torch.tensor([[len(row)] for row in rows])).long()


def train(
    model: torch.nn.Module,
    plan: Sequence[list[Any]],
    loss_of: Callable[[Any], torch.Tensor],
    optimizers: Sequence[torch.optim.Optimizer],
    peak: float,
) -> None:
    """One step for each batch, products in bfloat16; linear warm-up over 5 %, then a cosine to nearly zero."""
    trained = [p for p in model.parameters() if p.requires_grad]
    start = time.process_time()
    model.train()
    for step, batch in enumerate(plan):
        done = (step + 1) / len(plan)
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = peak * min(done / 0.05, 0.02 + 0.49 * (1 + math.cos(math.pi * done)))
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(batch)
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        if step % 50 == 0:
            took = time.process_time() - start
            print(f"step {step}/{len(plan)} loss {loss.item():.3f} {took:.0f} s of CPU", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--documents", type=int, default=10_000, help="how many documents the base is trained on")
    parser.add_argument("--epochs", type=int, default=8)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sys.path.insert(0, str(MEDICAL))
    base, data = arguments.out / "base", arguments.out / "data"
    classes = write_data(data)
    if not (base / "config.json").exists():
        make_base(base, classes, arguments.documents)
    for seed in arguments.seeds:
        adapter = arguments.out / f"adapter-{seed}"
        if not (adapter / "adapter_config.json").exists():
            make_adapter(adapter, base, data, seed, arguments.epochs)
        accuracy, macro_f1 = check(base, adapter, data)
        print(f"{adapter.name}: test accuracy {accuracy:.1%}, macro-F1 {macro_f1:.1%}")


if __name__ == "__main__":
    main()
