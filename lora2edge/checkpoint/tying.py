"""Whether embedding and output head are one weight: by the configuration, and by what is stored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora2edge.checkpoint.slabs import in_order
from lora2edge.contracts import Checkpoint
from lora2edge.errors import CheckpointError

_SLAB_ELEMENTS = 1 << 20

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


def check_tied(checkpoint: Checkpoint, head: str, embedding: str) -> None:
    """Compares a stored copy of a tied head, which will be left out, with the embedding. Raises CheckpointError."""
    rows, columns = checkpoint.tensors[embedding].shape
    step = max(1, _SLAB_ELEMENTS // columns)

    def differs(start: int) -> bool:
        stop = min(start + step, rows)
        return bool((checkpoint.rows(head, start, stop) != checkpoint.rows(embedding, start, stop)).any())

    if any(found for _, found in in_order(differs, range(0, rows, step))):
        raise CheckpointError(
            "tied-head",
            f"{head} differs from {embedding}, and config.json ties them",
            why="one of them would be lost",
            hint='set "tie_word_embeddings": false in config.json where the head was trained on its own',
        )
