"""ONNX Runtime: graphs written straight from the merged view, for onnxruntime and onnxruntime-genai."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from lora2edge.backends.layerwise import RoundedTensors, round_layers, rounding_cost
from lora2edge.backends.onnxruntime.activations import calibrated_ranges
from lora2edge.backends.onnxruntime.artifact_files import write_checkpoint_files
from lora2edge.backends.onnxruntime.decide import Decision, decide, make_graph
from lora2edge.backends.onnxruntime.exporters import find_export
from lora2edge.backends.onnxruntime.genai import GENAI_CONFIG, write_genai_config
from lora2edge.backends.onnxruntime.options import read_options
from lora2edge.backends.onnxruntime.rounding import BlockEncoder, StreamRounder
from lora2edge.checkpoint import check_tied
from lora2edge.contracts import (
    BackendHealth,
    Calibration,
    Checkpoint,
    Classifier,
    Estimate,
    Lowered,
    Machine,
    Progress,
    Session,
    SessionOptions,
    TensorDamage,
)
from lora2edge.errors import TargetError, UnsupportedError
from lora2edge.graph.builder import BlockFormat
from lora2edge.graph.decoder import Decoder
from lora2edge.graph.encoder import Encoder
from lora2edge.graph.ranges import ActivationRange
from lora2edge.graph.write import SLAB_ELEMENTS, write_data, write_model
from lora2edge.target import Target

MODEL_FILE = "model.onnx"
DATA_FILE = "model.onnx.data"

_WEIGHTS_PER_SECOND = 60e6
"""Merged, rounded and written, on one core."""
_BASE_RAM = 120 << 20
_SLABS_PER_CORE = 6
_THREADS_PER_CORE = 2
"""At most: slabs are computed on all logical cores, the plan knows the physical ones."""
_BYTES_IN_WORK = 16
"""Of a weight: as read, in float32, its change, scaled, coded."""
_FLOAT_COPIES = 2
"""Of a float32 model in onnxruntime, while it packs its weights."""
_GPTQ_NOTE = "GPTQ takes nearly all of this time and memory, where there is calibration text"


class OnnxRuntimeBackend:
    """Lowers to an ONNX graph with external weights and runs it in ONNX Runtime."""

    name = "onnxruntime"
    extra = "onnxruntime"

    def check(self, checkpoint: Checkpoint, target: Target, machine: Machine) -> Estimate:
        """What lowering will need. Reads header and config; raises all refusals at once."""
        from lora2edge.backends.onnxruntime.runtime import check_device, check_writer

        if export := find_export(checkpoint, target):
            return export.estimate(checkpoint, machine)
        decision = decide(checkpoint, target)
        check_writer()
        check_device("cpu" if target.device == "auto" else target.device)
        graph = make_graph(decision)
        weights = sum(tensor.size for tensor in checkpoint.tensors.values())
        tokenizer_bytes = sum(Path(path).stat().st_size for path in checkpoint.tokenizer.files.values())
        gptq = None
        if names := decision.gptq_names():
            gptq = rounding_cost(checkpoint, names, target.calibration.tokens, machine)
        slabs = _SLABS_PER_CORE * _THREADS_PER_CORE * machine.cores * _BYTES_IN_WORK * SLAB_ELEMENTS
        floats = 4 * weights if decision.precision.is_static else 0  # the graph that ranges are found on
        return Estimate(
            ram_bytes=_BASE_RAM + slabs + (gptq.ram_bytes if gptq else 0) + _FLOAT_COPIES * floats,
            disk_bytes=graph.data_bytes + tokenizer_bytes,
            scratch_bytes=(graph.data_bytes + gptq.disk_bytes if gptq else 0) + floats,
            seconds=weights / _WEIGHTS_PER_SECOND / max(1, machine.cores) + (gptq.seconds if gptq else 0.0),
            max_length=decision.max_length,
            layer_inputs=gptq is not None,
            notes=(*decision.notes(), *((_GPTQ_NOTE,) if gptq else ())),
        )

    def lower(
        self,
        checkpoint: Checkpoint,
        target: Target,
        calibration: Calibration | None,
        out: Path,
        progress: Progress,
    ) -> Lowered:
        """Writes model, weights, tokenizer and configuration into the folder `out`."""
        if export := find_export(checkpoint, target):
            from lora2edge.backends.onnxruntime.export_run import run_export

            return run_export(export, checkpoint, out, progress)
        decision = decide(checkpoint, target)
        if calibration is None:
            _refuse_without_data(decision, target)
        if isinstance(decision.model, Decoder) and decision.model.tied_copy:
            check_tied(checkpoint, *decision.model.tied_copy)
        rounded = None
        if calibration is not None and decision.gptq_names():
            rounded = _round(checkpoint, calibration, decision, out, progress)
        graph = make_graph(decision, _ranges(checkpoint, calibration, decision, out, progress))
        rounder = StreamRounder(checkpoint, rounded, decision.precision.float_type)
        write_data(out / DATA_FILE, graph, checkpoint, rounder, progress)
        write_model(out / MODEL_FILE, graph, DATA_FILE)
        if rounded:
            rounded.remove()
        _write_files(checkpoint, decision, out)
        return Lowered(_versions(), _notes(decision, rounded))

    def open(self, path: Path, target: Target, options: SessionOptions) -> Session | Classifier:
        """A session on the model in the folder `path`; a Classifier where it classifies."""
        wanted = target.device if target.device != "auto" else options.device
        device: Literal["cpu", "cuda"] = "cuda" if wanted == "cuda" else "cpu"
        if (path / GENAI_CONFIG).is_file():
            from lora2edge.backends.onnxruntime.session import open_session

            return open_session(
                path,
                device=device,
                threads=options.threads,
                slots=options.slots,
                max_length=options.max_length,
                weights=target.precision,
                is_alone=read_options(target)[0].form == "channel",
            )
        from lora2edge.backends.onnxruntime.classifier import open_classifier

        return open_classifier(
            path, device=device, threads=options.threads, max_length=options.max_length, weights=target.precision
        )

    def damage(self, checkpoint: Checkpoint, path: Path, progress: Progress) -> list[TensorDamage]:
        """What rounding did to each matrix, from the finished files."""
        from lora2edge.backends.onnxruntime.damage import measure_damage

        return measure_damage(checkpoint, path / MODEL_FILE, progress)

    def finalize(self, path: Path, target: Target, progress: Progress) -> Mapping[str, Any]:
        """Packs the weights for this machine's CPU (`contracts.Finalizing`).

        Raises UnsupportedError, code `nothing-to-finalize`, for a target of the GPU.
        """
        from lora2edge.backends.onnxruntime.finalize import finalize

        if target.device == "cuda":
            raise UnsupportedError(
                "nothing-to-finalize",
                f"{path} is ready as it is",
                why=f"{target.name} runs on the GPU, for which no weights are packed",
            )
        return finalize(path)

    def doctor(self) -> BackendHealth:
        """Which ONNX Runtime is here, and what it can run on. Never raises."""
        try:
            import onnx
            import onnxruntime
        except Exception as error:  # a broken install raises anything
            reason = f"{type(error).__name__}: {error}"
            return BackendHealth(self.name, False, reason, "pip install 'lora2edge[onnxruntime]'")
        providers = ", ".join(name.removesuffix("ExecutionProvider") for name in onnxruntime.get_available_providers())
        return BackendHealth(
            self.name, True, f"onnxruntime {onnxruntime.__version__} ({providers}), onnx {onnx.__version__}"
        )


def _refuse_without_data(decision: Decision, target: Target) -> None:
    """What a target asks for in so many words, and cannot have without calibration text."""
    wanted = {
        "gptq-without-data": ("GPTQ's rounding", "rounding: nearest", decision.options.rounding == "gptq"),
        "ranges-without-data": ("fixed ranges of activations", "precision: int8-dynamic", decision.precision.is_static),
    }
    for code, (what, instead, asked) in wanted.items():
        if asked:
            raise TargetError(
                code,
                f"{target.name} wants {what}, and there is no calibration text",
                hint=f"add --data FILE.jsonl, or `{instead}` to the target",
            )


def _round(
    checkpoint: Checkpoint, calibration: Calibration, decision: Decision, out: Path, progress: Progress
) -> RoundedTensors:
    """GPTQ's codes of all tensors that get them, in files of `out`."""
    names = decision.gptq_names()
    forms = {name: form for name in names if isinstance(form := decision.formats[name], BlockFormat)}
    columns = {name: checkpoint.tensors[name].shape[1] for name in names}
    looked_up = [matrix for matrix in decision.model.matrices if matrix.role == "embedding"]
    head = [matrix for matrix in decision.model.matrices if matrix.role == "head"]
    embedding = decision.formats[(looked_up or head)[0].name]
    encoder = BlockEncoder(forms, embedding, columns, decision.precision.float_type)
    return round_layers(checkpoint, calibration, names, encoder, out, progress)


