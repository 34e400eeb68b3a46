"""Who writes the graph where our writer does not know the architecture, decided before a weight is read.

Decoders go to onnxruntime-genai's builder, classifiers to optimum-onnx, which needs transformers below 4.58 and so an
interpreter of its own. Both take the merged checkpoint as a folder; `export_run` runs them, `export_check` decides
whether the result is kept.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lora2edge.backends.onnxruntime.decide import CLASSIFICATIONS, describe
from lora2edge.backends.onnxruntime.export_examples import longest_example
from lora2edge.backends.onnxruntime.options import Options, read_options
from lora2edge.checkpoint import FLOAT_DTYPES
from lora2edge.contracts import Checkpoint, Estimate, Machine
from lora2edge.errors import InputError, Refusals, TargetError, UnsupportedError, refuse
from lora2edge.target import Target

SCRIPT = Path(__file__).with_name("optimum_export.py")
"""Run by the interpreter that has optimum-onnx, and nothing of lora2edge."""
TASKS = {"sequence-classification": "text-classification", "token-classification": "token-classification"}
"""optimum's words for what we call the tasks."""
TOOLS = {"genai": "onnxruntime-genai's builder", "optimum": "optimum-onnx"}
_PRECISIONS = {"genai": ("fp32", "int8", "int4"), "optimum": ("fp32", "int8-dynamic")}
_OPTIONS = {"genai": {"block", "accuracy_level", "rounding", "head_bits"}, "optimum": {"rounding"}}
"""Our options that mean something to the tool."""
_HEAD_BITS = {None, 4, 8}
_CHECK_NEEDS = ("onnx", "onnxruntime", "torch", "transformers")
_BUILDER_NEEDS = ("onnxruntime_genai", "onnx_ir", *_CHECK_NEEDS)
_CUDA_ONLY = {"PhiMoEForCausalLM"}
_ENVIRONMENT = (
    "python -m venv optimum && optimum/bin/pip install torch==2.13.0 optimum-onnx==0.1.0 onnxruntime==1.31.1, "
    "then in the target: options: {optimum_python: optimum/bin/python}"
)
_PROBE_S = 120
_RAM_FACTOR = 3.7
"""Of the checkpoint: what the builder takes for int4, measured at 0.2B, 0.5B and 1.5B in bfloat16."""
_RAM_PER_WEIGHT = 8
"""A float32 model twice: while the graph is made in float32, or opened."""
_BASE_RAM = 1 << 30
"""PyTorch, transformers and ONNX Runtime, here and in the tool's process."""
_BASE_S = 30
_WEIGHTS_PER_SECOND = 6e6
"""Written, computed in PyTorch, exported twice and opened."""
_OPERATIONS_PER_SECOND = 20e9
"""Of the comparison in PyTorch and in ONNX Runtime, on one core."""


@dataclass(frozen=True, slots=True)
class Export:
    """A graph that another tool writes."""

    tool: Literal["genai", "optimum"]
    architecture: str
    task: str
    precision: str
    options: Options
    python: str
    """The interpreter that runs the tool."""
    versions: Mapping[str, str]
    """Of the tool and what it works with, where another interpreter has them."""
    is_known: bool
    """Whether our writer knows the architecture too."""

    @property
    def name(self) -> str:
        """The tool, in words."""
        return TOOLS[self.tool]

    @property
    def block(self) -> int:
        """Columns that share a scale."""
        return self.options.block or 128

    def estimate(self, checkpoint: Checkpoint, machine: Machine) -> Estimate:
        """What it will need: several copies of the model, in memory and on the disk."""
        weights = sum(tensor.size for tensor in checkpoint.tensors.values())
        tables = sum(t.size for t in checkpoint.tensors.values() if "embed" in t.name)
        tokenizer = sum(Path(path).stat().st_size for path in checkpoint.tokenizer.files.values())
        bits = {"fp32": 32.0, "int4": 4 + 32 / self.block, "int8": 8 + 32 / self.block}
        share = bits.get(self.precision, 8.0) / 32
        size = int(4 * (weights * share + tables * (1 - share)))
        if self.precision == "int4" and self.options.head_bits != 4:
            size += sum(t.size for t in checkpoint.tensors.values() if "lm_head" in t.name) // 2
        stored = sum(tensor.size * FLOAT_DTYPES.get(tensor.dtype, 4) for tensor in checkpoint.tensors.values())
        compared = 4 * (longest_example(checkpoint.config) + 64) * weights / _OPERATIONS_PER_SECOND
        return Estimate(
            ram_bytes=_BASE_RAM + int(max(_RAM_FACTOR * stored, _RAM_PER_WEIGHT * weights)),
            disk_bytes=size + tokenizer,
            scratch_bytes=stored + 2 * 4 * weights,  # the merged checkpoint, and the graph, which optimum writes twice
            seconds=_BASE_S + weights / _WEIGHTS_PER_SECOND + compared / max(1, machine.cores),
            max_length=_positions(checkpoint.config),
            notes=(
                f"written by {self.name} from the merged checkpoint, kept only if its float32 logits are the merged "
                "model's",
            ),
        )


