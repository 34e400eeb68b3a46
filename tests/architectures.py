"""Tiny random models of many architectures, and PEFT configurations of every kind for them: the test matrix."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.tiny import bpe_tokenizer, randomize

VOCAB = 384
_RANK = 4
LLAMA_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Architecture:
    """How to make a tiny model, and what an adapter can be put on."""

    model_class: str
    config_class: str
    settings: Mapping[str, Any]
    layers: tuple[str, ...]
    """Linear layers, by the end of their names."""
    feedforward: tuple[str, ...]
    """Of these the ones that IA³ scales at their inputs."""
    embedding: str
    head: str | None
    """What modules_to_save saves."""
    task: str = "CAUSAL_LM"
    parameters: tuple[str, ...] = ()
    """Fused experts, for target_parameters."""


_DECODER = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_ENCODER = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "num_labels": 3, "pad_token_id": 0,
}  # fmt: skip
_GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16}
_BERT = ("query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense")


def _llama(name: str, tied: bool = False, config: str | None = None, **more: Any) -> Architecture:
    settings = {**_DECODER, "tie_word_embeddings": tied, **more}
    return Architecture(
        f"{name}ForCausalLM",
        config or f"{name}Config",
        settings,
        LLAMA_LAYERS,
        ("down_proj",),
        "embed_tokens",
        "lm_head",
    )


def _bert(name: str, **more: Any) -> Architecture:
    return Architecture(
        f"{name}ForSequenceClassification", f"{name}Config", {**_ENCODER, **more}, _BERT,
        ("intermediate.dense", "output.dense"), "word_embeddings", "classifier", task="SEQ_CLS",
    )  # fmt: skip


ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": _llama("Llama"),
    "qwen2": _llama("Qwen2", tied=True),
    "qwen3": _llama("Qwen3", head_dim=8),
    "qwen3_moe": Architecture(
        "Qwen3MoeForCausalLM", "Qwen3MoeConfig",
        {**_DECODER, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
         "decoder_sparse_step": 1, "tie_word_embeddings": False},
        LLAMA_LAYERS[:4], ("o_proj",), "embed_tokens", "lm_head",
        parameters=("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
    ),
    "mixtral": Architecture(
        "MixtralForCausalLM", "MixtralConfig",
        {**_DECODER, "num_local_experts": 4, "num_experts_per_tok": 2, "tie_word_embeddings": False,
         "sliding_window": None},
        LLAMA_LAYERS[:4], ("o_proj",), "embed_tokens", "lm_head",
        parameters=("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
    ),
    "gemma2": _llama("Gemma2", tied=True, **_GEMMA),
    "gemma3": _llama("Gemma3", tied=True, config="Gemma3TextConfig", **_GEMMA),
    "phi3": Architecture(
        "Phi3ForCausalLM", "Phi3Config", {**_DECODER, "sliding_window": None, "tie_word_embeddings": False},
        ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"), ("down_proj",), "embed_tokens", "lm_head",
    ),
    "gpt2": Architecture(
        "GPT2LMHeadModel", "GPT2Config",
        {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1,
         "eos_token_id": 2},
        ("c_attn", "c_proj", "c_fc"), ("c_proj",), "wte", "lm_head",
    ),
    "gpt_neox": Architecture(
        "GPTNeoXForCausalLM", "GPTNeoXConfig",
        {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "max_position_embeddings": 64, "tie_word_embeddings": False, "bos_token_id": 1,
         "eos_token_id": 2},
        ("query_key_value", "attention.dense", "dense_h_to_4h", "dense_4h_to_h"), ("dense_4h_to_h",), "embed_in",
        "lm_head",
    ),
    "bert": _bert("Bert"),
    "roberta": _bert("Roberta", bos_token_id=1, eos_token_id=2),
    "deberta-v2": Architecture(
        "DebertaV2ForSequenceClassification", "DebertaV2Config",
        {**_ENCODER, "relative_attention": True, "position_buckets": 8, "norm_rel_ebd": "layer_norm",
         "share_att_key": True, "pos_att_type": ["p2c", "c2p"], "type_vocab_size": 0},
        ("query_proj", "key_proj", "value_proj", "attention.output.dense", "intermediate.dense", "output.dense"),
        ("intermediate.dense", "output.dense"), "word_embeddings", "classifier", task="SEQ_CLS",
    ),
    "t5": Architecture(
        "T5ForConditionalGeneration", "T5Config",
        {"vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
        ("q", "k", "v", "o", "wi", "wo"), ("wo",), "embed_tokens", "lm_head", task="SEQ_2_SEQ_LM",
    ),
}  # fmt: skip


def make_model(architecture: Architecture, folder: Path) -> Any:
    """The model in float32 evaluation mode, also saved in `folder` with a tokenizer."""
    import torch
    import transformers

    config = getattr(transformers, architecture.config_class)(**architecture.settings)
    config._attn_implementation = "eager"
    model = getattr(transformers, architecture.model_class)(config).to(torch.float32).eval()
    randomize(model, 0)
    _widen_gaps(model)
    model.save_pretrained(folder)
    bpe_tokenizer(VOCAB - 8).save_pretrained(folder)
    return model


def _widen_gaps(model: Any) -> None:
    """Sets the first singular values apart from the others: what PEFT's float32 takes for them in PiSSA is exact."""
    import torch

    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and "embed" not in name:
                left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
                values[:_RANK] *= 1.25
                weight.copy_(left * values @ right)


