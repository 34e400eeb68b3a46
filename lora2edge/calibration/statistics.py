"""Activation statistics: one float32 pass of the merged model over the calibration text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lora2edge.calibration.model import build_model, require_torch
from lora2edge.calibration.stored import StoredCalibration, store
from lora2edge.contracts import Checkpoint, Progress, Sample
from lora2edge.errors import DataError

_BATCH_TOKENS = 2048


def calibrate(
    view: Checkpoint,
    samples: Sequence[Sample],
    folder: Path,
    progress: Progress,
    *,
    device: str,
    threads: int,
    dtype: str = "float32",
) -> StoredCalibration:
    """Mean of x² per input channel of every linear layer, over all tokens of `samples`; written into `folder`.

    It is what llama.cpp calls the importance matrix (`llama-imatrix`). The model runs in `dtype`: in float32 on the
    unrounded merged weights, or in bfloat16, which is faster on processors that multiply it. Squares are float32,
    their sums float64. The output layer is covered too. Raises DataError where a layer saw no token or a statistic is
    not finite.
    """
    require_torch()
    import torch

    torch.set_num_threads(threads)
    model = build_model(view, dtype=dtype, device=device, rounded=False)
    recorder = _Recorder(model)
    progress.start("calibrate", len(samples), "samples")
    with torch.inference_mode():
        for group in _batches(samples):
            width = max(len(sample.ids) for sample in group)
            ids = torch.zeros(len(group), width, dtype=torch.long)
            seen = torch.zeros(len(group), width, dtype=torch.bool)
            for row, sample in enumerate(group):
                ids[row, : len(sample.ids)] = torch.tensor(sample.ids)
                seen[row, : len(sample.ids)] = True
            recorder.seen = seen.to(device)
            states = model.base_model(input_ids=ids.to(device), use_cache=False).last_hidden_state
            # The output layer itself is not run: its input is all that is wanted, its output is the largest array.
            recorder.add(model.get_output_embeddings(), states)
            progress.advance(len(group))
    progress.finish()
    means, counts = recorder.by_tensor(view, model)
    _check(means, counts)
    return store(folder, samples, means, counts)


class _Recorder:
    """Sums x² of the inputs of all linear layers, padding left out."""

    def __init__(self, model: Any) -> None:
        import torch

        self.seen: Any = None
        """`[B, T]` bool: which positions of the current batch are tokens."""
        self.sums: dict[int, Any] = {}
        self.counts: dict[int, int] = {}
        self._inputs: Any = None
        self._found: tuple[Any, int] = (0.0, 0)
        """Sum of squares per channel, and tokens, of the inputs that were seen last."""
        for module in model.base_model.modules():
            if isinstance(module, torch.nn.Linear):
                self.sums[id(module)], self.counts[id(module)] = 0.0, 0
                module.register_forward_pre_hook(lambda module, arguments: self.add(module, arguments[0]))

    def add(self, module: Any, inputs: Any) -> None:
        """`inputs`: `[B, T, channels]`."""
        if inputs is not self._inputs:  # q, k and v, or gate and up, are given the same one
            kept = inputs[self.seen].float()
            self._inputs, self._found = inputs, (kept.square().sum(0).double(), len(kept))
        total, count = self._found
        self.sums[id(module)] = self.sums.get(id(module), 0.0) + total
        self.counts[id(module)] = self.counts.get(id(module), 0) + count

    def by_tensor(self, view: Checkpoint, model: Any) -> tuple[dict[str, Any], dict[str, int]]:
        """Means and counts by checkpoint tensor name. A tied embedding gets the output layer's."""
        import torch

        head = model.get_output_embeddings()
        owners = {f"{name}.weight": module for name, module in model.named_modules() if id(module) in self.sums}
        owners.update(
            (f"{name}.weight", head)
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Embedding) and module.weight is head.weight
        )
        means: dict[str, Any] = {}
        counts: dict[str, int] = {}
        for name in view.tensors:
            module = next((owners[place] for place in view.module_names(name) if place in owners), None)
            if module is None:
                continue
            counts[name] = self.counts.get(id(module), 0)
            if counts[name]:
                means[name] = (self.sums[id(module)] / counts[name]).cpu().numpy().astype(np.float32)
        return means, counts


def _batches(samples: Sequence[Sample]) -> Iterator[list[Sample]]:
    """Samples of similar length, at most `_BATCH_TOKENS` tokens when padded."""
    group: list[Sample] = []
    for sample in sorted(samples, key=lambda sample: len(sample.ids)):
        if group and (len(group) + 1) * len(sample.ids) > _BATCH_TOKENS:
            yield group
            group = []
        group.append(sample)
    if group:
        yield group


def _check(means: dict[str, Any], counts: dict[str, int]) -> None:
    unseen = [name for name, count in counts.items() if count == 0]
    broken = [name for name, values in means.items() if not np.isfinite(values).all()]
    if unseen or not counts:
        raise DataError(
            "calibration-gap",
            f"{len(unseen)} layers saw no token",
            why=", ".join(unseen[:5]),
            hint="give more calibration text",
        )
    if broken:
        raise DataError(
            "calibration-not-finite",
            f"the inputs of {len(broken)} layers are not finite in float32",
            why=", ".join(broken[:5]),
            hint="the base or the adapter holds broken weights: lora2edge merge --prove says more",
        )