def find_export(checkpoint: Checkpoint, target: Target) -> Export | None:
    """The tool that writes the graph; None where ours does, or where `decide` has to refuse.

    Raises UnsupportedError `onnx-architecture` where none can, naming what each of them said; `exporter-device`,
    `exporter-precision` and TargetError `exporter-option` for what the tool cannot do, `optimum-python` for an
    interpreter that is none; all at once.
    """
    try:
        _, options = read_options(target)
    except InputError:
        return None
    if options.exporter == "lora2edge" or checkpoint.task not in {"causal-lm", *CLASSIFICATIONS}:
        return None
    unknown = _unknown(checkpoint)
    if options.exporter == "auto" and unknown is None:
        return None
    wanted = "genai" if checkpoint.task == "causal-lm" else "optimum"
    if options.exporter not in {"auto", wanted}:
        raise TargetError(
            "exporter-option",
            f"{target.name} asks for {TOOLS[options.exporter]}, and the checkpoint is for {checkpoint.task}",
            why=f"{TOOLS['genai']} writes models that continue a text, {TOOLS['optimum']} is asked for classifiers",
            hint=f"options: {{exporter: {wanted}}}",
        )
    errors = _contradictions(target, options, wanted)
    export = None
    try:
        found = _genai(checkpoint, target, options) if wanted == "genai" else _optimum(checkpoint, target, options)
        if isinstance(found, Export):
            export = found
        else:
            errors.insert(0, _refusal(checkpoint, unknown, found))
    except InputError as error:
        errors.append(error)
    refuse(errors)
    return export


@dataclass(frozen=True, slots=True)
class _No:
    """Why a tool does not apply, and what would mend it."""

    why: str
    hint: str = ""


def builder_architectures() -> frozenset[str]:
    """Architectures that the installed onnxruntime-genai's builder names, read from its source; nothing is imported."""
    spec = importlib.util.find_spec("onnxruntime_genai")
    if spec is None or spec.origin is None:
        return frozenset()
    source = Path(spec.origin).parent / "models" / "builder.py"
    if not source.is_file():
        return frozenset()
    return _compared(source) - _CUDA_ONLY


@functools.cache
def _compared(source: Path) -> frozenset[str]:
    """The texts that `config.architectures[0]` is compared with."""
    return frozenset(
        side.value
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8")))
        if isinstance(node, ast.Compare) and ast.unparse(node.left) == "config.architectures[0]"
        for side in node.comparators
        if isinstance(side, ast.Constant) and isinstance(side.value, str)
    )


def _unknown(checkpoint: Checkpoint) -> InputError | None:
    """What our writer says where it does not know the architecture; None where it does, whatever else is wrong."""
    try:
        describe(checkpoint)
    except InputError as error:
        errors = error.errors if isinstance(error, Refusals) else (error,)
        if all(single.code == "onnx-architecture" for single in errors):
            return errors[0]
    return None


def _contradictions(target: Target, options: Options, tool: str) -> list[InputError]:
    """What the target asks for and the tool cannot do. An option that would be passed over is refused."""
    errors: list[InputError] = []
    if target.device == "cuda":
        errors.append(
            UnsupportedError(
                "exporter-device",
                f"{target.name} is for CUDA, and {TOOLS[tool]} would write the graph",
                why="graphs of other exporters are checked and kept for the CPU only",
                hint="device: cpu",
            )
        )
    elif target.precision not in _PRECISIONS[tool]:
        errors.append(
            UnsupportedError(
                "exporter-precision",
                f"{target.name} asks for {target.precision}, and {TOOLS[tool]} would write the graph",
                why=f"it is asked for {', '.join(_PRECISIONS[tool])}",
                hint=f"precision: {_PRECISIONS[tool][-1]}",
            )
        )
    default = Options().model_dump()
    given = {key for key, value in options.model_dump().items() if value != default[key]}
    passed_over = given - _OPTIONS[tool] - {"exporter", "optimum_python"}
    if options.rounding == "gptq":
        passed_over.add("rounding")
    if options.head_bits not in _HEAD_BITS or (options.head_bits == 4 and target.precision != "int4"):
        passed_over.add("head_bits")
    if passed_over:
        names = ", ".join(f"{name}: {getattr(options, name)}" for name in sorted(passed_over))
        errors.append(
            TargetError(
                "exporter-option",
                f"{TOOLS[tool]} would write the graph, and cannot follow {names} in {target.name}",
                why="these are options of lora2edge's own writer, which does not write this one",
                hint="remove them from the target",
            )
        )
    return errors


