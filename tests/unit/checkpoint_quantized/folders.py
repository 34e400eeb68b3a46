"""Quantized checkpoint folders made from tensors, on top of a tiny plain checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from lora2edge.checkpoint import StoredCheckpoint


def rewrite(
    folder: Path, quantization: dict[str, Any] | None, changed: Mapping[str, Mapping[str, torch.Tensor]]
) -> Path:
    """Puts, in the checkpoint in `folder`, the parts `changed[name]` in the place of the tensor `name`."""
    tensors = load_file(folder / "model.safetensors")
    for name, parts in changed.items():
        del tensors[name]
        tensors.update(parts)
    tensors = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    configure(folder, quantization_config=quantization)
    return folder


def configure(folder: Path, **entries: Any) -> None:
    """Sets entries of config.json; None removes one."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **entries}
    path.write_text(
        json.dumps({key: value for key, value in config.items() if key not in entries or value is not None})
    )


def assert_rows(checkpoint: StoredCheckpoint, name: str, expected: torch.Tensor) -> None:
    """All rows at once, and slabs that start and stop inside blocks, are bit-equal to `expected`."""
    info = checkpoint.tensors[name]
    assert info.shape == tuple(expected.shape)
    assert checkpoint.stored(name) is None
    wanted = expected.float().numpy()
    height = info.shape[0]
    for start, stop in ((0, height), (1, height), (0, 1), (height // 3, height // 2 + 1), (height, height)):
        rows = checkpoint.rows(name, start, stop)
        assert rows.dtype == np.float32
        np.testing.assert_array_equal(rows.view(np.uint32), wanted[start:stop].view(np.uint32))
        rows[:] = 0
    np.testing.assert_array_equal(checkpoint.rows(name, 0, height), wanted)
