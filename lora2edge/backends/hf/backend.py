"""The `hf` backend: base + adapter as one safetensors checkpoint, run in PyTorch."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lora2edge.backends.hf.classifier import open_live_classifier
from lora2edge.backends.hf.session import open_baseline
from lora2edge.backends.hf.write import write_bytes, write_checkpoint
from lora2edge.checkpoint import FLOAT_DTYPES, open_checkpoint
from lora2edge.contracts import (
    CLASSIFICATIONS,
    BackendHealth,
    Calibration,
    Checkpoint,
    CheckpointRef,
    Classifier,
    Estimate,
    Lowered,
    Machine,
    Progress,
    Session,
    SessionOptions,
    TensorDamage,
    TensorInfo,
)
from lora2edge.errors import InputError, TargetError, refuse
from lora2edge.target import Target

if TYPE_CHECKING:
    from lora2edge.contracts import FloatArray

PRECISION = "stored"
_SLAB_ELEMENTS = 1 << 22
_BASE_RAM = 84 << 20
"""Python, numpy and the rest, measured; and the next two."""
_RAM_PER_TENSOR = 8 << 10
_RAM_PER_TOKENIZER_BYTE = 2
_THREADS_PER_CORE = 2
"""At most: slabs are computed on all logical cores, the plan knows the physical ones."""
_WRITE_BYTES_PER_SECOND = 200e6
"""On one core, merging included; a slow disk is slower."""
_LIBRARIES = ("torch", "transformers", "peft")
_WIDTHS = {"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


class HfBackend:
    """Implements contracts.Backend: each weight is rounded once, to the dtype that the base stores it in."""

    name = "hf"
    extra = "torch"

    def check(self, checkpoint: Checkpoint, target: Target, machine: Machine) -> Estimate:
        """Any checkpoint can be written, whatever its task; a precision or option of another backend is refused."""
        errors: list[InputError] = []
        if target.precision != PRECISION:
            errors.append(
                TargetError(
                    "unknown-precision",
                    f"{target.name}: the hf backend has no precision {target.precision!r}",
                    why="it keeps every tensor in the dtype that the base stores it in",
                    hint=f"precision: {PRECISION}",
                )
            )
        if target.options:
            errors.append(
                TargetError(
                    "unknown-option",
                    f"{target.name}: the hf backend has no options",
                    why="given: " + ", ".join(sorted(target.options)),
                    hint="options: {}",
                )
            )
        refuse(errors)
        size = sum(
            tensor.size * (FLOAT_DTYPES.get(tensor.dtype) or _WIDTHS.get(tensor.dtype, 1))
            for tensor in checkpoint.tensors.values()
        )
        tokenizer_bytes = sum(Path(path).stat().st_size for path in checkpoint.tokenizer.files.values())
        ram = _BASE_RAM + _RAM_PER_TENSOR * len(checkpoint.tensors) + _RAM_PER_TOKENIZER_BYTE * tokenizer_bytes
        ram += write_bytes(checkpoint, _THREADS_PER_CORE * machine.cores)
        return Estimate(ram_bytes=ram, disk_bytes=size, seconds=size / _WRITE_BYTES_PER_SECOND)

    def lower(
        self,
        checkpoint: Checkpoint,
        target: Target,
        calibration: Calibration | None,
        out: Path,
        progress: Progress,
    ) -> Lowered:
        """Writes the checkpoint. It is not quantized, so calibration is not used."""
        write_checkpoint(checkpoint, out, progress)
        dtypes = sorted({tensor.dtype for tensor in checkpoint.tensors.values()})
        return Lowered(versions={"numpy": np.__version__}, notes={"dtypes": dtypes})

    def open(self, path: Path, target: Target, options: SessionOptions) -> Session | Classifier:
        """The written folder in PyTorch, in its own dtype."""
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
        written = CheckpointRef(str(path), trust_remote_code=options.trust_remote_code)
        with contextlib.closing(open_checkpoint(str(path))) as checkpoint:
            if checkpoint.task in CLASSIFICATIONS:
                return open_live_classifier(written, options, dtype=dtype)
        return open_baseline(written, options, dtype=dtype)

    def damage(self, checkpoint: Checkpoint, path: Path, progress: Progress) -> list[TensorDamage]:
        """Compares the written matrices with the unrounded ones."""
        written = open_checkpoint(str(path))
        matrices = [tensor for tensor in checkpoint.tensors.values() if len(tensor.shape) > 1]
        progress.start("compare weights", sum(tensor.size for tensor in matrices), "weights")
        try:
            found = [_damage(checkpoint, written, tensor, progress) for tensor in matrices]
        finally:
            written.close()
        progress.finish()
        return found

    def doctor(self) -> BackendHealth:
        """Whether PyTorch, transformers and PEFT can be imported. Never raises."""
        try:
            import peft  # noqa: F401
            import torch
            import transformers  # noqa: F401
        except Exception as error:  # a broken install raises anything
            return BackendHealth(self.name, False, f"{type(error).__name__}: {error}", "pip install 'lora2edge[torch]'")
        versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in _LIBRARIES)
        where = torch.cuda.get_device_name() if torch.cuda.is_available() else torch.backends.cpu.get_cpu_capability()
        return BackendHealth(self.name, True, f"{versions} ({where})")


def _damage(checkpoint: Checkpoint, written: Checkpoint, tensor: TensorInfo, progress: Progress) -> TensorDamage:
    """One matrix, in slabs of rows; sums in float64."""
    weight = error = change = kept = 0.0
    step = max(1, _SLAB_ELEMENTS // max(1, tensor.size // tensor.shape[0]))
    for start in range(0, tensor.shape[0], step):
        stop = min(tensor.shape[0], start + step)
        exact = checkpoint.rows(tensor.name, start, stop)
        off = written.rows(tensor.name, start, stop) - exact
        weight += _dot(exact, exact)
        error += _dot(off, off)
        delta = checkpoint.delta(tensor.name, start, stop)
        if delta is not None:
            change += _dot(delta, delta)
            kept += _dot(off, delta)  # Q − W_base = (Q − W) + ΔW
        progress.advance(off.size)
    layer = re.search(r"\.(\d+)\.", tensor.name)
    return TensorDamage(
        name=tensor.name,
        type=written.tensors[tensor.name].dtype,
        layer=int(layer[1]) if layer else None,
        relative_error=(error / weight) ** 0.5 if weight else 0.0,
        delta_kept=1.0 + kept / change if change else None,
        delta_noise=(error / change) ** 0.5 if change else None,
    )


def _dot(left: FloatArray, right: FloatArray) -> float:
    return float(np.einsum("i,i->", left.ravel(), right.ravel(), dtype=np.float64))
