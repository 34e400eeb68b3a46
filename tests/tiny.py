"""Tiny random checkpoints, adapters and data, made by the tests that use them.

    from tests.tiny import make_adapter, make_checkpoint, make_data

    base = make_checkpoint(tmp_path / "base", "qwen2", dtype="bfloat16", tied=True)
    adapter = make_adapter(tmp_path / "adapter", base, r=4, targets=["q_proj", "down_proj"])

Everything is a pure function of its arguments. Norms and biases are not trivial, and weights are scaled so that
logits are far from flat: a mistake anywhere in a graph, a tokenizer or a merge shows.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ARCHES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3")
ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
VOCAB = 768
SPM_ARCHES = ("gemma2", "gemma3")

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>"
    "{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ m['content'] | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
QWEN2_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QUESTIONS = (
    ("What are the symptoms of iron deficiency?", "Tiredness, pale skin and shortness of breath are common."),
    (
        "How is high blood pressure treated?",
        "With less salt, more exercise, and medicines such as ACE inhibitors.",
    ),
    (
        "What should a patient avoid while taking warfarin?",
        "Avoid aspirin, and keep the intake of vitamin K steady.",
    ),
    ("When is an X-ray of the chest needed?", "When pneumonia, heart failure or an injury is suspected."),
    ("How is type 2 diabetes diagnosed?", "By a fasting glucose of 7.0 mmol/l or more, or an HbA1c of 6.5 %."),
    ("缺铁性贫血有哪些症状？", "常见症状包括乏力、面色苍白和呼吸急促。"),
    ("高血压应该怎样治疗？", "减少盐的摄入，多运动，必要时服用降压药物。"),
    ("服用华法林的病人应注意什么？", "避免服用阿司匹林，并保持维生素K摄入稳定。"),
    ("什么时候需要做胸部X光检查？", "怀疑肺炎、心力衰竭或外伤时需要检查。"),
    ("如何诊断二型糖尿病？", "空腹血糖达到7.0毫摩尔每升，或糖化血红蛋白达到百分之6.5。"),
)
SUBJECTS = (
    "a child",
    "an adult",
    "an older patient",
    "a pregnant woman",
    "孕妇",
    "儿童",
    "老年人",
    "a 54-year-old",
)


def make_checkpoint(
    folder: Path,
    arch: str = "qwen2",
    *,
    dtype: str = "bfloat16",
    tied: bool = True,
    hidden: int = 64,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    intermediate: int | None = None,
    vocab: int = VOCAB,
    seed: int = 0,
    shards: int = 1,
    **config: Any,
) -> Path:
    """A checkpoint folder as transformers writes it: config, generation config, weights, tokenizer, template.

    `dtype`: "bfloat16", "float16" or "float32". `vocab`: rows of the embedding; the tokenizer is a little smaller.
    `shards`: at least that many files. `config` goes to the architecture's config class as it stands.
    """
    import torch
    from transformers import GenerationConfig

    model_class, config_class, defaults = _architecture(arch)
    spm = arch in SPM_ARCHES
    tokenizer = spm_tokenizer(vocab - 8) if spm else bpe_tokenizer(vocab - 8)
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in _END[spm]}
    end, pad = (ids[name] for name in _END[spm])
    settings = {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": intermediate or 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 512,
        "tie_word_embeddings": tied,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": end,
        "pad_token_id": pad,
        **{key: value(hidden, heads) if callable(value) else value for key, value in defaults.items()},
        **config,
    }
    configuration = config_class(**settings)
    configuration._attn_implementation = "eager"
    model = model_class(configuration).float().eval()
    randomize(model, seed)
    model = model.to(getattr(torch, dtype))
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=end, pad_token_id=pad, do_sample=True, temperature=0.7
    )
    total = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    model.save_pretrained(folder, max_shard_size=total // shards if shards > 1 else "5GB")
    tokenizer.save_pretrained(folder)
    return folder


def make_adapter(
    folder: Path,
    base: Path,
    *,
    r: int = 4,
    alpha: float = 8,
    targets: Sequence[str] | str = ALL_LINEAR,
    strength: float = 0.15,
    seed: int = 1,
    template: str | None = None,
    **lora_config: Any,
) -> Path:
    """A PEFT adapter folder for `base` in float32. B is not zero; `strength` is its scale.

    What `modules_to_save` saves is moved away from the base as well. `template`: also saves the base's tokenizer
    with this chat template into the folder. `lora_config` goes to `peft.LoraConfig` as it stands.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if targets == ALL_LINEAR and model.config.model_type == "phi3":
        targets = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
    modules = targets if isinstance(targets, str) else list(targets)
    peft_model = get_peft_model(
        model, LoraConfig(r=r, lora_alpha=alpha, target_modules=modules, task_type="CAUSAL_LM", **lora_config)
    )
    shake_adapter(peft_model, strength, seed)
    peft_model.save_pretrained(folder)
    if template is not None:
        tokenizer = AutoTokenizer.from_pretrained(base)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)
    return folder


