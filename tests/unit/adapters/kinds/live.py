"""PEFT's live adapter and our parts, each as logits of the same tiny model."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from lora2edge.adapters.parts import Part
from lora2edge.checkpoint import TensorReader
from tests.tiny import shake_adapter

LARGEST_ERROR = 1e-5
"""Of the logits, relative to the largest one: float32 sums in another order give 1e-6."""
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IDS = torch.tensor([[5, 300, 77, 401, 12, 9, 600, 333, 2, 41, 150, 700]])
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def load_base(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()


def save_adapter(folder: Path, base: Path, config: PeftConfig, strength: float = 0.15, seed: int = 1) -> Path:
    """What training leaves in a folder, with every trained parameter moved away from its start."""
    torch.manual_seed(seed)
    model = get_peft_model(load_base(base), config)
    shake_adapter(model, strength, seed)
    model.save_pretrained(folder)
    return folder


def live_model(base: Path, folder: Path) -> Any:
    return PeftModel.from_pretrained(load_base(base), folder).eval()


def read_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / CONFIG).read_text())


def read_parts(read: Callable[..., list[Part]], folder: Path) -> list[Part]:
    reader = TensorReader(folder, [WEIGHTS])
    paths = {name.removeprefix("base_model.model."): name for name in reader.tensors}
    return read(read_config(folder), reader, paths)


def merge(base: Path, parts: Sequence[Part], slab: int | None = None) -> Any:
    """The base with the parts applied to its weights, whole or `slab` rows at a time."""
    model = load_base(base)
    placed = []
    for part in parts:
        parameter = outputs_first(model, f"{part.module}.{part.parameter}")
        if parameter is None:
            assert getattr(part, "optional", False), f"no {part.module}.{part.parameter}"
            continue
        assert part.misfit(tuple(parameter.shape)) is None
        placed.append((part, parameter))
    for part, parameter in placed:
        update = part.load()
        step = slab or len(parameter)
        for start in range(0, len(parameter), step):
            stop = min(start + step, len(parameter))
            rows = update.apply(parameter[start:stop].numpy().copy(), start, stop)
            assert rows.dtype == np.float32
            parameter[start:stop] = torch.from_numpy(rows)
    return model


def outputs_first(model: Any, path: str) -> torch.Tensor | None:
    """The parameter in PEFT's orientation, or None: transformers' Conv1D stores its weight `[in, out]`."""
    module, _, name = path.rpartition(".")
    parameter = getattr(model.get_submodule(module), name)
    if parameter is None:
        return None
    return parameter.data.T if isinstance(model.get_submodule(module), Conv1D) and name == "weight" else parameter.data


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max() / one.abs().max())


def assert_same_as_live(read: Callable[..., list[Part]], base: Path, folder: Path) -> list[Part]:
    """Also that every tensor of the file belongs to a part, and that slabs make no difference."""
    live = logits(live_model(base, folder))
    parts = read_parts(read, folder)
    # PEFT saves the base's own weight along where it adapts embedding or head.
    ours = {name for name in load_file(folder / WEIGHTS) if not name.endswith(".base_layer.weight")}
    assert {name for part in parts for name in part.tensors} == ours
    assert difference(live, logits(load_base(base))) > 0.01, "the adapter does nothing"
    assert difference(live, logits(merge(base, parts))) <= LARGEST_ERROR
    assert difference(live, logits(merge(base, parts, slab=7))) <= LARGEST_ERROR
    return parts


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    """Changes the tensors of a saved adapter."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)
    return folder


def edit_config(folder: Path, *without: str, **changes: Any) -> Path:
    config = {key: value for key, value in read_config(folder).items() if key not in without}
    (folder / CONFIG).write_text(json.dumps({**config, **changes}))
    return folder
