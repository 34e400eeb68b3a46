"""GGUF: what llama.cpp, its server and everything built on them run. Lowered in one pass, without PyTorch."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora2edge.backends.gguf.architectures import ModelPlan, plan_model
from lora2edge.backends.gguf.container import Metadata, tensor_bytes
from lora2edge.backends.gguf.imatrix import Importance, read_importance, write_imatrix
from lora2edge.backends.gguf.mix import FILE_TYPES, TYPES, FileType, choose_types
from lora2edge.backends.gguf.vocabulary import TokenizerSection, read_vocabulary
from lora2edge.backends.gguf.write import SLAB_ELEMENTS, cores, slabs, write_model
from lora2edge.contracts import (
    BackendHealth,
    Calibration,
    Checkpoint,
    Estimate,
    Lowered,
    Machine,
    Progress,
    Session,
    TensorDamage,
)
from lora2edge.errors import (
    CheckpointError,
    InputError,
    Lora2EdgeError,
    MissingExtraError,
    Refusals,
    TargetError,
    UnsupportedError,
    refuse,
)
from lora2edge.target import Target

MODEL_FILE = "model.gguf"
IMATRIX_FILE = "imatrix.gguf"

_CHOICES: Mapping[str, tuple[Any, ...]] = {
    "imatrix": (True, False),
    "tokenizer": ("report", "strict"),
    "library": ("auto", "prebuilt", "native"),
}
_QUANTIZATION_VERSION = 2
# Weights per second and core, measured on Zen 4 with xllamacpp; the K types take twice as long with an importance
# matrix. Reading and merging are slower than the simple types.
_WEIGHTS_PER_SECOND = {"Q2_K": 9e6, "Q3_K": 9e6, "Q4_K": 9e6, "Q5_K": 8e6, "Q6_K": 33e6, "IQ4_XS": 4e6, "IQ4_NL": 4e6}
_OTHER_WEIGHTS_PER_SECOND = 120e6
_BASE_RAM = 120 << 20
_RAM_PER_TOKENIZER_BYTE = 12
_SLABS_PER_CORE = 6


@dataclass(frozen=True, slots=True)
class Options:
    """A target's `options` for this backend."""

    imatrix: bool | None
    """None: where the file type gains from it."""
    tokenizer: str
    """`report`: differences of llama.cpp's tokenizer on a Unicode torture set are stated; `strict`: refused."""
    library: Any
    context_length: int | None


@dataclass(frozen=True, slots=True)
class _Lowering:
    """What is decided before a weight is read."""

    file_type: FileType
    options: Options
    model: ModelPlan
    tokenizer: TokenizerSection


