"""GGUF: what llama.cpp, its server and everything built on them run. Written in one pass; without GPTQ, no PyTorch."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

from lora2edge.backends.gguf.container import Metadata, tensor_bytes, write_header
from lora2edge.backends.gguf.decide import (
    IMATRIX_FILE,
    Decision,
    decide,
    facts,
    fallback_note,
    file_metadata,
    read_options,
    tensor_types,
    wants_gptq,
    wants_imatrix,
)
from lora2edge.backends.gguf.imatrix import read_importance, write_imatrix
from lora2edge.backends.gguf.model import plan_model
from lora2edge.backends.gguf.rounding import BlockEncoder, gptq_names
from lora2edge.backends.gguf.write import SLAB_ELEMENTS, write_model
from lora2edge.backends.layerwise import round_layers, rounding_cost
from lora2edge.checkpoint import check_tied
from lora2edge.contracts import (
    BackendHealth,
    Calibration,
    Checkpoint,
    Estimate,
    Lowered,
    Machine,
    Progress,
    Session,
    SessionOptions,
    TensorDamage,
)
from lora2edge.errors import Lora2EdgeError, TargetError
from lora2edge.target import Target

MODEL_FILE = "model.gguf"

# Weights per second and core, measured on Zen 4 with xllamacpp; the K types take twice as long with an importance
# matrix. Reading and merging are slower than the simple types.
_WEIGHTS_PER_SECOND = {"Q2_K": 9e6, "Q3_K": 9e6, "Q4_K": 9e6, "Q5_K": 8e6, "Q6_K": 33e6, "IQ4_XS": 4e6, "IQ4_NL": 4e6}
_OTHER_WEIGHTS_PER_SECOND = 120e6
_BASE_RAM = 140 << 20
_RAM_PER_TOKENIZER_BYTE = 18
_SLABS_PER_CORE = 6
_GPTQ_NOTE = "GPTQ takes nearly all of this time and memory, where there is calibration text"
_THREADS_PER_CORE = 2
"""At most: slabs are computed on all logical cores, the plan knows the physical ones."""


class GgufBackend:
    """Lowers to a GGUF file and runs it in llama.cpp."""

    name = "gguf"
    extra = "gguf"

    def check(self, checkpoint: Checkpoint, target: Target, machine: Machine) -> Estimate:
        """What lowering will need. Reads header, config and tokenizer; raises all refusals at once."""
        decision = decide(checkpoint, target)
        types = tensor_types(decision, imatrix=wants_imatrix(decision))
        tensors = decision.model.tensors
        seconds = sum(
            tensor.size / _WEIGHTS_PER_SECOND.get(types[tensor.name], _OTHER_WEIGHTS_PER_SECOND) for tensor in tensors
        )
        tokenizer_bytes = sum(Path(path).stat().st_size for path in checkpoint.tokenizer.files.values())
        written = sum(tensor_bytes(types[tensor.name], tensor.shape) for tensor in tensors)
        gptq = None
        if wants_gptq(decision) and (names := gptq_names(tensors, types)):
            gptq = rounding_cost(checkpoint, names, target.calibration.tokens, machine)
        return Estimate(
            ram_bytes=_BASE_RAM
            + _RAM_PER_TOKENIZER_BYTE * tokenizer_bytes
            + _SLABS_PER_CORE * 4 * SLAB_ELEMENTS * _THREADS_PER_CORE * machine.cores
            + (gptq.ram_bytes if gptq else 0),
            disk_bytes=written + tokenizer_bytes,
            scratch_bytes=written + gptq.disk_bytes if gptq else 0,
            seconds=seconds / max(1, machine.cores) + (gptq.seconds if gptq else 0.0),
            max_length=decision.model.context_length,
            layer_inputs=gptq is not None,
            notes=(*decision.notes, *fallback_note(decision, types), *([_GPTQ_NOTE] if gptq else [])),
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

        decision = decide(checkpoint, target)
        model = decision.model
        if calibration is None:
            _refuse_without_data(decision, target)
        importance = None
        types = tensor_types(decision, imatrix=wants_imatrix(decision) and calibration is not None)
        if calibration is not None and wants_imatrix(decision):
            importance = read_importance(model.tensors, types, calibration)
            write_imatrix(out / IMATRIX_FILE, importance, "calibration")
        metadata = file_metadata(decision, importance)
        library = load_library(decision.options.library)
        parity = _compare_tokenizers(checkpoint, decision, metadata, calibration, out)
        if model.tied_copy:
            check_tied(checkpoint, *model.tied_copy)
        rounded = None
        if calibration is not None and wants_gptq(decision):
            encoder = BlockEncoder(model.tensors, types, library, importance)
            rounded = round_layers(checkpoint, calibration, gptq_names(model.tensors, types), encoder, out, progress)
        write_model(
            out / MODEL_FILE, metadata, model.tensors, types, checkpoint, library, importance, rounded, progress
        )
        if rounded:
            rounded.remove()
        versions = {library.facts["library"]: library.facts["version"], "llama.cpp": library.facts["llama_cpp"]}
        notes = facts(decision, types, importance, rounded.log if rounded else None)
        return Lowered(versions, {**notes, "tokenizer": parity})

    def open(self, path: Path, target: Target, options: SessionOptions) -> Session:
        """A session on `path / model.gguf`."""
        from lora2edge.backends.gguf.session import open_session

        return open_session(
            path / MODEL_FILE,
            library=read_options(target).library,
            device=options.device,
            threads=options.threads,
            slots=options.slots,
            max_length=options.max_length,
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


def _refuse_without_data(decision: Decision, target: Target) -> None:
    """What a target asks for in so many words, and cannot have without calibration text."""
    wanted = {
        "imatrix-without-data": ("an importance matrix", "imatrix: false", bool(decision.options.imatrix)),
        "gptq-without-data": ("GPTQ's rounding", "rounding: llama.cpp", decision.options.rounding == "gptq"),
    }
    for code, (what, option, asked) in wanted.items():
        if asked:
            raise TargetError(
                code,
                f"{target.name} wants {what}, and there is no calibration text",
                hint=f"add --data FILE.jsonl, or `{option}` to the target's options",
            )


def _compare_tokenizers(
    checkpoint: Checkpoint, decision: Decision, metadata: Metadata, calibration: Calibration | None, out: Path
) -> dict[str, Any]:
    """llama.cpp's token ids against the checkpoint's tokenizer, before hours are spent on weights."""
    from lora2edge.backends.gguf.parity import check_tokenizer

    header = out / ".vocabulary.gguf"
    with header.open("wb") as file:
        write_header(file, metadata, ())
    try:
        return check_tokenizer(
            header,
            checkpoint.tokenizer,
            [sample.item for sample in calibration.samples] if calibration else [],
            library=decision.options.library,
            strict=decision.options.tokenizer == "strict",
        )
    finally:
        header.unlink()
