"""What a lowering to ONNX does, decided before a weight is read: options, model, formats, graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from lora2edge.backends.onnxruntime.options import KEPT, Options, Precision, choose_format, read_options
from lora2edge.contracts import Checkpoint
from lora2edge.errors import InputError, Refusals, TargetError, UnsupportedError, refuse
from lora2edge.graph.builder import BlockFormat, FloatFormat, Format, Graph
from lora2edge.graph.decoder import Decoder, describe_decoder
from lora2edge.graph.encoder import Encoder
from lora2edge.graph.encoder_families import describe_encoder
from lora2edge.graph.ort_decoder import write_ort_decoder
from lora2edge.graph.ort_encoder import write_ort_encoder
from lora2edge.graph.ranges import ActivationRange
from lora2edge.target import Target

CLASSIFICATIONS = frozenset({"sequence-classification", "token-classification"})
_BLOCKS = (128, 64, 32, 16)
"""Largest first: the fastest."""
_TIED_NOTE = "embedding_bits counts for nothing: this model's embedding is its output layer, which has head_bits"


@dataclass(frozen=True, slots=True)
class Decision:
    """What is decided before a weight is read."""

    precision: Precision
    options: Options
    model: Decoder | Encoder
    formats: Mapping[str, Format]
    """By the checkpoint's tensors."""

    @property
    def max_length(self) -> int:
        """Positions of the model."""
        return self.model.context_length if isinstance(self.model, Decoder) else self.model.max_length

    def gptq_names(self) -> list[str]:
        """Tensors whose codes GPTQ chooses: of 4 bits, and where it was asked for of 8; no looked-up embedding."""
        wanted = self.options.rounding
        if wanted == "nearest" or not isinstance(self.model, Decoder):
            return []
        bits = {4, 8} if wanted == "gptq" and self.precision.bits == 8 else {4}
        looked_up = {matrix.name for matrix in self.model.matrices if matrix.role == "embedding"}
        return [
            name
            for name, form in self.formats.items()
            if isinstance(form, BlockFormat) and form.bits in bits and name not in looked_up
        ]

    def notes(self) -> tuple[str, ...]:
        """What whoever builds or runs the model must know."""
        if not isinstance(self.model, Decoder):
            return ()
        is_ignored = self.options.embedding_bits is not None and self.model.is_tied
        return (*self.model.notes, *((_TIED_NOTE,) if is_ignored else ()))

    def facts(self) -> dict[str, Any]:
        """For the manifest."""
        kinds = Counter(_word(form) for form in self.formats.values())
        architecture = self.model.architecture if isinstance(self.model, Decoder) else self.model.family
        kept = {
            name: KEPT[role]
            for name, role in _roles(self.model).items()
            if role in KEPT and self.precision.form != "float" and isinstance(self.formats[name], FloatFormat)
        }
        return {"architecture": architecture, "tensor_types": dict(sorted(kinds.items())), "kept": kept}


def decide(checkpoint: Checkpoint, target: Target) -> Decision:
    """Everything that can be refused is, at once. Reads header and config."""
    errors: list[InputError] = []
    chosen, model = None, None
    try:
        chosen = read_options(target)
    except InputError as error:
        errors.append(error)
    try:
        model = describe(checkpoint)
    except InputError as error:
        errors.append(error)
    decision = None
    if chosen and model:
        precision, options = chosen
        formats = _formats(model, precision, options)
        decision = Decision(precision, options, model, formats)
        errors += _contradictions(target, decision)
    refuse([single for error in errors for single in (error.errors if isinstance(error, Refusals) else (error,))])
    assert decision
    return decision


def make_graph(decision: Decision, ranges: Mapping[str, ActivationRange] | None = None) -> Graph:
    """The graph. `ranges`: of the inputs of each int8 matrix, where they are fixed beforehand."""
    level = decision.options.accuracy_level
    if isinstance(decision.model, Decoder):
        return write_ort_decoder(
            decision.model, decision.formats, accuracy_level=level, float_type=decision.precision.float_type
        )
    return write_ort_encoder(
        decision.model,
        decision.formats,
        accuracy_level=level,
        activations=ranges,
        float_type=decision.precision.float_type,
    )