class GgufBackend:
    """Lowers to a GGUF file and runs it in llama.cpp."""

    name = "gguf"
    extra = "gguf"

    def check(self, checkpoint: Checkpoint, target: Target, machine: Machine) -> Estimate:
        """What lowering will need. Reads header, config and tokenizer; raises all refusals at once."""
        lowering = _decide(checkpoint, target)
        imatrix = _wants_imatrix(lowering)
        types = _types(lowering, imatrix=imatrix)
        size = sum(tensor_bytes(types[tensor.name], tensor.shape) for tensor in lowering.model.tensors)
        tokenizer_bytes = sum(Path(path).stat().st_size for path in checkpoint.tokenizer.files.values())
        seconds = sum(
            _elements(tensor.shape) / _WEIGHTS_PER_SECOND.get(types[tensor.name], _OTHER_WEIGHTS_PER_SECOND)
            for tensor in lowering.model.tensors
        )
        return Estimate(
            ram_bytes=_BASE_RAM
            + _RAM_PER_TOKENIZER_BYTE * tokenizer_bytes
            + _SLABS_PER_CORE * 4 * SLAB_ELEMENTS * cores(),
            disk_bytes=size + tokenizer_bytes,
            seconds=seconds / max(1, machine.cores),
            notes=(*_notes(lowering), *_fallback_note(lowering, types)),
        )

    def lower(
        self,
        checkpoint: Checkpoint,
        target: Target,
        calibration: Calibration | None,
        out: Path,
        progress: Progress,
    ) -> Lowered:
        """Writes `model.gguf`, and `imatrix.gguf` where an importance matrix was used, into the folder `out`."""
        from lora2edge.backends.gguf.llama_cpp import load_library

        lowering = _decide(checkpoint, target)
        if lowering.options.imatrix and calibration is None:
            raise TargetError(
                "imatrix-without-data",
                f"{target.name} wants an importance matrix, and there is no calibration text",
                hint="add --data FILE.jsonl, or `imatrix: false` to the target's options",
            )
        use_imatrix = _wants_imatrix(lowering) and calibration is not None
        types = _types(lowering, imatrix=use_imatrix)
        importance = None
        if use_imatrix and calibration is not None:
            importance = read_importance(lowering.model.tensors, types, calibration)
            write_imatrix(out / IMATRIX_FILE, importance, "calibration")
        if lowering.model.tied_copy:
            _check_tied(checkpoint, lowering.model, *lowering.model.tied_copy)
        library = load_library(lowering.options.library)
        write_model(
            out / MODEL_FILE,
            _metadata(lowering, importance),
            lowering.model.tensors,
            types,
            checkpoint,
            library,
            importance,
            progress,
        )
        facts = library.facts
        return Lowered(
            versions={facts["library"]: facts["version"], "llama.cpp": facts["llama_cpp"]},
            notes=_facts(lowering, types, importance, wanted=_wants_imatrix(lowering)),
        )

    def open(self, path: Path, target: Target, *, device: str, threads: int, slots: int, max_length: int) -> Session:
        """A session on `path / model.gguf`."""
        from lora2edge.backends.gguf.session import open_session

        return open_session(
            path / MODEL_FILE,
            library=read_options(target).library,
            device=device,
            threads=threads,
            slots=slots,
            max_length=max_length,
        )

    def damage(self, checkpoint: Checkpoint, path: Path, progress: Progress) -> list[TensorDamage]:
        """What rounding did to each matrix, from the finished file."""
        from lora2edge.backends.gguf.damage import measure_damage

        model = plan_model(checkpoint.config, checkpoint.tensors)
        return measure_damage(checkpoint, path / MODEL_FILE, model.tensors, progress)

    def doctor(self) -> BackendHealth:
        """Which llama.cpp is here. Never raises."""
        from lora2edge.backends.gguf.llama_cpp import load_library

        try:
            facts = load_library().facts
            gguf = importlib.metadata.version("gguf")
        except Lora2EdgeError as error:
            return BackendHealth(self.name, False, f"{error.what}: {error.why}", error.hint)
        except importlib.metadata.PackageNotFoundError:
            return BackendHealth(self.name, False, "gguf is not installed", "pip install 'lora2edge[gguf]'")
        detail = f"{facts['library']} {facts['version']}, llama.cpp {facts['llama_cpp']}, {facts['build']}; gguf {gguf}"
        return BackendHealth(self.name, True, detail)


