"""The reference of the layered pass: the whole model in memory, run plainly, in the same batches."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch

from lora2edge.calibration.layout import Layout
from lora2edge.calibration.model import build_model
from lora2edge.contracts import Checkpoint, Item, Sample

LENGTHS = (5, 17, 3, 17, 40, 1)
ITEM = Item(({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}))


def samples(shared: int = 0, *, vocab: int = 700, lengths: tuple[int, ...] = LENGTHS) -> list[Sample]:
    """Sequences of random tokens of these `lengths` behind `shared` tokens that are the same in all."""
    generator = np.random.default_rng(0)
    own = [generator.integers(3, vocab, length).tolist() for length in lengths]
    return [Sample((*range(100, 100 + shared), *ids), 1, ITEM) for ids in own]


def run_whole(view: Checkpoint, texts: list[Sample], *, prefix: bool = True) -> dict[str, np.ndarray[Any, Any]]:
    """Inputs of all linear layers, and of the model's layers (`layer i`), all tokens one after another, float32.

    Each sample's tokens, the samples' common prefix too, in the order of the samples.
    """
    model = build_model(view, dtype="float32", device="cpu", rounded=False)
    causal = view.task == "causal-lm"
    layout = Layout.of(texts, shares_prefix=prefix and causal)
    seen: dict[str, Any] = {}

    def note(name: str) -> Any:
        def hook(_: Any, given: Any) -> None:
            seen.setdefault(name, given[0].clone())

        return hook

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(note(f"{name}.weight"))
    lists = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList)]
    for index, layer in enumerate(lists[0]):
        layer.register_forward_pre_hook(note(f"layer {index}"))
    found: dict[str, list[Any]] = {}

    def forward(rows: list[Any], cache: Any = None) -> Any:
        width = max(map(len, rows))
        ids = torch.full((len(rows), width), model.config.pad_token_id or 0)
        mask = torch.zeros(len(rows), width, dtype=torch.long)
        for row, tokens in enumerate(rows):
            ids[row, : len(tokens)], mask[row, : len(tokens)] = torch.tensor(tokens), 1
        seen.clear()
        with torch.inference_mode():
            if not causal:
                model(input_ids=ids, attention_mask=mask)
                return None
            if cache is not None:
                cache = copy.deepcopy(cache)
                cache.batch_repeat_interleave(len(rows))
            return model(input_ids=ids, past_key_values=cache, use_cache=True).past_key_values

    cache, first = None, {}
    if layout.prefix:
        cache = forward([layout.ids[0][: layout.prefix]])
        first = {name: values[0] for name, values in seen.items()}
    parts: dict[int, dict[str, Any]] = {}
    for group in layout.groups:
        forward([layout.ids[index][layout.prefix :] for index in group], cache)
        for row, index in enumerate(group):
            own = len(layout.ids[index]) - layout.prefix
            parts[index] = {}
            for name, values in seen.items():
                flat = values.reshape(len(group), -1, values.shape[-1])
                parts[index][name] = flat[row] if flat.shape[1] == 1 else flat[row, :own]
                if first:
                    parts[index][name] = torch.cat([first[name].reshape(-1, values.shape[-1]), parts[index][name]])
    for index in range(len(texts)):
        for name, values in parts[index].items():
            found.setdefault(name, []).append(values)
    return {name: torch.cat(values).numpy() for name, values in found.items()}