def _genai(checkpoint: Checkpoint, target: Target, options: Options) -> Export | _No:
    architecture = _architecture(checkpoint)
    if missing := _missing(_BUILDER_NEEDS):
        return _No(
            f"{TOOLS['genai']} may know it, but {missing} is not installed",
            "pip install 'lora2edge[torch,onnxruntime-genai]'",
        )
    known = builder_architectures()
    if architecture not in known:
        return _No(f"{TOOLS['genai']} knows {', '.join(sorted(known)) or 'none'}")
    return _export("genai", architecture, checkpoint, target, options, sys.executable, {})


def _optimum(checkpoint: Checkpoint, target: Target, options: Options) -> Export | _No:
    if options.optimum_python is None:
        return _No(
            f"{TOOLS['optimum']} may know it, but the target names no interpreter that has it: it needs transformers "
            "below 4.58",
            _ENVIRONMENT,
        )
    if missing := _missing(_CHECK_NEEDS):
        return _No(
            f"what {TOOLS['optimum']} writes is compared with the merged model, but {missing} is not installed",
            "pip install 'lora2edge[torch,onnxruntime]'",
        )
    python = shutil.which(Path(options.optimum_python).expanduser().absolute())
    if python is None:
        raise TargetError(
            "optimum-python",
            f"{options.optimum_python} of {target.name} is no interpreter",
            why="there is no such program",
            hint=_ENVIRONMENT,
        )
    kind = str(checkpoint.config.get("model_type"))
    answer = probe_optimum(python, kind, TASKS[checkpoint.task])
    if not answer["knows"]:
        version = answer["versions"].get("optimum-onnx", "")
        return _No(f"{TOOLS['optimum']} {version} does not export {kind} for {TASKS[checkpoint.task]}")
    return _export("optimum", _architecture(checkpoint), checkpoint, target, options, python, answer["versions"])


@functools.cache
def probe_optimum(python: str, kind: str, task: str) -> dict[str, Any]:
    """What the interpreter's optimum-onnx says: `knows`, whether it exports such models, and `versions`.

    Raises TargetError `optimum-python` where it has none that works.
    """
    command = [python, "-I", str(SCRIPT), "probe", kind, task]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_PROBE_S, check=True)
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        told = str(getattr(error, "stderr", None) or error).strip()
        raise TargetError(
            "optimum-python",
            f"{python} has no optimum-onnx that works",
            why=told.splitlines()[-1] if told else type(error).__name__,
            hint=_ENVIRONMENT,
        ) from error
    return answer


def _missing(modules: Sequence[str]) -> str:
    """Those that are not installed, in words."""
    return ", ".join(name for name in modules if importlib.util.find_spec(name) is None)


def _export(
    tool: Literal["genai", "optimum"],
    architecture: str,
    checkpoint: Checkpoint,
    target: Target,
    options: Options,
    python: str,
    versions: Mapping[str, str],
) -> Export:
    is_known = _unknown(checkpoint) is None
    return Export(tool, architecture, checkpoint.task, target.precision, options, python, versions, is_known)


def _refusal(checkpoint: Checkpoint, unknown: InputError | None, no: _No) -> InputError:
    """No tool writes it: what each of them said."""
    ours = "lora2edge's own writer knows it"
    if unknown is not None:
        ours = "; ".join(filter(None, (f"lora2edge's own writer: {unknown.what}", unknown.hint)))
        if checkpoint.task != "causal-lm":
            ours = f"lora2edge's own writer: {unknown.what} ({unknown.why})"
    return UnsupportedError(
        "onnx-architecture",
        f"no tool here writes an ONNX graph of {_architecture(checkpoint)}",
        why=f"{ours}; {no.why}",
        hint=no.hint
        or (
            "options: {exporter: auto}" if unknown is None else "choose a target of another backend: lora2edge targets"
        ),
    )


def _architecture(checkpoint: Checkpoint) -> str:
    named = checkpoint.config.get("architectures") or [f"model_type {checkpoint.config.get('model_type')!r}"]
    return str(named[0])


def _positions(config: Mapping[str, Any]) -> int | None:
    found = config.get("max_position_embeddings")
    return found if isinstance(found, int) and found > 0 else None