def make_data(path: Path, n: int = 40, seed: int = 0) -> Path:
    """`n` JSONL lines `{"prompt", "response", "topic", "lang"}`, English and Chinese, every prompt different."""
    lines = []
    for i in range(n):
        question, answer = QUESTIONS[(i + seed) % len(QUESTIONS)]
        chinese = not question.isascii()
        subject = SUBJECTS[(i // len(QUESTIONS) + seed) % len(SUBJECTS)]
        case = f"第{i}例，{subject}：" if chinese else f"Case {i}, {subject}. "
        fields = {
            "prompt": case + question,
            "response": answer,
            "topic": f"topic-{i % 3}",
            "lang": "zh" if chinese else "en",
        }
        lines.append(json.dumps(fields, ensure_ascii=False))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def randomize(model: Any, seed: int) -> None:
    """Random weights: norms and biases not trivial, matrices of gain 1, an embedding that makes logits uneven."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.copy_(parameter + 0.2 * noise)
            elif "embed" in name or "lm_head" in name:
                parameter.copy_(noise * 2 / math.sqrt(parameter.shape[1]))
            else:
                parameter.copy_(noise / math.sqrt(parameter.shape[1]))


def shake_adapter(peft_model: Any, strength: float = 0.15, seed: int = 1) -> None:
    """Moves every trainable parameter of a PEFT model away from its start, so that the adapter does something."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in peft_model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_((strength * noise).to(parameter.dtype))


@functools.cache
def bpe_tokenizer(size: int = VOCAB - 8) -> Any:
    """Byte-level BPE as Qwen2 has it: NFC, Qwen2's regex, ChatML. `size` ids, the three markers are the last."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    markers = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_REGEX), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=size - len(markers), initial_alphabet=alphabet, max_token_length=16, show_progress=False
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    _fill(tokenizer, size - len(markers))
    tokenizer.add_special_tokens(markers)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHATML
    )


@functools.cache
def spm_tokenizer(size: int = VOCAB - 8) -> Any:
    """A SentencePiece-style BPE with byte fallback, as Gemma and Llama 2 have it; `size` ids at most."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special + pieces, limit_alphabet=200, show_progress=False
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    # Byte pieces are no added tokens, and Gemma's file splits nothing before BPE.
    data = json.loads(tokenizer.to_str())
    data["added_tokens"] = [item for item in data["added_tokens"] if item["content"] in special]
    data["pre_tokenizer"] = None
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(data)),
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        chat_template=GEMMA_TEMPLATE,
    )


_END = {False: ("<|im_end|>", "<|endoftext|>"), True: ("<end_of_turn>", "<pad>")}


def _corpus() -> list[str]:
    return [f"{subject}: {question}\n{answer}\n" for subject in SUBJECTS for question, answer in QUESTIONS]


def _fill(tokenizer: Any, size: int) -> None:
    """The corpus is small: pairs of single characters make up what training left of the vocabulary."""
    missing = size - tokenizer.get_vocab_size()
    if missing <= 0:
        return
    from tokenizers import models

    data = json.loads(tokenizer.to_str())["model"]
    vocab, merges = data["vocab"], [tuple(pair) for pair in data["merges"]]
    singles = [token for token in vocab if len(token) == 1]
    pairs = ((a, b) for a in singles for b in singles if a + b not in vocab)
    for a, b in (next(pairs) for _ in range(missing)):
        vocab[a + b] = len(vocab)
        merges.append((a, b))
    tokenizer.model = models.BPE(vocab=vocab, merges=merges)


def _architecture(arch: str) -> tuple[Any, Any, dict[str, Any]]:
    """Model class, config class, and settings beyond the common ones."""
    import transformers as t

    def head(hidden: int, heads: int) -> int:
        return hidden // heads

    gemma = {"head_dim": head, "query_pre_attn_scalar": head, "sliding_window": 16}
    table: dict[str, tuple[Any, Any, dict[str, Any]]] = {
        "llama": (t.LlamaForCausalLM, t.LlamaConfig, {}),
        "mistral": (t.MistralForCausalLM, t.MistralConfig, {"sliding_window": None, "head_dim": head}),
        "qwen2": (t.Qwen2ForCausalLM, t.Qwen2Config, {}),
        "qwen3": (t.Qwen3ForCausalLM, t.Qwen3Config, {"head_dim": head}),
        "gemma2": (t.Gemma2ForCausalLM, t.Gemma2Config, gemma),
        "gemma3": (t.Gemma3ForCausalLM, t.Gemma3TextConfig, gemma),
        "phi3": (t.Phi3ForCausalLM, t.Phi3Config, {"sliding_window": None}),
    }
    return table[arch]
