"""Writes an artifact with another tool, from the merged checkpoint in a folder that is removed again."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lora2edge.backends.hf.write import write_checkpoint
from lora2edge.backends.onnxruntime.artifact_files import read_config, write_checkpoint_files
from lora2edge.backends.onnxruntime.export_check import BOUND, check_export, check_finite, reference_logits
from lora2edge.backends.onnxruntime.export_examples import make_examples
from lora2edge.backends.onnxruntime.export_graph import count_products, load_graph, name_cache_sizes, quantize_dynamic
from lora2edge.backends.onnxruntime.exporters import SCRIPT, TASKS, Export
from lora2edge.backends.onnxruntime.genai import GENAI_CONFIG
from lora2edge.backends.onnxruntime.runtime import MODEL_FILE, check_files
from lora2edge.contracts import Checkpoint, Encoded, Lowered, Progress
from lora2edge.errors import GateError, InputError, UnsupportedError

if TYPE_CHECKING:
    from lora2edge.contracts import FloatArray

WORK = "export"
"""The folder inside the artifact's where everything is made; removed whatever happens."""
_LIMIT_S = 6 * 3600
_LINES = 3
"""Of what the tool said last, in an error."""
_BUILDER = "onnxruntime_genai.models.builder"
_USED = {"genai": ("onnxruntime-genai", "onnx-ir", "transformers", "torch"), "optimum": ()}


def run_export(export: Export, checkpoint: Checkpoint, out: Path, progress: Progress) -> Lowered:
    """Fills the folder `out`: model, weights, configuration and tokenizer.

    The graph is made in float32 first and kept only if its logits are the merged model's (`check_export`); then it is
    made in the precision that was asked for. Raises GateError `export-wrong`; UnsupportedError `export-failed` where
    the tool fails, `export-precision` where it keeps floats; InputError `export-timeout`; what `build_model` raises.
    """
    work = out / WORK
    shutil.rmtree(work, ignore_errors=True)  # of a killed call
    try:
        work.mkdir()
        return _run(export, checkpoint, work, out, progress)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _run(export: Export, checkpoint: Checkpoint, work: Path, out: Path, progress: Progress) -> Lowered:
    source, exact = work / "checkpoint", work / "float32"
    source.mkdir()
    write_checkpoint(checkpoint, source, progress)
    progress.start("compute the merged model's logits", 1)
    examples = make_examples(checkpoint)
    reference = reference_logits(checkpoint, examples)
    progress.finish()
    progress.start(f"export with {export.name}", 1)
    _make(export, checkpoint, source, exact, "fp32")
    progress.finish()
    _check(export, checkpoint, exact, examples, reference)
    made = exact
    if export.precision != "fp32":
        made = work / export.precision
        progress.start(f"export in {export.precision}", 1)
        if export.tool == "genai":
            shutil.rmtree(exact)
            _make(export, checkpoint, source, made, export.precision)
        else:
            made.mkdir()
            quantize_dynamic(exact / MODEL_FILE, made / MODEL_FILE)
            write_checkpoint_files(checkpoint, made)
        _require_integers(export, made)
        check_finite(made, checkpoint, examples)
        progress.finish()
    products = count_products(load_graph(made / MODEL_FILE))
    names = [MODEL_FILE, *(external.location for external in check_files(made).externals)]
    if (made / GENAI_CONFIG).is_file():
        names.append(GENAI_CONFIG)
    for name in names:
        (made / name).replace(out / name)
    write_checkpoint_files(checkpoint, out)
    versions = {name: importlib.metadata.version(name) for name in ("onnx", *_USED[export.tool])}
    return Lowered({**versions, **export.versions}, _notes(export, products))


