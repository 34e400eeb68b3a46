"""What a lowering to GGUF does, decided before a weight is read: options, model, tokenizer, types, metadata."""

from __future__ import annotations

import difflib
import functools
import importlib.util
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lora2edge.backends.gguf.blocks import GRID_TYPES
from lora2edge.backends.gguf.container import Metadata, pack_arrays
from lora2edge.backends.gguf.imatrix import Importance
from lora2edge.backends.gguf.mix import FILE_TYPES, TYPES, FileType, choose_types
from lora2edge.backends.gguf.model import ModelPlan, plan_model
from lora2edge.backends.gguf.vocabulary import SPECIAL_IDS, TokenizerSection, read_vocabulary
from lora2edge.checkpoint import embedding_name
from lora2edge.contracts import Checkpoint, TokenizerFiles
from lora2edge.errors import InputError, MissingExtraError, Refusals, TargetError, UnsupportedError, refuse
from lora2edge.quantize import RoundingLog
from lora2edge.target import Target

IMATRIX_FILE = "imatrix.gguf"
_MANY_ROWS = 1 << 18
"""Where there is no embedding, so that the tokenizer's refusals are found with the others."""

_CHOICES: Mapping[str, tuple[Any, ...]] = {
    "rounding": ("gptq", "llama.cpp"),
    "imatrix": (True, False),
    "output_tensor_type": tuple(name.lower() for name in TYPES),
    "token_embedding_type": tuple(name.lower() for name in TYPES),
    "tokenizer": ("report", "strict"),
    "library": ("auto", "prebuilt", "native"),
}
_GPTQ = frozenset({"Q4_0", "Q4_K_M", "Q5_K_M", "Q6_K"})
"""File types that are rounded with GPTQ where a target says nothing and there is calibration text."""
_QUANTIZATION_VERSION = 2


@dataclass(frozen=True, slots=True)
class Options:
    """A target's `options` for this backend."""

    rounding: str | None
    """How codes are chosen; None: with GPTQ in files of 4 to 6 bits, where there is calibration text."""
    imatrix: bool | None
    """None: where the file type gains from it."""
    output_tensor_type: str | None
    """Of the output layer; None: as the file type has it."""
    token_embedding_type: str | None
    """Of an embedding that is not the output layer."""
    tokenizer: str
    """`report`: differences of llama.cpp's tokenizer on a Unicode torture set are stated; `strict`: refused."""
    library: Any
    context_length: int | None


@dataclass(frozen=True, slots=True)
class Decision:
    """What is decided before a weight is read."""

    file_type: FileType
    options: Options
    model: ModelPlan
    tokenizer: TokenizerSection

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know."""
        return (*self.model.notes, *self.tokenizer.notes)


def read_options(target: Target) -> Options:
    """The target's options for this backend. Raises TargetError with every wrong one."""
    known = (*_CHOICES, "context_length")
    errors: list[InputError] = []
    for key, value in target.options.items():
        if key not in known:
            errors.append(
                TargetError(
                    "gguf-option",
                    f"{target.name} has the option {key!r}, which this backend does not know",
                    why="known: " + ", ".join(known),
                    hint=f"did you mean {close[0]}?"
                    if (close := difflib.get_close_matches(key, known, 1))
                    else "remove it",
                )
            )
        elif key in _CHOICES and not any(
            value is choice or (value == choice and isinstance(value, str)) for choice in _CHOICES[key]
        ):
            choices = ", ".join(str(choice).lower() for choice in _CHOICES[key])
            errors.append(TargetError("gguf-option", f"{key} is {value!r} in {target.name}", why=f"known: {choices}"))
    context = target.options.get("context_length")
    if context is not None and (isinstance(context, bool) or not isinstance(context, int) or context < 1):
        errors.append(
            TargetError(
                "gguf-option", f"context_length is {context!r} in {target.name}", why="a number of tokens is needed"
            )
        )
    refuse(errors)
    types = {
        key: str(value).upper() if (value := target.options.get(key)) else None
        for key in ("output_tensor_type", "token_embedding_type")
    }
    return Options(
        rounding=target.options.get("rounding"),
        imatrix=target.options.get("imatrix"),
        output_tensor_type=types["output_tensor_type"],
        token_embedding_type=types["token_embedding_type"],
        tokenizer=target.options.get("tokenizer", "report"),
        library=target.options.get("library", "auto"),
        context_length=context,
    )


