"""A plain base as QLoRA training saw it: its linear weights quantized and dequantized as bitsandbytes does it.

`load_in_4bit` casts the checkpoint to one dtype, quantizes each linear weight but the output head, and computes
with what `dequantize_4bit` gives back. This view computes the same rows from the 16-bit checkpoint, without torch,
bitsandbytes or a GPU: bit-equal to `quantize_4bit` and `dequantize_4bit` of bitsandbytes 0.50 on the CPU. With double
quantization that holds where torch's mean of the block scales is the correctly rounded one; where it is a digit
off, which depends on threads and device, so are the scales.
"""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from lora2edge.checkpoint.floats import FLOAT_DTYPES
from lora2edge.checkpoint.quantized.blocks import (
    BLOCK_SIZES,
    CODES,
    Kernel,
    QuantType,
    block_maxima,
    double_quantized,
    nearest_codes,
    scale_blocks,
)
from lora2edge.checkpoint.quantized.weight import refuse_conv1d, rounded
from lora2edge.contracts import Base, Checkpoint, CheckpointRef, StoredBytes, Task, TensorInfo, TokenizerFiles
from lora2edge.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

    from lora2edge.contracts import FloatArray

_SLAB_ELEMENTS = 1 << 20
_SCALES_KEPT_BYTES = 64 << 20
_EMBEDDINGS = re.compile(
    r"(^|\.)(embed_tokens|wte|wpe|embed_in|shared|relative_attention_bias|embed_positions|rotary_emb"
    r"|\w*embeddings?)\.weight$"
)
_HEADS = re.compile(r"(^|\.)(lm_head|embed_out|output|score|classifier|cls\.predictions\.decoder|qa_outputs)\.weight$")
_EXPERTS = re.compile(r"\.(experts|shared_expert_gate|router|gate)\.")


@dataclass(frozen=True, slots=True)
class BnbSettings:
    """How a base was quantized for training: transformers' BitsAndBytesConfig with `load_in_4bit`."""

    quant_type: QuantType = "nf4"
    """`bnb_4bit_quant_type`."""
    double_quant: bool = True
    """`bnb_4bit_use_double_quant`."""
    dtype: str = "BF16"
    """The `dtype` (torch_dtype) of from_pretrained: weights are cast to it first, and dequantized to it. Not
    `bnb_4bit_compute_dtype`, which activations are cast to."""
    blocksize: int = 64
    """Values per scale; transformers leaves it at 64."""
    kernel: Kernel = "cuda"
    """Whose rounding of double-quantized scales: a GPU's, or bitsandbytes' own library on the CPU."""
    names: tuple[str, ...] | None = None
    """The weights that were quantized, as the checkpoint names them; None for what `linear_names` gives."""

    def __post_init__(self) -> None:
        sound = self.quant_type in CODES and self.blocksize in BLOCK_SIZES and self.kernel in ("cuda", "cpu")
        if not sound or self.dtype not in ("BF16", "F16", "F32"):
            raise CheckpointError(
                "bad-quantization-settings",
                "these are no settings of bitsandbytes",
                why=f"quant_type {self.quant_type!r}, blocksize {self.blocksize!r}, dtype {self.dtype!r}, "
                f"kernel {self.kernel!r}",
                hint='for example quant_type "nf4", blocksize 64, dtype "BF16", kernel "cuda"',
            )

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "names": None if self.names is None else list(self.names)}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> BnbSettings:
        names = data.get("names")
        return BnbSettings(**{**data, "names": None if names is None else tuple(names)})


def requantized(view: Base, settings: BnbSettings) -> RequantizedCheckpoint:
    """`view`, a plain checkpoint, with the weights that training on it with `load_in_4bit` saw. Reads no weight.

    Raises CheckpointError for names that are no matrices of the checkpoint, and where the names have to be given.
    """
    refuse_conv1d(view.config, "bitsandbytes")
    names = linear_names(view) if settings.names is None else settings.names
    for name in names:
        info = view.tensors.get(name)
        if info is None or len(info.shape) != 2 or info.dtype not in FLOAT_DTYPES or view.stored(name) is None:
            raise CheckpointError(
                "bad-quantization-settings",
                f"{name!r} is no plain matrix of the checkpoint",
                why="it is not there" if info is None else f"it is {info.dtype} {list(info.shape)}",
                hint="name weights of linear layers as the checkpoint does, such as model.layers.0.mlp.up_proj.weight",
            )
    return RequantizedCheckpoint(view, replace(settings, names=tuple(names)))


