"""genai_config.json: what onnxruntime-genai must know to generate with the same files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora2edge.checkpoint import read_json_file
from lora2edge.contracts import Checkpoint
from lora2edge.graph.decoder import Decoder
from lora2edge.storage import write_json

GENAI_CONFIG = "genai_config.json"
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def write_genai_config(checkpoint: Checkpoint, decoder: Decoder, folder: Path, model_file: str) -> None:
    """Writes the file beside the model. Token ids are those of generation_config.json, else of config.json."""
    generation: Mapping[str, Any] = {}
    if path := checkpoint.tokenizer.files.get("generation_config.json"):
        generation = read_json_file(Path(path), "bad-config")
    ids = {key: value for key in _TOKENS if (value := generation.get(key, checkpoint.config.get(key))) is not None}
    eos = ids.get("eos_token_id", 0)
    ids.setdefault("pad_token_id", eos[0] if isinstance(eos, list) else eos)
    model = {
        "type": decoder.architecture,
        "context_length": decoder.context_length,
        "vocab_size": decoder.vocab_rows,
        **ids,
        "decoder": {
            "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
            "filename": model_file,
            "head_size": decoder.head_dim,
            "hidden_size": decoder.hidden,
            "num_attention_heads": decoder.heads,
            "num_hidden_layers": len(decoder.layers),
            "num_key_value_heads": decoder.kv_heads,
            "inputs": {
                "input_ids": "input_ids",
                "attention_mask": "attention_mask",
                "past_key_names": "past_key_values.%d.key",
                "past_value_names": "past_key_values.%d.value",
            },
            "outputs": {
                "logits": "logits",
                "present_key_names": "present.%d.key",
                "present_value_names": "present.%d.value",
            },
        },
    }
    sampling = {"repetition_penalty": 1.0, "temperature": 1.0, "top_k": 50, "top_p": 1.0}  # transformers' own
    search = {
        "do_sample": bool(generation.get("do_sample", False)),
        "max_length": decoder.context_length,
        "min_length": 0,
        "num_beams": 1,
        "num_return_sequences": 1,
        "past_present_share_buffer": True,
        # 0 is a value: no bound of top_k, no chance at that temperature.
        **{key: own if (value := generation.get(key)) is None else value for key, own in sampling.items()},
    }
    write_json(folder / GENAI_CONFIG, {"model": model, "search": search})