def decide(checkpoint: Checkpoint, target: Target) -> Decision:
    """Everything that can be refused is, at once. Reads header, config and tokenizer."""
    errors: list[InputError] = []
    options, model, tokenizer = None, None, None
    file_type = FILE_TYPES.get(target.precision.upper())
    if file_type is None:
        known = ", ".join(name.lower() for name in FILE_TYPES)
        errors.append(
            TargetError(
                "gguf-precision", f"{target.name} has the precision {target.precision!r}", why=f"known: {known}"
            )
        )
    if checkpoint.task != "causal-lm":
        errors.append(
            UnsupportedError("gguf-task", f"the checkpoint is for {checkpoint.task}", why="llama.cpp generates text")
        )
    try:
        options = read_options(target)
        _check_library(options)
    except InputError as error:
        errors.append(error)
    try:
        model = plan_model(checkpoint.config, checkpoint.tensors, options.context_length if options else None)
    except InputError as error:
        errors.append(error)
    try:
        tokenizer = _vocabulary(checkpoint, model.vocab_rows if model else _embedding_rows(checkpoint))
    except InputError as error:
        errors.append(error)
    if file_type and options and model:
        errors += _contradictions(target, file_type, options, model)
    refuse([single for error in errors for single in (error.errors if isinstance(error, Refusals) else (error,))])
    assert file_type and options and model and tokenizer
    return Decision(file_type, options, model, tokenizer)


def _contradictions(target: Target, file_type: FileType, options: Options, model: ModelPlan) -> list[InputError]:
    """Options that do not go with each other, the precision or the model."""
    errors: list[InputError] = []

    def refused(what: str, why: str, hint: str) -> None:
        errors.append(TargetError("gguf-option", f"{what} in {target.name}", why=why, hint=hint))

    if options.rounding == "gptq" and file_type.default not in GRID_TYPES:
        why = f"the blocks of {file_type.default} are no grid of steps, on which GPTQ could choose codes"
        grids = ", ".join(name.lower() for name, kind in FILE_TYPES.items() if kind.default in GRID_TYPES)
        refused(f"rounding is gptq and the precision {file_type.name.lower()}", why, f"precision: one of {grids}")
    if options.rounding == "gptq" and options.imatrix is False:
        why = "the blocks' scales are fitted with the mean squares of the same inputs"
        refused("rounding is gptq and imatrix is false", why, "remove imatrix, or set rounding: llama.cpp")
    shapes = {tensor.name: tensor.shape for tensor in model.tensors}
    if not TYPES[file_type.default].is_quantized and (options.output_tensor_type or options.token_embedding_type):
        why = "its matrices all have one type"
        refused(
            f"the precision is {file_type.name.lower()}, and a tensor has a type of its own", why, "precision: q8_0"
        )
    if options.token_embedding_type and "output.weight" not in shapes:
        why = "the embedding is the output layer in this model"
        refused("there is a token_embedding_type", why, "options: {output_tensor_type: …} sets the type of both")
    for key, name in (("output_tensor_type", "output.weight"), ("token_embedding_type", "token_embd.weight")):
        wanted, columns = getattr(options, key), shapes.get(name, shapes["token_embd.weight"])[-1]
        if wanted and columns % TYPES[wanted].block:
            why = f"rows of {columns} weights are no multiple of its blocks of {TYPES[wanted].block}"
            refused(f"{key} is {wanted.lower()}", why, f"options: {{{key}: q8_0}}")
    return errors


def _embedding_rows(checkpoint: Checkpoint) -> int:
    name = embedding_name(checkpoint.tensors)
    return checkpoint.tensors[name].shape[0] if name else _MANY_ROWS


def _vocabulary(checkpoint: Checkpoint, rows: int) -> TokenizerSection:
    """The tokenizer's section with packed arrays. The last one read is kept: a plan asks for it once per target."""
    files = tuple(
        (name, str(path), path.stat().st_size, path.stat().st_mtime_ns)
        for name, path in sorted(checkpoint.tokenizer.files.items())
    )
    ids = {key: checkpoint.config.get(key) for key in SPECIAL_IDS}
    return _read_packed(files, json.dumps(ids), rows)


@functools.lru_cache(maxsize=1)
def _read_packed(files: tuple[tuple[str, str, int, int], ...], ids: str, rows: int) -> TokenizerSection:
    tokenizer = TokenizerFiles({name: Path(path) for name, path, _, _ in files})
    section = read_vocabulary(tokenizer, json.loads(ids), rows)
    return replace(section, metadata=pack_arrays(section.metadata))


