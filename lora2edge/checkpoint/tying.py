"""Whether embedding and output head are one weight by the configuration, where config.json leaves it to the class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TIED = frozenset({
    "bloom", "cohere", "cohere2", "ernie4_5", "falcon", "falcon_mamba", "gemma", "gemma2", "gemma3_text",
    "gemma3n_text", "gemma4_text", "gpt2", "gpt_bigcode", "gpt_neo", "jetmoe", "lfm2", "mamba", "mpt", "openai-gpt",
    "opt", "recurrent_gemma", "smollm3", "starcoder2", "vaultgemma", "xglm",
})  # fmt: skip
UNTIED = frozenset({
    "apertus", "arcee", "codegen", "deepseek_v2", "deepseek_v3", "exaone4", "glm", "glm4", "glm4_moe", "gpt_neox",
    "gpt_oss", "gptj", "granite", "granitemoe", "helium", "llama", "mamba2", "minimax", "ministral", "mistral",
    "mixtral", "nemotron", "olmo", "olmo2", "olmo3", "olmoe", "persimmon", "phi", "phi3", "phimoe", "qwen2",
    "qwen2_moe", "qwen3", "qwen3_5_text", "qwen3_moe", "qwen3_next", "seed_oss", "stablelm",
})  # fmt: skip
"""model_type → what transformers 5's configuration class has for `tie_word_embeddings` by itself."""


def says_tied(config: Mapping[str, Any]) -> bool | None:
    """What config.json or else its class says of `tie_word_embeddings`; None where neither is known."""
    if "tie_word_embeddings" in config:
        return config["tie_word_embeddings"] is True
    kind = config.get("model_type")
    return True if kind in TIED else False if kind in UNTIED else None
