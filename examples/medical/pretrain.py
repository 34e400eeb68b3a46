# SPDX-License-Identifier: Apache-2.0
"""Train the tokenizer and the base model from scratch; ``base/`` becomes a Qwen2 checkpoint in bfloat16."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from corpus import COPYING, EVERYTHING, documents
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch.nn import functional
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

HERE = Path(__file__).parent
SEED = 7
VOCAB = 3072
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# The pre-tokenizer regex of Qwen2, from the tokenizer.json that is published with its models.
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Chinese has no spaces, so merges would join a name with what stands around it, differently in each context.
# While merges are learnt (not afterwards) these characters stand alone.
CHINESE_ALONE = "[，。？！：；、的是和与吃能会应当有要为用于适属了不合互即禁测时因]"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
ROPE_THETA = 10000.0
CONTEXT = 256
BATCH = 16
PEAK_LR = 2e-3


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """A byte-level BPE as Qwen2's; the special tokens come last, after at most ``VOCAB - 3`` others."""
    split = pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alone = pre_tokenizers.Split(Regex(CHINESE_ALONE), behavior="isolated")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([alone, split, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - len(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=16,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    tokenizer.add_special_tokens(list(SPECIAL))
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer.model.save(str(folder))
    config = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "extra_special_tokens": ["<|im_start|>"],
        "model_max_length": 1024,
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    write_json(folder / "tokenizer_config.json", config)


def make_model() -> Qwen2ForCausalLM:
    """5.8 M parameters; every matrix reads 256 or 768 inputs, as k-quants need."""
    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
    )
    return Qwen2ForCausalLM(config)


def save_model(model: Qwen2ForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    end_of_text, end_of_turn = tokenizer.token_to_id("<|endoftext|>"), tokenizer.token_to_id("<|im_end|>")
    model.config.eos_token_id = end_of_turn
    model.config.pad_token_id = end_of_text
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=[end_of_turn, end_of_text], pad_token_id=end_of_text
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    # transformers 5 writes only the new spelling of two settings; older readers know only the old one.
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    write_json(path, {**config, "rope_theta": ROPE_THETA, "torch_dtype": "bfloat16"})


def write_json(path: Path, value: Mapping[str, object]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")


def pack(tokenizer: Tokenizer, texts: list[str]) -> torch.Tensor:
    """The texts end to end, each closed by ``<|endoftext|>``, in rows: ``[rows, CONTEXT + 1]`` int64."""
    stop = tokenizer.token_to_id("<|endoftext|>")
    ids = [token for encoding in tokenizer.encode_batch(texts) for token in (*encoding.ids, stop)]
    rows = len(ids) // (CONTEXT + 1)
    return torch.tensor(ids[: rows * (CONTEXT + 1)]).view(rows, CONTEXT + 1)


def learning_rate(done: float) -> float:
    """Linear warm-up over the first 4 %, then a cosine to a twentieth of the peak."""
    return PEAK_LR * min(done / 0.04, 0.05 + 0.475 * (1 + math.cos(math.pi * done)))


def train(model: Qwen2ForCausalLM, rows: torch.Tensor) -> None:
    """One pass over ``rows``, float32 weights with bfloat16 products."""
    # Muon for the matrices inside the layers needs about half the steps that AdamW needs.
    inner = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    outer = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers = (
        torch.optim.Muon(inner, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(outer, betas=(0.9, 0.98), weight_decay=0.0),
    )
    start = time.monotonic()
    model.train()
    for step, first in enumerate(range(0, len(rows), BATCH)):
        batch = rows[first : first + BATCH]
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = learning_rate((first + 1) / len(rows))
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=batch[:, :-1]).logits
        loss = functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        if step % 50 == 0:
            print(f"step {step} loss {loss.item():.3f} {time.monotonic() - start:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, default=56_000, help="how many documents to train on")
    parser.add_argument("--out", type=Path, default=HERE / "base")
    options = parser.parse_args()
    torch.set_num_threads(2)
    torch.manual_seed(SEED)
    options.out.mkdir(parents=True, exist_ok=True)

    first = options.documents // 4
    texts = list(itertools.islice(documents(SEED, COPYING), first))
    texts += itertools.islice(documents(SEED + 1, EVERYTHING), options.documents - first)
    rows_path = HERE / "data" / "test.jsonl"
    asked = [json.loads(line)["prompt"] for line in rows_path.read_text(encoding="utf-8").splitlines()]
    whole = "\n".join(texts)
    assert not any(prompt in whole for prompt in asked), "a test question stands in the pretraining text"

    tokenizer = train_tokenizer(texts[::3])
    save_tokenizer(tokenizer, options.out)
    rows = pack(tokenizer, texts)
    model = make_model()
    print(f"{rows.numel():,} tokens, {tokenizer.get_vocab_size()} types, {model.num_parameters():,} parameters")
    train(model, rows)
    save_model(model, tokenizer, options.out)


if __name__ == "__main__":
    main()
