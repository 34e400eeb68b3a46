"""What the tests of the GGUF lowering share: a lowering, calibration statistics, and divergence from transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from lora2edge.backends.gguf import GgufBackend
from lora2edge.contracts import ChannelStats, Checkpoint, Lowered, Sample, SessionOptions
from lora2edge.progress import SILENT
from lora2edge.target import Target


def target(precision: str, **options: Any) -> Target:
    return Target(name="test", backend="gguf", precision=precision, options=options)


def lower(checkpoint: Checkpoint, out: Path, precision: str, calibration: Any = None, **options: Any) -> Lowered:
    if isinstance(calibration, RandomStatistics):  # GPTQ needs what layers are given as well
        options = {"rounding": "llama.cpp", **options}
    out.mkdir(parents=True)
    return GgufBackend().lower(checkpoint, target(precision, **options), calibration, out, SILENT)


class RandomStatistics:
    """Statistics for every linear layer but the head, uneven, with dead channels."""

    path = Path()
    samples: tuple[Sample, ...] = ()

    def __init__(self, checkpoint: Checkpoint) -> None:
        generator = np.random.default_rng(0)
        self.by_name: dict[str, ChannelStats] = {}
        for name, tensor in checkpoint.tensors.items():
            if len(tensor.shape) == 2 and "embed" not in name and "lm_head" not in name:
                mean_square = np.exp(2 * generator.standard_normal(tensor.shape[1])).astype(np.float32)
                mean_square[::37] = 0
                self.by_name[name] = ChannelStats(mean_square, 12345)

    @property
    def names(self) -> list[str]:
        return list(self.by_name)

    def vectors(self, name: str) -> ChannelStats:
        return self.by_name[name]


def divergence(folder: Path, out: Path, *, length: int = 200, context: int = 512) -> float:
    """Mean KL(transformers in float32 ‖ llama.cpp), nats per token, over `length` random ids."""
    import torch
    from transformers import AutoModelForCausalLM

    ids = np.random.default_rng(0).integers(0, 700, length).tolist()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        expected = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1).numpy()
    session = GgufBackend().open(out, target("f32"), SessionOptions("cpu", threads=1, slots=1, max_length=context))
    try:
        logits = next(iter(session.logits([ids], [range(length)]))).astype(np.float64)
    finally:
        session.close()
    found = logits - logits.max(-1, keepdims=True)
    found -= np.log(np.exp(found).sum(-1, keepdims=True))
    return float((np.exp(expected) * (expected - found)).sum(-1).mean())