def read_options(target: Target) -> Options:
    """The target's options for this backend. Raises TargetError with every wrong one."""
    known = (*_CHOICES, "context_length")
    errors: list[InputError] = []
    for key, value in target.options.items():
        if key not in known:
            errors.append(
                TargetError("gguf-option", f"{target.name} has the option {key!r}", why="known: " + ", ".join(known))
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
    return Options(
        imatrix=target.options.get("imatrix"),
        tokenizer=target.options.get("tokenizer", "report"),
        library=target.options.get("library", "auto"),
        context_length=context,
    )


def _decide(checkpoint: Checkpoint, target: Target) -> _Lowering:
    """Everything that can be refused, at once."""
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
        rows = model.vocab_rows if model else int(checkpoint.config.get("vocab_size") or 1 << 31)
        tokenizer = read_vocabulary(checkpoint.tokenizer, checkpoint.config, rows)
    except InputError as error:
        errors.append(error)
    refuse([single for error in errors for single in (error.errors if isinstance(error, Refusals) else (error,))])
    assert file_type and options and model and tokenizer
    return _Lowering(file_type, options, model, tokenizer)


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


def _wants_imatrix(lowering: _Lowering) -> bool:
    wanted = lowering.options.imatrix
    quantized = TYPES[lowering.file_type.default].is_quantized
    return lowering.file_type.imatrix if wanted is None else wanted and quantized


def _types(lowering: _Lowering, *, imatrix: bool) -> dict[str, str]:
    shapes = {tensor.name: tensor.shape for tensor in lowering.model.tensors}
    return choose_types(shapes, lowering.file_type, lowering.model.shape, imatrix=imatrix)


def _metadata(lowering: _Lowering, importance: Importance | None) -> Metadata:
    # llama.cpp treats every model whose name says Phi-3 as having that model's special tokens.
    name = (
        "phi-3"
        if lowering.tokenizer.strips_like_phi3
        else f"{lowering.model.architecture}-merged".replace("phi3", "phi")
    )
    metadata: Metadata = {
        **lowering.model.metadata,
        "general.name": ("str", name),
        "general.file_type": ("u32", lowering.file_type.id),
        "general.quantization_version": ("u32", _QUANTIZATION_VERSION),
        **lowering.tokenizer.metadata,
    }
    if importance:
        metadata["quantize.imatrix.file"] = ("str", IMATRIX_FILE)
        metadata["quantize.imatrix.dataset"] = ("str", "calibration")
        metadata["quantize.imatrix.entries_count"] = ("u32", len(importance.sums))
    return metadata


def _notes(lowering: _Lowering) -> tuple[str, ...]:
    return (*lowering.model.notes, *lowering.tokenizer.notes)


def _fallback_note(lowering: _Lowering, types: Mapping[str, str]) -> tuple[str, ...]:
    """What a row length that 256 does not divide makes of a K type."""
    block = TYPES[lowering.file_type.default].block
    odd = [tensor for tensor in lowering.model.tensors if len(tensor.shape) > 1 and tensor.shape[-1] % block]
    if block != 256 or not odd:
        return ()
    counts = Counter(types[tensor.name] for tensor in odd)
    stored = ", ".join(f"{count} × {name}" for name, count in counts.most_common())
    return (
        f"{len(odd)} matrices have rows that 256 does not divide, and are stored as {stored}: "
        "compare with q4_0 and q8_0, which may be smaller and faster here",
    )


def _facts(
    lowering: _Lowering, types: Mapping[str, str], importance: Importance | None, *, wanted: bool
) -> dict[str, Any]:
    """For the manifest."""
    counts = Counter(types.values())
    if importance:
        imatrix: dict[str, Any] = {"covered": len(importance.sums), "without": list(importance.without)}
    else:
        imatrix = {"covered": 0, "why": "no calibration text" if wanted else "not wanted by the target"}
    return {
        "architecture": lowering.model.architecture,
        "file_type": lowering.file_type.name,
        "tensor_types": dict(sorted(counts.items())),
        "context_length": lowering.model.context_length,
        "pre_tokenizer": lowering.tokenizer.pre_tokenizer,
        "normalizer": lowering.tokenizer.normalizer,
        "chat_template_sha256": lowering.tokenizer.template_sha256,
        "imatrix": imatrix,
        "notes": [*_notes(lowering), *_fallback_note(lowering, types)],
    }


def _check_tied(checkpoint: Checkpoint, model: ModelPlan, head: str, embedding: str) -> None:
    """A stored copy of the tied head is left out: it must be one."""
    tensor = next(tensor for tensor in model.tensors if tensor.source == embedding)
    for slab in slabs(tensor):
        if (checkpoint.rows(head, slab.start, slab.stop) != checkpoint.rows(embedding, slab.start, slab.stop)).any():
            raise CheckpointError(
                "tied-head",
                f"{head} differs from {embedding}, and config.json ties them",
                why="one of them would be lost",
                hint='set "tie_word_embeddings": false in config.json where the head was trained on its own',
            )


def _elements(shape: tuple[int, ...]) -> int:
    total = 1
    for length in shape:
        total *= length
    return total
