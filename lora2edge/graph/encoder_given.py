"""Config and tensors of a checkpoint while it is read: each value checked, each tensor given its place, each problem
noted."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lora2edge.errors import CheckpointError, InputError, UnsupportedError, refuse
from lora2edge.graph.encoder import Activation, Linear, Norm, Role, Rows

if TYPE_CHECKING:
    from lora2edge.contracts import Task, TensorInfo

_ACTIVATIONS: Mapping[str, Activation] = {
    "gelu": "gelu", "gelu_python": "gelu", "gelu_new": "gelu-tanh", "gelu_fast": "gelu-tanh",
    "gelu_pytorch_tanh": "gelu-tanh", "gelu_python_tanh": "gelu-tanh", "relu": "relu", "tanh": "tanh",
    "silu": "silu", "swish": "silu",
}  # fmt: skip
"""transformers' name → ours."""
UNUSED = (
    "*.embeddings.position_ids", "*.embeddings.token_type_ids",  # buffers that older versions saved
    "*.pooler.dense.*", "pooler.dense.*",  # of the pre-training, where the classifier has a head of its own
    "cls.*", "lm_head.*", "lm_predictions.*", "mask_predictions.*", "vocab_transform.*", "vocab_layer_norm.*",
    "vocab_projector.*",  # heads of the pre-training
    "deberta.embeddings.position_embeddings.weight",  # stored, and not used, by DeBERTa-v3
)  # fmt: skip
"""Tensors that need no place, as patterns."""


def unknown_model(what: str, why: str) -> UnsupportedError:
    return UnsupportedError(
        "onnx-architecture", what, why=why, hint="choose a target of another backend, or a base of a known architecture"
    )


class Given:
    """Config and tensors, with a note of every problem, and of every tensor that found its place."""

    def __init__(self, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], task: Task) -> None:
        self.config, self.task = config, task
        self._tensors = tensors
        self._used: set[str] = set()
        self._missing: list[str] = []
        self._problems: list[InputError] = []

    @property
    def is_sequence(self) -> bool:
        return self.task == "sequence-classification"

    def whole(self, key: str, default: int, least: int = 1) -> int:
        """A whole number of the config."""
        value = self.config.get(key)
        if value is None:
            return default
        if type(value) is not int or not least <= value < 1 << 31:
            self._bad(key, value, f"a whole number of at least {least}")
            return default
        return value

    def layers(self, key: str, default: int) -> range:
        """Numbers of the layers; beyond one that is missing altogether, no more are looked for."""
        return range(min(self.whole(key, default), len(self._tensors) + 1))

    def number(self, key: str, default: float) -> float:
        """A number of the config above 0."""
        value = self.config.get(key)
        if value is None:
            return default
        if type(value) not in (int, float) or not 0 < value < math.inf:
            self._bad(key, value, "a finite number above 0")
            return default
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.config.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            self._bad(key, value, "true or false")
            return default
        return value

    def activation(self, key: str, default: str = "gelu") -> Activation:
        name = self.config.get(key) or default
        if name not in _ACTIVATIONS:
            self.refuse(f"{key} is {name}", f"known activations: {', '.join(sorted(_ACTIVATIONS))}")
        return _ACTIVATIONS.get(str(name), "gelu")

    def refuse(self, what: str, why: str) -> None:
        self._problems.append(unknown_model(f"in the {self.config.get('model_type')} checkpoint, {what}", why))

    def take(self, name: str, *shape: int) -> str:
        """The name in the files of a tensor of this shape; 0 stands for any length."""
        # The first checkpoints of BERT came from TensorFlow, whose norms have a gamma and a beta.
        old = name.removesuffix(".weight") + ".gamma" if name.endswith(".weight") else name[: -len(".bias")] + ".beta"
        name = old if name not in self._tensors and "LayerNorm" in name and old in self._tensors else name
        info = self._tensors.get(name)
        if info is None:
            self._missing.append(name)
            return name
        self._used.add(name)
        if len(info.shape) != len(shape) or any(b not in (0, a) for a, b in zip(info.shape, shape, strict=True)):
            wanted = ", ".join(str(length or "any") for length in shape)
            self._problems.append(
                CheckpointError(
                    "tensor-shape",
                    f"{name} is of shape {list(info.shape)}, not [{wanted}]",
                    why="config.json gives the sizes",
                    hint="config and weights are from different saves: download or save all of them again",
                )
            )
        return name

    def rows(self, name: str) -> int:
        """First length of a tensor."""
        info = self._tensors.get(name)
        return info.shape[0] if info and info.shape else 0

    def linear(
        self, name: str, rows: int, columns: int, role: Role, layer: int | None = None, *, bias: bool = True
    ) -> Linear:
        weight = self.take(f"{name}.weight", rows, columns)
        return Linear(weight, self.take(f"{name}.bias", rows) if bias else None, rows, columns, role, layer)

    def classifier(self, name: str, columns: int) -> Linear:
        """The last matrix, whose rows are the classes."""
        rows = self.rows(f"{name}.weight")
        labels = self.config.get("id2label")
        if isinstance(labels, dict) and rows and len(labels) != rows:
            self._problems.append(
                CheckpointError(
                    "label-count",
                    f"{name}.weight has {rows} rows, config.json names {len(labels)} labels",
                    why="each row is the score of a label",
                    hint="correct id2label in config.json",
                )
            )
        return self.linear(name, rows, columns, "classifier")

    def norm(self, name: str, size: int, epsilon: float) -> Norm:
        return Norm(self.take(f"{name}.weight", size), self.take(f"{name}.bias", size), size, epsilon)

    def table(self, name: str, rows: int, columns: int) -> Rows:
        return Rows(self.take(f"{name}.weight", rows, columns), rows or self.rows(f"{name}.weight"), columns)

    def finish(self) -> None:
        """Raises what was found wrong."""
        if self._missing:
            self._problems.append(
                CheckpointError(
                    "missing-tensors",
                    f"the checkpoint lacks {_shown(self._missing)}",
                    why="the model cannot be computed without; it would run on random numbers",
                    hint="download or save the checkpoint again",
                )
            )
        left = [name for name in self._tensors if name not in self._used and not _is_unused(name)]
        if left:
            self.refuse(f"no place is known for {_shown(left)}", "a model written without them might be another one")
        refuse(self._problems)

    def _bad(self, key: str, value: Any, expected: str) -> None:
        self._problems.append(
            CheckpointError(
                "bad-config",
                f"{key} is {value!r} in config.json",
                why=f"expected {expected}",
                hint=f"download or save it again, or correct {key}",
            )
        )


def _is_unused(name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in UNUSED)


def _shown(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3:,} more" if len(names) > 3 else "")
