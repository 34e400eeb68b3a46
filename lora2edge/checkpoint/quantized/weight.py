"""What every quantized format has in common: a logical weight, the stored parts it is made of, and its errors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from lora2edge.checkpoint.floats import FLOAT_DTYPES, decode, encode_rows
from lora2edge.contracts import TensorInfo
from lora2edge.errors import CheckpointError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lora2edge.checkpoint.reader import TensorReader
    from lora2edge.contracts import FloatArray

_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_CONV1D = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")


class Weight(Protocol):
    """A weight that is stored in parts, and that rows of can be computed from."""

    @property
    def info(self) -> TensorInfo:
        """Its logical name, shape and dtype, as a plain checkpoint would have it."""
        ...

    @property
    def parts(self) -> tuple[str, ...]:
        """The stored tensors that it is made of, the one that gives it its place in the file first."""
        ...

    def rows(self, start: int, stop: int) -> FloatArray:
        """Rows `start:stop`, at least one, float32, a new array. Bounds were checked. Safe from several threads."""
        ...


def torch_dtype(name: Any) -> str | None:
    """safetensors' word for torch's: "bfloat16" or "torch.bfloat16" → "BF16"; None for what is no weight's dtype."""
    return _DTYPES.get(name.removeprefix("torch.")) if isinstance(name, str) else None


def config_dtype(config: Mapping[str, Any], otherwise: str) -> str:
    """The dtype that config.json gives the weights, as safetensors writes it; `otherwise` where it gives none."""
    return torch_dtype(config.get("dtype") or config.get("torch_dtype")) or otherwise


def rounded(values: FloatArray, dtype: str) -> FloatArray:
    """`values` rounded once to `dtype`, as float32: what a library computes with that dequantizes to `dtype`."""
    if dtype == "F32":
        return values
    return decode(encode_rows(values, dtype).reshape(-1).view(np.uint8), dtype).reshape(values.shape)


def damaged(name: str, why: str) -> CheckpointError:
    """The error for a weight whose parts do not fit together."""
    return CheckpointError(
        "damaged-quantization",
        f"the quantized weight {name!r} cannot be read",
        why=why,
        hint="download it again, or give the 16-bit checkpoint that it was quantized from with --base",
    )


def unsupported(method: str, why: str) -> CheckpointError:
    """The refusal of a whole quantized checkpoint, by the method's name."""
    return CheckpointError(
        "quantized-base",
        f"a base quantized with {method} cannot be merged",
        why=why,
        hint="give the 16-bit checkpoint that it was quantized from with --base",
    )


def refuse_conv1d(config: Mapping[str, Any], method: str) -> None:
    """GPT-2 stores its matrices transposed, and quantizers store the transpose of that."""
    if config.get("model_type") in _CONV1D:
        raise unsupported(method, f"{config['model_type']} has Conv1D layers, which quantizers store transposed")


def part(reader: TensorReader, owner: str, name: str, dtypes: tuple[str, ...]) -> TensorInfo:
    """Header entry of the part `name` of the weight `owner`, whose dtype must be one of `dtypes`."""
    info = reader.tensors.get(name)
    if info is None:
        raise damaged(owner, f"{name} is missing")
    if info.dtype not in dtypes:
        raise damaged(owner, f"{name} is {info.dtype}, expected {' or '.join(dtypes)}")
    return info


def expect_shape(owner: str, info: TensorInfo, *shapes: tuple[int, ...]) -> None:
    """Refuses a part whose shape is none of `shapes`."""
    if info.shape not in shapes:
        expected = " or ".join(str(list(shape)) for shape in shapes)
        raise damaged(owner, f"{info.name} is {list(info.shape)}, expected {expected}")


def elements(reader: TensorReader, name: str, start: int, stop: int) -> NDArray[Any]:
    """Elements `start:stop` of the stored tensor `name`, flat: floats as float32, integers as they are; a new array."""
    dtype = reader.tensors[name].dtype
    if dtype in FLOAT_DTYPES:
        width = FLOAT_DTYPES[dtype]
        return decode(reader.raw(name, start * width, stop * width), dtype)
    kind = np.dtype(_INTEGERS[dtype])
    raw = reader.raw(name, start * kind.itemsize, stop * kind.itemsize)
    return raw.view(kind).copy()


_INTEGERS = {"U8": "u1", "I8": "i1", "I32": "<i4", "F8_E4M3": "u1", "F8_E5M2": "u1", "F8_E8M0": "u1"}