def _ranges(
    checkpoint: Checkpoint, calibration: Calibration | None, decision: Decision, out: Path, progress: Progress
) -> dict[str, ActivationRange] | None:
    """Of the activations, where they are fixed beforehand."""
    if calibration is None or not decision.precision.is_static or not isinstance(decision.model, Encoder):
        return None
    texts = [sample.encoded for sample in calibration.classified]
    percentile = decision.options.percentile
    return calibrated_ranges(checkpoint, decision.model, texts, out / ".float", progress, percentile=percentile)


def _write_files(checkpoint: Checkpoint, decision: Decision, out: Path) -> None:
    """What lies beside the model."""
    write_checkpoint_files(checkpoint, out)
    if isinstance(decision.model, Decoder):
        write_genai_config(checkpoint, decision.model, out, MODEL_FILE)


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("onnx",)}


def _notes(decision: Decision, rounded: RoundedTensors | None) -> dict[str, Any]:
    """For the manifest."""
    if rounded:
        rounding = {"method": "gptq", **rounded.log.to_json()}
    else:
        rounding = {"method": "nearest", **({"why": "no calibration text"} if decision.gptq_names() else {})}
    notes = [*decision.notes(), *(rounded.log.notes() if rounded else ())]
    return {**decision.facts(), "rounding": rounding, "notes": notes}
