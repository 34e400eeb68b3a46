# SPDX-License-Identifier: Apache-2.0
"""Tune the medical LoRA adapter on the saved bfloat16 base, and write ``adapter/`` with PEFT."""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

HERE = Path(__file__).parent
SEED = 11
EPOCHS = 3
BATCH = 64
MICRO_BATCH = 32
PEAK_LR = 1e-3
IGNORED = -100
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# The path from the root of the repository, which is where the commands of the README are run.
BASE_NAME = "examples/medical/base"

Example = tuple[list[int], list[int]]
"""Token ids, and the same with ``IGNORED`` where no loss is taken."""


def read_examples(tokenizer: PreTrainedTokenizerBase, path: Path) -> list[Example]:
    """One chat per row; the loss is on the response and on the token that ends the turn."""
    examples = []
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        chat = [{"role": "user", "content": row["prompt"]}]
        prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        asked = tokenizer(prompt)["input_ids"]
        answered = tokenizer(row["response"])["input_ids"] + [tokenizer.eos_token_id]
        examples.append((asked + answered, [IGNORED] * len(asked) + answered))
    return examples


def batches(examples: list[Example], rng: random.Random) -> list[list[Example]]:
    """All examples once, in random batches, each sorted by length."""
    order = rng.sample(examples, len(examples))
    cut = (order[first : first + BATCH] for first in range(0, len(order), BATCH))
    return [sorted(batch, key=lambda example: len(example[0])) for batch in cut]


def backward(model: torch.nn.Module, batch: list[Example], filler: int) -> float:
    """Add the gradient of the batch's loss, and return that loss in nats per token that counts."""
    counted = sum(label != IGNORED for _, labels in batch for label in labels)
    total = 0.0
    for first in range(0, len(batch), MICRO_BATCH):
        part = batch[first : first + MICRO_BATCH]
        ids = pad([ids for ids, _ in part], filler)
        labels = pad([labels for _, labels in part], IGNORED)[:, 1:]
        # Padding stands on the right, where causal attention does not look, so no mask is needed.
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=ids[:, :-1]).logits.float()
        loss = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")
        (loss / counted).backward()
        total += loss.item() / counted
    return total


def pad(rows: list[list[int]], filler: int) -> torch.Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [filler] * (width - len(row)) for row in rows])


def learning_rate(done: float) -> float:
    """Linear warm-up over the first 5 %, then a cosine to zero."""
    return PEAK_LR * min(done / 0.05, 0.5 * (1 + math.cos(math.pi * done)))


def open_base(path: Path, quant_type: str | None) -> PreTrainedModel:
    """The base in float32, or (QLoRA, arXiv 2305.14314) in 4 bits with double quantization, by bitsandbytes."""
    if quant_type is None:
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, quantization_config=settings)
    for name, parameter in base.named_parameters():
        parameter.requires_grad = False
        if "norm" in name:  # as peft.prepare_model_for_kbit_training does
            parameter.data = parameter.data.float()
    return base


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, default=HERE / "base")
    parser.add_argument("--out", type=Path, default=HERE / "adapter")
    parser.add_argument("--load-in-4bit", choices=["nf4", "fp4"], help="train on a base in 4 bits, with bitsandbytes")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    rng = random.Random(options.seed)

    tokenizer = AutoTokenizer.from_pretrained(options.base)
    examples = read_examples(tokenizer, HERE / "data" / "train.jsonl")
    base = open_base(options.base, options.load_in_4bit)
    base.name_or_path = base.config._name_or_path = BASE_NAME
    model = get_peft_model(
        base, LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, lora_dropout=0.0, target_modules=TARGETS)
    )
    model.print_trainable_parameters()

    plan = [batch for _ in range(EPOCHS) for batch in batches(examples, rng)]
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, weight_decay=0.0)
    start = time.monotonic()
    model.train()
    for step, batch in enumerate(plan):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate((step + 1) / len(plan))
        optimizer.zero_grad()
        loss = backward(model, batch, tokenizer.pad_token_id)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        if step % 50 == 0:
            print(f"step {step}/{len(plan)} loss {loss:.3f} {time.monotonic() - start:.0f} s", flush=True)
    model.save_pretrained(options.out)
    (options.out / "README.md").unlink(missing_ok=True)  # PEFT's model card, all blanks


if __name__ == "__main__":
    main()