def linear_names(view: Checkpoint) -> list[str]:
    """The weights that `load_in_4bit` quantizes: matrices of linear layers, without embeddings and output heads.

    Raises CheckpointError for mixtures of experts: transformers 4 quantizes each expert, transformers 5 fuses them
    and does not.
    """
    found = [
        name
        for name, info in view.tensors.items()
        if name.endswith(".weight")
        and len(info.shape) == 2
        and info.dtype in FLOAT_DTYPES
        and not _EMBEDDINGS.search(name)
        and not _HEADS.search(name)
    ]
    experts = next((name for name in view.tensors if _EXPERTS.search(name)), None)
    if experts is not None:
        raise CheckpointError(
            "which-weights",
            "it is not known which weights of this mixture of experts were quantized for training",
            why=f"transformers 4 quantizes experts such as {experts}, transformers 5 does not",
            hint="give the checkpoint that was saved quantized with --trained-on, or, in a recipe, the weights' names: "
            "trained_on: {quant_type: nf4, names: [...]}",
        )
    return found


class RequantizedCheckpoint:
    """A plain checkpoint whose linear weights went through bitsandbytes' 4 bits and back."""

    def __init__(self, base: Base, settings: BnbSettings) -> None:
        self.base = base
        self.settings = settings
        self._names = frozenset(settings.names or ())
        self._tensors = {
            name: TensorInfo(name, info.shape, settings.dtype, info.shard) if name in self._names else info
            for name, info in base.tensors.items()
        }
        self._scales: OrderedDict[str, FloatArray] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def config(self) -> Mapping[str, Any]:
        return self.base.config

    @property
    def tokenizer(self) -> TokenizerFiles:
        return self.base.tokenizer

    @property
    def task(self) -> Task:
        return self.base.task

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    @property
    def path(self) -> Path:
        return self.base.path

    @property
    def is_quantized(self) -> bool:
        return True

    @property
    def ref(self) -> CheckpointRef:
        return replace(self.base.ref, requantized=self.settings.to_json())

    def rows(self, name: str, start: int, stop: int) -> FloatArray:
        """Rows as dequantize_4bit gives them: rounded to `settings.dtype`. Others as the base has them."""
        if name not in self._names:
            return self.base.rows(name, start, stop)
        height, width = self._tensors[name].shape
        if not 0 <= start <= stop <= height:
            raise IndexError(f"rows {start}:{stop} of {name!r}, which has {height}")
        size = self.settings.blocksize
        block, end = start * width // size, -(-stop * width // size)
        values = self._blocks(name, block, end)
        absmax = block_maxima(values, size)
        codes = nearest_codes(values, absmax, self.settings.quant_type, size)
        if self.settings.double_quant:
            absmax = self._double_quantized(name)[block:end]
        out = scale_blocks(codes, absmax, size)[start * width - block * size : stop * width - block * size]
        return rounded(out, self.settings.dtype).reshape(stop - start, width)

    def delta(self, name: str, start: int, stop: int) -> FloatArray | None:
        return None

    def stored(self, name: str) -> StoredBytes | None:
        return None if name in self._names else self.base.stored(name)

    def module_names(self, name: str) -> list[str]:
        return self.base.module_names(name)

    def fingerprint(self) -> dict[str, Any]:
        """The base's, and the settings."""
        return {**self.base.fingerprint(), "requantized": self.settings.to_json()}

    def file_hashes(self) -> dict[str, str]:
        return self.base.file_hashes()

    def close(self) -> None:
        self.base.close()

    def _blocks(self, name: str, block: int, end: int) -> FloatArray:
        """The values of blocks `block:end`, flat, in the dtype that training loaded them in."""
        height, width = self._tensors[name].shape
        size = self.settings.blocksize
        first, last = block * size, min(end * size, height * width)
        top = first // width
        rows = self.base.rows(name, top, -(-last // width))
        return rounded(rows.reshape(-1)[first - top * width : last - top * width], self.settings.dtype)

    def _double_quantized(self, name: str) -> FloatArray:
        """The block scales of the whole tensor; they depend on each other, so the first slab reads all of it."""
        with self._lock:
            kept = self._scales.get(name)
            if kept is not None:
                self._scales.move_to_end(name)
                return kept
            size = self.settings.blocksize
            count = -(-self._tensors[name].size // size)
            step = max(1, _SLAB_ELEMENTS // size)
            maxima = [
                block_maxima(self._blocks(name, block, min(block + step, count)), size)
                for block in range(0, count, step)
            ]
            scales = double_quantized(np.concatenate(maxima), self.settings.kernel)
            self._scales[name] = scales
            while len(self._scales) > 1 and sum(held.nbytes for held in self._scales.values()) > _SCALES_KEPT_BYTES:
                self._scales.popitem(last=False)
            return scales