def _make(export: Export, checkpoint: Checkpoint, source: Path, folder: Path, precision: str) -> None:
    """The graph in `folder`, which then holds what an artifact does, and perhaps more."""
    if export.tool == "genai":
        cache = folder.with_name("cache")
        command = [
            sys.executable,
            "-m",
            _BUILDER,
            "-i",
            source,
            "-o",
            folder,
            "-p",
            precision,
            "-e",
            "cpu",
            "-c",
            cache,
        ]
        _call(export, [*map(str, command), "--extra_options", *_builder_options(export, precision)], folder.parent)
    else:
        words = [export.python, "-I", str(SCRIPT), "export", str(source), str(folder), TASKS[export.task]]
        _call(export, words, folder.parent)
    if not (folder / MODEL_FILE).is_file():
        found = ", ".join(sorted(path.name for path in folder.glob("*"))) or "nothing"
        raise UnsupportedError(
            "export-failed",
            f"{export.name} wrote no {MODEL_FILE} for {export.architecture}",
            why=f"it wrote {found}",
            hint="choose a target of another backend: lora2edge targets",
        )
    if export.tool == "genai":
        name_cache_sizes(folder / MODEL_FILE, read_config(folder, GENAI_CONFIG))
    write_checkpoint_files(checkpoint, folder)


def _builder_options(export: Export, precision: str) -> list[str]:
    # A cache of the window's size is none that grows in place.
    found = ["windowed_kv_cache=false", "hf_token=false"]
    if precision != "fp32":
        options = export.options
        found += [f"block_size={export.block}", f"accuracy_level={options.accuracy_level}"]
        if precision == "int4" and options.head_bits != 4:
            found.append("matmul_mixed_precision=last_matmul:int8")
    return found


def _call(export: Export, command: Sequence[str], folder: Path) -> None:
    """Runs the tool. Raises UnsupportedError `export-failed` with the end of what it said, InputError."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, errors="replace", timeout=_LIMIT_S, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise InputError(
            "export-timeout",
            f"{export.name} was not done with {export.architecture} after {_LIMIT_S // 3600} hours",
            hint="a machine with more memory: lora2edge build says how much is needed",
        ) from error
    if done.returncode:
        killed = f"killed by signal {-done.returncode} (9: out of memory); " if done.returncode < 0 else ""
        lines = [line.strip() for line in done.stdout.splitlines() if line.strip(" ^~")]
        raise UnsupportedError(
            "export-failed",
            f"{export.name} cannot export {export.architecture}",
            why=killed + " | ".join(lines[-_LINES:]),
            hint="choose a target of another backend: lora2edge targets",
        )


def _check(
    export: Export,
    checkpoint: Checkpoint,
    folder: Path,
    examples: Sequence[Encoded],
    reference: Sequence[FloatArray],
) -> None:
    """The logits decide."""
    hint = "options: {exporter: lora2edge}" if export.is_known else "choose a target of another backend: gguf, hf"
    try:
        check_export(folder, checkpoint, examples, reference)
    except GateError as error:
        what = f"{export.name} wrote another model than {export.architecture} is, nothing was kept: {error.what}"
        raise GateError(error.code, what, why=error.why, hint=hint) from error
    except Exception as error:
        if not isinstance(error, InputError) and not type(error).__module__.startswith("onnxruntime."):
            raise
        what, why = (error.what, error.why) if isinstance(error, InputError) else ("ONNX Runtime fails", str(error))
        raise UnsupportedError(
            "export-failed",
            f"the graph that {export.name} wrote for {export.architecture} cannot be run: {what}",
            why=why,
            hint=hint,
        ) from error


def _require_integers(export: Export, folder: Path) -> None:
    found = count_products(load_graph(folder / MODEL_FILE))
    if not any(kind.startswith("int") for kind in found):
        raise UnsupportedError(
            "export-precision",
            f"{export.name} kept all matrices of {export.architecture} in float32 where {export.precision} was asked",
            why=json.dumps(found),
            hint="precision: fp32",
        )


def _notes(export: Export, products: Mapping[str, int]) -> dict[str, object]:
    """For the manifest."""
    integers = export.precision != "fp32"
    return {
        "architecture": export.architecture,
        "exporter": {
            "name": export.name,
            "checked": {"precision": "fp32", "against": "the merged model in PyTorch, float32", "bound": BOUND},
        },
        "tensor_types": dict(products),
        "kept": {},
        "rounding": {"method": "nearest", **({"by": export.name} if integers and export.tool == "genai" else {})},
        "notes": [],
    }
