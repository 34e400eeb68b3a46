# SPDX-License-Identifier: Apache-2.0
"""Exact-match accuracy of the base model and of base + adapter on the test split, by topic and language."""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

HERE = Path(__file__).parent
BATCH = 64
MAX_NEW_TOKENS = 48


def read_rows(split: str) -> list[dict[str, str]]:
    text = (HERE / "data" / f"{split}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def answers(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str]) -> list[str]:
    """The greedy answer to each prompt in the chat format, up to the end of the turn, stripped."""
    found = []
    for first in range(0, len(prompts), BATCH):
        chats = [[{"role": "user", "content": prompt}] for prompt in prompts[first : first + BATCH]]
        texts = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
        inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
        with torch.inference_mode():
            output = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS)
        new = output[:, inputs["input_ids"].shape[1] :]
        found += [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]
    return found


def show(rows: list[dict[str, str]], columns: dict[str, list[str]]) -> None:
    """One line per topic and language, one accuracy per column."""
    print(f"{'group':18}{'n':>5}" + "".join(f"{name:>10}" for name in columns))
    groups: dict[str, list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        for group in (f"{row['topic']} {row['lang']}", row["lang"], "all"):
            groups[group].append(i)
    for group, members in sorted(groups.items(), key=lambda item: (" " not in item[0], item[0] == "all", item[0])):
        right = (sum(found[i] == rows[i]["response"] for i in members) for found in columns.values())
        print(f"{group:18}{len(members):5}" + "".join(f"{count / len(members):10.1%}" for count in right))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, default=HERE / "base")
    parser.add_argument("--adapter", type=Path, default=HERE / "adapter")
    parser.add_argument("--misses", type=int, default=0, help="print so many wrong answers of base + adapter")
    options = parser.parse_args()
    torch.set_num_threads(2)
    rows = read_rows("test")
    prompts = [row["prompt"] for row in rows]
    tokenizer = AutoTokenizer.from_pretrained(options.base)
    model = AutoModelForCausalLM.from_pretrained(options.base, dtype=torch.float32).eval()
    columns = {"base": answers(model, tokenizer, prompts)}
    tuned = PeftModel.from_pretrained(model, str(options.adapter)).eval()
    columns["adapter"] = answers(tuned, tokenizer, prompts)
    show(rows, columns)
    wrong = [(row, found) for row, found in zip(rows, columns["adapter"], strict=True) if row["response"] != found]
    for row, found in wrong[: options.misses]:
        print(f"{row['prompt']} -> {found} (right: {row['response']})")


if __name__ == "__main__":
    main()