def _lora(**settings: Any) -> Callable[[Architecture], Any]:
    def make(architecture: Architecture) -> Any:
        from peft import LoraConfig

        given = {key: value(architecture) if callable(value) else value for key, value in settings.items()}
        given = {"target_modules": list(architecture.layers), **given}
        return LoraConfig(r=_RANK, lora_alpha=6, task_type=architecture.task, **given)

    return make


def _other(kind: str, **settings: Any) -> Callable[[Architecture], Any]:
    def make(architecture: Architecture) -> Any:
        import peft

        given = {key: value(architecture) if callable(value) else value for key, value in settings.items()}
        given = {"target_modules": list(architecture.layers), **given}
        return getattr(peft, f"{kind}Config")(task_type=architecture.task, **given)

    return make


KINDS: Mapping[str, Callable[[Architecture], Any]] = {
    "LoRA": _lora(),
    "rsLoRA": _lora(use_rslora=True),
    "DoRA": _lora(use_dora=True),
    "lora_bias": _lora(lora_bias=True),
    "bias: all": _lora(bias="all"),
    "bias: lora_only": _lora(bias="lora_only"),
    "rank_pattern, alpha_pattern": _lora(
        rank_pattern=lambda a: {a.layers[0]: 2}, alpha_pattern=lambda a: {a.layers[-1]: 11}
    ),
    "layers_to_transform": _lora(layers_to_transform=[1]),
    "embedding LoRA": _lora(target_modules=lambda a: [a.embedding, a.layers[0]]),
    "trainable_token_indices": _lora(trainable_token_indices=lambda a: {a.embedding: [3, 7, 50]}),
    "target_parameters (experts)": _lora(target_modules=[], target_parameters=lambda a: list(a.parameters)),
    "modules_to_save (head)": _lora(modules_to_save=lambda a: [a.head]),
    "modules_to_save (embedding)": _lora(modules_to_save=lambda a: [a.embedding]),
    "PiSSA": _lora(init_lora_weights="pissa"),
    "OLoRA": _lora(init_lora_weights="olora"),
    "AdaLoRA": _other("AdaLora", init_r=4, target_r=4, lora_alpha=6, total_step=10),
    "LoHa": _other("LoHa", r=3, alpha=5),
    "LoKr": _other("LoKr", r=3, alpha=5),
    "IA³": _other("IA3", feedforward_modules=lambda a: list(a.feedforward), target_modules=lambda a: list(a.layers)),
    "OFT": _other("OFT", r=0, oft_block_size=4),
    "BOFT": _other("BOFT", boft_block_size=4),
    "VeRA": _other("Vera", r=8, target_modules=lambda a: [a.layers[0]]),
}
"""Name → PEFT's configuration for an architecture."""