def _formats(model: Decoder | Encoder, precision: Precision, options: Options) -> dict[str, Format]:
    """How each matrix is stored: in blocks of the size asked for, or of the largest that fits all of them."""
    columns = {matrix.name: matrix.columns for matrix in model.matrices}
    for block in _BLOCKS if options.block is None else (options.block,):
        formats = {n: choose_format(n, role, precision, options, block) for n, role in _roles(model).items()}
        if not any(isinstance(form, BlockFormat) and columns[name] % block for name, form in formats.items()):
            break
    return formats


def _roles(model: Decoder | Encoder) -> dict[str, str]:
    """Matrix → what it is for. An encoder's `embedding` is a product behind the lookup."""
    if isinstance(model, Decoder):
        return {matrix.name: matrix.role for matrix in model.matrices}
    return {matrix.name: "projection" if matrix.role == "embedding" else matrix.role for matrix in model.matrices}


def describe(checkpoint: Checkpoint) -> Decoder | Encoder:
    """The model as our writer knows it. Raises what `describe_decoder` and `describe_encoder` do, and `onnx-task`."""
    if checkpoint.task == "causal-lm":
        return describe_decoder(checkpoint.config, checkpoint.tensors)
    if checkpoint.task in CLASSIFICATIONS:
        return describe_encoder(checkpoint.config, checkpoint.tensors, checkpoint.task)
    raise UnsupportedError(
        "onnx-task",
        f"the checkpoint is for {checkpoint.task}",
        why="this backend writes models that continue a text, and encoders that classify one",
    )


def _contradictions(target: Target, decision: Decision) -> list[InputError]:
    """Options that do not go with the model."""
    errors: list[InputError] = []
    columns = {matrix.name: matrix.columns for matrix in decision.model.matrices}
    blocked = {name: form.block for name, form in decision.formats.items() if isinstance(form, BlockFormat)}
    uneven = [name for name, block in blocked.items() if columns[name] % block]
    if uneven:
        name = uneven[0]
        fitting = [size for size in _BLOCKS if not any(columns[name] % size for name in blocked)]
        errors.append(
            TargetError(
                "onnx-block",
                f"{name} has rows of {columns[name]} weights, no multiple of the block of {blocked[name]}"
                + (f" ({len(uneven)} such tensors)" if len(uneven) > 1 else ""),
                why="every block has a scale of its own",
                hint=f"options: {{block: {fitting[0]}}}, or none" if fitting else "precision: fp32",
            )
        )
    if decision.precision.is_static and isinstance(decision.model, Decoder):
        errors.append(
            TargetError(
                "onnx-static-decoder",
                f"{target.name} asks for int8-static, and the model continues a text",
                why="fixed ranges lose more than those that each call finds, and save a decoder nothing: its time is "
                "that of reading the weights",
                hint="precision: int8",
            )
        )
    if decision.precision.float_type == "bfloat16" and isinstance(decision.model, Decoder):
        errors.append(
            UnsupportedError(
                "onnx-bfloat16-decoder",
                f"{target.name} asks for a decoder in bfloat16",
                why="numpy has no such type, so that the cache of our session cannot be in it",
                hint="precision: fp16",
            )
        )
    unmatched = [pattern for pattern in decision.options.overrides if not _matches(pattern, columns)]
    if unmatched:
        errors.append(
            TargetError(
                "onnx-option",
                f"no matrix fits the override {unmatched[0]!r} of {target.name}",
                why="the model has " + ", ".join(sorted(columns)[:3]) + ", …",
            )
        )
    return errors


def _matches(pattern: str, names: Mapping[str, int]) -> bool:
    return any(fnmatchcase(name, pattern) for name in names)


def _word(form: Format) -> str:
    if isinstance(form, FloatFormat):
        return form.dtype
    return f"int{form.bits} in blocks of {form.block}" if isinstance(form, BlockFormat) else "int8 by rows"
