"""A target's precision and options for this backend."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from lora2edge.errors import InputError, TargetError, UnsupportedError, refuse
from lora2edge.graph.builder import BlockFormat, ChannelFormat, FloatFormat, FloatType, Format
from lora2edge.target import Target
from lora2edge.yamlfile import validate

Bits = Literal[4, 8, 16, 32]

_ON_CPU = {
    "fp16": "ONNX Runtime's CPU kernels compute MatMul, Add and the activations in float32, with a cast before and "
    "after each: slower than fp32",
    "bf16": "ONNX Runtime's CPU provider has no MatMul, Add or attention in bfloat16",
}


@dataclass(frozen=True, slots=True)
class Precision:
    """What a precision's name stands for."""

    form: Literal["float", "block", "channel"]
    bits: int
    float_type: FloatType = "float32"
    is_static: bool = False
    """Whether the ranges of activations are taken from calibration text; else each call finds its own."""


PRECISIONS: Mapping[str, Precision] = {
    "fp32": Precision("float", 32),
    "fp16": Precision("float", 16, "float16"),
    "bf16": Precision("float", 16, "bfloat16"),
    "int8": Precision("block", 8),
    "int8-dynamic": Precision("channel", 8),
    "int8-static": Precision("channel", 8, is_static=True),
    "int4": Precision("block", 4),
}

KEPT = {
    "pooler": "runs for one token of a text: integers would save no time",
    "classifier": "decides between the classes, and is a few rows",
    "projection": "its input is the embedding, whose tokens differ in scale by far",
}
"""Roles of an encoder's matrices that stay float where others become integers, and why."""


class Options(BaseModel):
    """The keys of `options`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    block: Literal[16, 32, 64, 128, 256] | None = None
    """Columns that share a scale; None: 128, or the largest of the others that divides every row."""
    rounding: Literal["gptq", "nearest"] | None = None
    """None: GPTQ where there are 4-bit weights of a decoder and calibration text."""
    head_bits: Bits | None = None
    """Of the output layer of a decoder; 16 and 32: not quantized. None: 8 at int4, else the precision's."""
    embedding_bits: Bits | None = None
    """Of an embedding that is not the output layer; None: as the output layer."""
    overrides: dict[str, Bits] = Field(default_factory=dict)
    """Tensor name, or a pattern with `*`, → bits; the longest that fits counts, in whatever order: cache and manifest
    sort them. 16 and 32: not quantized."""
    accuracy_level: Literal[0, 1, 4] = 4
    """Of MatMulNBits: 4 multiplies with activations in int8, 1 in float32."""
    percentile: float = Field(default=100.0, gt=50.0, le=100.0)
    """int8-static: how much of the activations a range covers."""
    exporter: Literal["auto", "lora2edge", "genai", "optimum"] = "auto"
    """Who writes the graph. `auto`: ours; for an architecture that it does not know, onnxruntime-genai's builder
    (decoders) or optimum-onnx (classifiers), kept only if the float32 logits are the merged model's."""
    optimum_python: str | None = None
    """The interpreter of an environment with optimum-onnx, which needs an older transformers."""


def read_options(target: Target) -> tuple[Precision, Options]:
    """Precision and options of the target. Raises every TargetError and UnsupportedError at once."""
    errors: list[InputError] = []
    precision = PRECISIONS.get(target.precision)
    options = None
    if precision is None:
        known = ", ".join(PRECISIONS)
        errors.append(
            TargetError(
                "onnx-precision", f"{target.name} has the precision {target.precision!r}", why=f"known: {known}"
            )
        )
    elif target.device != "cuda" and target.precision in _ON_CPU:
        errors.append(
            UnsupportedError(
                "onnx-cpu-precision",
                f"{target.name} asks for {target.precision} on the CPU",
                why=_ON_CPU[target.precision],
                hint="`device: cuda`, or `precision: fp32`; `int8` is half of 16 bits, and loses as little",
            )
        )
    elif target.device == "cuda" and precision.form == "channel":
        errors.append(
            UnsupportedError(
                "onnx-cuda-precision",
                f"{target.name} asks for {target.precision} on a GPU",
                why="products of bytes are written for the CPU's kernels",
                hint="precision: int8",
            )
        )
    try:
        options = validate(Options, target.options, f"options of {target.name}", "onnx-option")
    except TargetError as error:
        errors.append(error)
    if precision and options and options.rounding == "gptq" and precision.form != "block":
        errors.append(
            TargetError(
                "onnx-option",
                f"rounding is gptq and the precision {target.precision} in {target.name}",
                why="GPTQ chooses codes of weights that are stored in blocks",
                hint="precision: int4",
            )
        )
    if precision and options and options.percentile != 100 and not precision.is_static:
        errors.append(
            TargetError(
                "onnx-option",
                f"percentile is {options.percentile:g} and the precision {target.precision} in {target.name}",
                why="only int8-static fixes the ranges of activations, the others find them in each call",
                hint="precision: int8-static, or no percentile",
            )
        )
    refuse(errors)
    assert precision and options
    if target.device == "cuda" and precision.form == "block":
        precision = replace(precision, float_type="float16")
    return precision, options


def choose_format(name: str, role: str, precision: Precision, options: Options, block: int) -> Format:
    """How the matrix of tensor `name` is stored. `role`: what it does, as the model's description says."""
    bits = 32 if role in KEPT and precision.form != "float" else precision.bits
    if role in {"head", "embedding"}:
        head = options.head_bits or (8 if precision.form != "float" else precision.bits)
        bits = head if role == "head" else options.embedding_bits or head
    fitting = [pattern for pattern in options.overrides if fnmatchcase(name, pattern)]
    if fitting:
        bits = options.overrides[max(fitting, key=lambda pattern: (pattern == name, len(pattern), pattern))]
    if bits >= 16:
        wide = precision.float_type if precision.float_type != "float32" else "float32" if bits == 32 else "float16"
        return FloatFormat(wide)
    if precision.form == "channel" and role not in {"head", "embedding"} and bits == 8:
        return ChannelFormat()
    return BlockFormat(4 if bits == 4 else 8, block)