def _check_library(options: Options) -> None:
    """A missing or broken llama.cpp is found in the plan."""
    from lora2edge.backends.gguf.llama_cpp import load_library

    if importlib.util.find_spec("gguf") is None:
        raise MissingExtraError(
            "missing-extra",
            "gguf is not installed",
            why="the finished file is read back with it",
            hint="pip install 'lora2edge[gguf]'",
        )
    try:
        load_library(options.library)
    except UnsupportedError as error:
        if error.code != "two-llama-libraries":  # each target is lowered in a process of its own
            raise


def wants_imatrix(decision: Decision) -> bool:
    """Whether the target asks for an importance matrix, or its file type gains from one."""
    wanted = decision.options.imatrix
    quantized = TYPES[decision.file_type.default].is_quantized
    return decision.file_type.imatrix if wanted is None else wanted and quantized


def wants_gptq(decision: Decision) -> bool:
    """Whether codes are chosen by GPTQ, where there is calibration text."""
    if decision.options.rounding is None:
        return decision.file_type.name in _GPTQ and wants_imatrix(decision)
    return decision.options.rounding == "gptq"


def tensor_types(decision: Decision, *, imatrix: bool) -> dict[str, str]:
    """GGUF tensor name → type name."""
    return choose_types(
        {tensor.name: tensor.shape for tensor in decision.model.tensors},
        decision.file_type,
        decision.model.shape,
        imatrix=imatrix,
        output=decision.options.output_tensor_type,
        embedding=decision.options.token_embedding_type,
    )


def file_metadata(decision: Decision, importance: Importance | None) -> Metadata:
    """All metadata of the file. No name of the base: two builds of one checkpoint are equal byte for byte."""
    # llama.cpp treats every model whose name says Phi-3 as having that model's special tokens.
    name = (
        "phi-3"
        if decision.tokenizer.strips_like_phi3
        else f"{decision.model.architecture}-merged".replace("phi3", "phi")
    )
    metadata: Metadata = {
        **decision.model.metadata,
        "general.name": ("str", name),
        "general.file_type": ("u32", decision.file_type.id),
        "general.quantization_version": ("u32", _QUANTIZATION_VERSION),
        **decision.tokenizer.metadata,
    }
    if importance:
        metadata["quantize.imatrix.file"] = ("str", IMATRIX_FILE)
        metadata["quantize.imatrix.dataset"] = ("str", "calibration")
        metadata["quantize.imatrix.entries_count"] = ("u32", len(importance.sums))
    return metadata


def fallback_note(decision: Decision, types: Mapping[str, str]) -> tuple[str, ...]:
    """What a row length that 256 does not divide makes of a K type."""
    block = TYPES[decision.file_type.default].block
    odd = [tensor for tensor in decision.model.tensors if len(tensor.shape) > 1 and tensor.shape[-1] % block]
    if block != 256 or not odd:
        return ()
    counts = Counter(types[tensor.name] for tensor in odd)
    stored = ", ".join(f"{count} × {name}" for name, count in counts.most_common())
    return (
        f"{len(odd)} matrices have rows that 256 does not divide, and are stored as {stored}: "
        "compare with q4_0 and q8_0, which may be smaller and faster here",
    )


def facts(
    decision: Decision, types: Mapping[str, str], importance: Importance | None, log: RoundingLog | None
) -> dict[str, Any]:
    """For the manifest. `log`: of what GPTQ did."""
    counts = Counter(types.values())
    if importance:
        imatrix: dict[str, Any] = {"covered": len(importance.sums), "without": list(importance.without)}
    else:
        imatrix = {
            "covered": 0,
            "why": "no calibration text" if wants_imatrix(decision) else "not wanted by the target",
        }
    return {
        "architecture": decision.model.architecture,
        "file_type": decision.file_type.name,
        "tensor_types": dict(sorted(counts.items())),
        "context_length": decision.model.context_length,
        "pre_tokenizer": decision.tokenizer.pre_tokenizer,
        "normalizer": decision.tokenizer.normalizer,
        "chat_template_sha256": decision.tokenizer.template_sha256,
        "imatrix": imatrix,
        "rounding": _describe_rounding(decision, log),
        "notes": [*decision.notes, *fallback_note(decision, types), *(log.notes() if log else ())],
    }


def _describe_rounding(decision: Decision, log: RoundingLog | None) -> dict[str, Any]:
    if log:
        return {"method": "gptq", **log.to_json()}
    return {"method": "llama.cpp", **({"why": "no calibration text"} if wants_gptq(decision) else {})}
