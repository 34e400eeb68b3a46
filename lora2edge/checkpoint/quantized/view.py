"""A quantized checkpoint's tensors as those of the plain one that it stands for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from lora2edge.checkpoint.floats import FLOAT_DTYPES
from lora2edge.checkpoint.quantized import bnb, packed, scaled
from lora2edge.checkpoint.quantized.weight import Weight, unsupported
from lora2edge.contracts import StoredBytes, TensorInfo
from lora2edge.errors import CheckpointError

if TYPE_CHECKING:
    from lora2edge.checkpoint.header import Header
    from lora2edge.checkpoint.reader import TensorReader
    from lora2edge.contracts import FloatArray

_Find = Callable[[Mapping[str, Any], Mapping[str, Any], "TensorReader"], list[Weight]]

_METHODS: dict[str, tuple[_Find, tuple[str, ...]]] = {
    "bitsandbytes": (bnb.find_bitsandbytes, bnb.AUXILIARY),
    "gptq": (packed.find_gptq, packed.AUXILIARY),
    "awq": (packed.find_awq, packed.AUXILIARY),
    "fp8": (scaled.find_fp8, scaled.AUXILIARY),
    "fbgemm_fp8": (scaled.find_fp8, scaled.AUXILIARY),
    "compressed-tensors": (scaled.find_compressed, scaled.AUXILIARY),
}
_KEYS = ("quantization_config", "compression_config")
_BUFFERS = ("BOOL", "I64")
"""What plain checkpoints have besides floats: position ids and masks."""
_PLAIN = (*_BUFFERS, "U8", "I32")
"""Old GPT-2 files have masks of bytes, others positions of 32 bits."""
_PARTS = (*bnb.AUXILIARY, "qweight", "qzeros", "g_idx", "weight_packed", "weight_zero_point")
_SCALES = ("weight_scale", "weight_scale_inv", "weight_scale_2")
_MODELOPT = "hf_quant_config.json"


class DequantizedReader:
    """TensorReader's `tensors`, `rows` and `bytes_at`, with logical weights in the place of their stored parts."""

    def __init__(self, reader: TensorReader, weights: list[Weight], hidden: set[str]) -> None:
        self._reader = reader
        self._weights = {weight.info.name: weight for weight in weights}
        places = {weight.parts[0]: weight.info for weight in weights}
        shown = {name: places.get(name, info) for name, info in reader.tensors.items()}
        self.tensors: Mapping[str, TensorInfo] = {
            info.name: info for name, info in shown.items() if name in places or name not in hidden
        }

    @property
    def headers(self) -> Mapping[str, Header]:
        return self._reader.headers

    def rows(self, name: str, start: int, stop: int) -> FloatArray:
        """Rows `start:stop`, float32; as the format's own library dequantizes, see the format's module."""
        weight = self._weights.get(name)
        if weight is None:
            return self._reader.rows(name, start, stop)
        if not 0 <= start <= stop <= weight.info.shape[0]:
            raise IndexError(f"rows {start}:{stop} of {name!r}, which has {weight.info.shape[0]}")
        if start == stop:
            return np.empty((0, *weight.info.shape[1:]), np.float32)
        return weight.rows(start, stop)

    def bytes_at(self, name: str) -> StoredBytes | None:
        """Where the tensor lies; None for a weight that is computed."""
        return None if name in self._weights else self._reader.bytes_at(name)

    def close(self) -> None:
        self._reader.close()


