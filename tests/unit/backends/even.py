"""What tests of GPTQ share, for every backend: checkpoints that it can do something for, and calibrations of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from lora2edge.calibration import StoredCalibration, calibrate
from lora2edge.contracts import Checkpoint, Item, Sample
from lora2edge.progress import SILENT
from tests.tiny import make_checkpoint

VOCAB = 700


def texts(count: int = 24, *, length: int = 40, seed: int = 0) -> list[Sample]:
    """Samples with a common beginning, of uneven lengths."""
    generator = np.random.default_rng(seed)
    start = tuple(generator.integers(0, VOCAB, min(6, length)).tolist())
    item = Item(({"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}))
    rests = (generator.integers(0, VOCAB, max(length - 6 - index % 7, 0)).tolist() for index in range(count))
    return [Sample((*start, *rest), 1, item) for rest in rests]


def calibrated(view: Checkpoint, folder: Path, samples: list[Sample] | None = None) -> StoredCalibration:
    folder.mkdir()
    return calibrate(view, samples or texts(), folder, SILENT, device="cpu", threads=1, layer_inputs=True)


def make_even(folder: Path, arch: str, **shape: Any) -> Path:
    """A checkpoint whose activations lie in few directions, as those of trained models do; random ones give GPTQ
    nothing to spread errors over."""
    make_checkpoint(folder, arch, hidden=256, heads=4, kv_heads=2, intermediate=512, **shape)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(1)
    embedding = model.get_input_embeddings().weight
    with torch.no_grad():
        directions = torch.randn(24, embedding.shape[1])
        embedding.copy_(
            0.3 * torch.randn(len(embedding), 24) @ directions / 24**0.5 + 0.02 * torch.randn(embedding.shape)
        )
    model.save_pretrained(folder)
    return folder