def dequantized(
    config: Mapping[str, Any], reader: TensorReader
) -> tuple[dict[str, Any], TensorReader | DequantizedReader]:
    """Config without its quantization, and a reader of the weights that the checkpoint stands for.

    Reads headers and a few hundred bytes per weight. A plain checkpoint is returned as it is. Raises CheckpointError:
    `quantized-base` for a method or format that is not known or not named, `damaged-quantization` where stored parts
    do not fit.
    """
    plain = {key: value for key, value in config.items() if key not in _KEYS}
    settings = next((config[key] for key in _KEYS if config.get(key)), None)
    if settings is None:
        _refuse_unsaid(reader)
        return dict(config), reader
    if not isinstance(settings, dict):
        raise unsupported("an unknown method", f"quantization_config is a {type(settings).__name__}, not an object")
    method, title = _method(settings)
    if method not in _METHODS:
        known = "bitsandbytes, GPTQ, AWQ, FP8 and compressed-tensors with 8 bits"
        raise unsupported(title, f"its weights can be read by its own library only; known are {known}")
    find, auxiliary = _METHODS[method]
    weights = find(settings, config, reader)
    if not weights:
        raise CheckpointError(
            "quantized-base",
            f"config.json says that the base is quantized with {title}, and no weight is",
            why="quantization_config and the weights are from different saves",
            hint='remove "quantization_config" from config.json where the weights are meant to be plain',
        )
    return plain, DequantizedReader(reader, weights, _hidden(reader, weights, auxiliary))


def _refuse_unsaid(reader: TensorReader) -> None:
    """Raises CheckpointError where a checkpoint without settings is quantized after all: it would pass for plain."""
    why = ""
    for name, info in reader.tensors.items():
        last = name.rpartition(".")[2]
        codes = info.dtype not in FLOAT_DTYPES and (last == "weight" or info.dtype not in _PLAIN)
        if codes or last in _PARTS or last.endswith(_SCALES):
            why = f"it stores {name!r} as {info.dtype} {list(info.shape)}"
            break
    hint = "give the 16-bit checkpoint that it was made from with --base, or one whose config.json says how"
    if not why and (reader.folder / _MODELOPT).exists():
        why = f"{_MODELOPT} is there: NVIDIA ModelOpt quantized it"
        hint += f"; where the weights are plain, remove {_MODELOPT}"
    if why:
        raise CheckpointError(
            "quantized-base",
            "the base is quantized, and its config.json has no quantization_config",
            why=f"{why}; how codes become weights is not said",
            hint=hint,
        )


def _method(settings: Mapping[str, Any]) -> tuple[str, str]:
    """The method's name, and how to call it in a message. Files of early 2023 do not name bitsandbytes."""
    method = str(settings.get("quant_method") or "").lower()
    if method in ("", "bitsandbytes") and (settings.get("load_in_4bit") or settings.get("load_in_8bit")):
        return "bitsandbytes", "bitsandbytes 4-bit" if settings.get("load_in_4bit") else "bitsandbytes 8-bit"
    return method, method or "an unknown method"


def _hidden(reader: TensorReader, weights: list[Weight], auxiliary: tuple[str, ...]) -> set[str]:
    """The stored tensors that are no weights. Raises CheckpointError for one that should belong to a weight."""
    hidden: set[str] = set()
    for weight in weights:
        hidden.update(weight.parts)
        if weight.info.name in reader.tensors and weight.info.name not in weight.parts:
            raise CheckpointError(
                "tensor-twice",
                f"{weight.info.name!r} is there both plain and quantized",
                why=f"{weight.parts[0]} holds it too",
                hint="remove the files that do not belong to the checkpoint",
            )
    for name, info in reader.tensors.items():
        if name in hidden:
            continue
        last = name.rpartition(".")[2]
        if last in scaled.AUXILIARY[3:] and last in auxiliary:
            hidden.add(name)
        elif last in auxiliary or info.dtype not in (*FLOAT_DTYPES, *_BUFFERS):
            raise CheckpointError(
                "damaged-quantization",
                f"the stored tensor {name!r}, {info.dtype} {list(info.shape)}, belongs to no quantized weight",
                why="other tensors of the same weight are missing, or it is in a format that is not known",
                hint="download it again, or give the 16-bit checkpoint that it was quantized from with --base",
            )
    return hidden
