"""Opens a model in ONNX Runtime: its files looked at first, and afterwards where each of its nodes really runs."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import importlib.util
import io
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from lora2edge.backends.onnxruntime.model_file import ModelFile, read_model_file
from lora2edge.errors import InputError, MissingExtraError, OutputError, UnsupportedError
from lora2edge.processor import vector_flags

MODEL_FILE = "model.onnx"
CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
Device = Literal["cpu", "cuda"]

_FATAL = 4
"""ONNX Runtime's log level: what goes wrong is raised, and need not be printed too."""
_DECISIVE = ("amx_int8", "avx512_vnni", "avx_vnni", "avx512f", "avx2", "avx", "i8mm", "asimddp", "asimd")
"""Processor flags that decide which matrix kernels run, best first."""
_SHOWN_NODES = 5
_SETTINGS = {
    "session.record_ep_graph_assignment_info": "1",
    # Without VNNI, AVX2 and AVX-512 add products of unsigned and signed bytes in 16 bits, which overflow.
    "session.x64quantprecision": "1",
}


@dataclass(frozen=True, slots=True)
class Opened:
    """A model in ONNX Runtime."""

    session: Any
    """onnxruntime.InferenceSession"""
    folder: Path
    device: str
    nodes: Mapping[str, Mapping[str, int]]
    """Provider → operator → how many nodes of it run there."""
    build: str
    versions: Mapping[str, str] = field(default_factory=dict)


def open_model(
    folder: Path,
    *,
    device: Device,
    threads: int,
    options: Mapping[str, str] | None = None,
    optimized: Path | None = None,
) -> Opened:
    """Opens `folder / model.onnx`. `options`: more of the session's configuration; `optimized`: where ONNX Runtime
    writes the graph that it runs.

    Raises MissingExtraError without ONNX Runtime; InputError, code `external-data` or `broken-model`, for files that
    are not whole; UnsupportedError, code `no-provider` where the device cannot be had, and `cpu-nodes` where a part of
    the model would run on the CPU instead; OutputError, code `finalize-write`, where `optimized` cannot be written.
    """
    runtime = load_runtime()
    check_device(device)
    path = folder / MODEL_FILE
    model = check_files(folder)
    settings = runtime.SessionOptions()
    settings.log_severity_level = _FATAL
    settings.intra_op_num_threads = threads
    settings.inter_op_num_threads = 1
    for key, value in {**_SETTINGS, **(options or {})}.items():
        settings.add_session_config_entry(key, value)
    if optimized is not None:
        settings.optimized_model_filepath = str(optimized)
    if device == "cuda":
        with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does not find
            runtime.preload_dlls()
    providers = [CUDA, CPU] if device == "cuda" else [CPU]
    try:
        session = runtime.InferenceSession(str(path), settings, providers=providers, enable_fallback=0)
    except Exception as error:  # ONNX Runtime's own classes have no common one
        if optimized is not None and any(optimized.parent.iterdir()):  # read and packed, and then not written
            raise _not_written(path, error) from error
        raise _not_opened(path, error) from error
    if device == "cuda" and CUDA not in session.get_providers():
        raise _no_provider(runtime, _why_not_loaded(runtime))
    nodes = assigned_nodes(session)
    if device == "cuda":
        refuse_cpu_nodes(nodes, model.integer_nodes)
    counted = {provider: dict(Counter(kind for _, kind in listed)) for provider, listed in nodes.items()}
    return Opened(
        session, folder, device, counted, _build(runtime, device, counted), {"onnxruntime": runtime.__version__}
    )


def load_runtime() -> ModuleType:
    """The onnxruntime package, quiet and with telemetry off. Raises MissingExtraError."""
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        if error.name != "onnxruntime":
            raise _broken(error) from error
        raise MissingExtraError(
            "missing-extra",
            "onnxruntime is not installed",
            why="ONNX targets are checked and run with it",
            hint="pip install 'lora2edge[onnxruntime]'",
        ) from error
    except (ImportError, OSError) as error:
        raise _broken(error) from error
    module: ModuleType = onnxruntime
    if not hasattr(module, "InferenceSession"):  # a leftover folder of an uninstalled build imports as an empty package
        raise _broken(ImportError("the package is empty"))
    module.set_default_logger_severity(_FATAL)
    module.disable_telemetry_events()
    return module


def check_writer() -> None:
    """Raises MissingExtraError where the package that writes models is not there."""
    if importlib.util.find_spec("onnx") is None:
        raise MissingExtraError(
            "missing-extra",
            "onnx is not installed",
            why="the model's file is written with it",
            hint="pip install 'lora2edge[onnxruntime]'",
        )


def check_device(device: str) -> None:
    """Raises UnsupportedError, code `no-provider`, for CUDA where the installed build has none."""
    runtime = load_runtime()
    if device not in {"cpu", "cuda"}:
        raise InputError("device", f"ONNX Runtime is not asked for the device {device!r}", hint="use cpu or cuda")
    if device == "cuda" and CUDA not in runtime.get_available_providers():
        raise _no_provider(runtime, f"installed: {installed(runtime)}")


def installed(runtime: ModuleType) -> str:
    """The installed build and its providers, in words."""
    names = [name for name in ("onnxruntime-gpu", "onnxruntime") if _version(name)]
    builds = ", ".join(f"{name} {_version(name)}" for name in names) or f"onnxruntime {runtime.__version__}"
    return f"{builds} with {', '.join(runtime.get_available_providers())}"


def check_files(folder: Path) -> ModelFile:
    """Looks at the model's files before ONNX Runtime does, whose errors name neither sizes nor a way out.

    Raises InputError, code `external-data` or `broken-model`.
    """
    path = folder / MODEL_FILE
    if not path.is_file():
        raise InputError("broken-model", f"{folder} has no {MODEL_FILE}", hint="build the artifact again")
    model = read_model_file(path)
    for external in model.externals:
        _check_external(folder, external.location, external.size_bytes)
    return model


def _check_external(folder: Path, location: str, size_bytes: int) -> None:
    path = folder / location
    inside = os.path.realpath(folder)
    real = os.path.realpath(path)
    if Path(location).is_absolute() or not Path(real).is_relative_to(inside):
        link = path.is_symlink()
        raise InputError(
            "external-data",
            f"{path} {f'is a link to {real}' if link else 'is named'}, outside the model's folder",
            why="ONNX Runtime takes weights from the model's own folder only: others may not be the model's to read",
            hint=f"cp -rL {folder} COPY, and open COPY" if link else "build the artifact again",
        )
    if not path.is_file():
        raise InputError(
            "external-data",
            f"{path} {'is no file' if os.path.lexists(path) else 'is missing'}",
            why=f"{MODEL_FILE} has its weights there",
            hint=f"copy {Path(location).name} to where {MODEL_FILE} lies, or build the artifact again",
        )
    if (found := path.stat().st_size) < size_bytes:
        raise InputError(
            "external-data",
            f"{path} has {found:,} bytes, the model's weights end at {size_bytes:,}",
            why="it was cut off, or belongs to another model",
            hint="copy it again, or build the artifact again",
        )


def assigned_nodes(session: Any) -> dict[str, list[tuple[str, str]]]:
    """Provider → name and operator of each node that runs there, as ONNX Runtime divided the graph."""
    found: dict[str, list[tuple[str, str]]] = {}
    for part in session.get_provider_graph_assignment_info():
        found.setdefault(part.ep_name, []).extend((node.name, node.op_type) for node in part.get_nodes())
    return found


def refuse_cpu_nodes(nodes: Mapping[str, Sequence[tuple[str, str]]], integer_nodes: frozenset[str]) -> None:
    """Of a session that was to run on the GPU: raises UnsupportedError, code `cpu-nodes`, naming what would not.

    Arithmetic with shapes, lengths and positions belongs on the CPU: `integer_nodes`.
    """
    others = [
        f"{name} ({kind})"
        for provider, listed in nodes.items()
        if provider != CUDA
        for name, kind in listed
        if name not in integer_nodes
    ]
    if others or not nodes.get(CUDA):
        more = f" and {len(others) - _SHOWN_NODES} more" if len(others) > _SHOWN_NODES else ""
        raise UnsupportedError(
            "cpu-nodes",
            f"{len(others)} nodes of the model would run on the CPU: {', '.join(others[:_SHOWN_NODES])}{more}",
            why=f"{CUDA} has no kernel for them; copies to and fro would make every token slow",
            hint="use a target for CUDA, e.g. onnxruntime/cuda-fp16, or open this one with --device cpu",
        )


def _not_written(path: Path, error: Exception) -> OutputError:
    return OutputError(
        "finalize-write",
        f"ONNX Runtime cannot write the packed weights of {path}",
        why=_in_its_words(error),
        hint="free space on the disk, or copy the artifact to another; its own files are unchanged",
    )


def _in_its_words(error: Exception) -> str:
    return re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", str(error).strip())


def _not_opened(path: Path, error: Exception) -> InputError:
    why = _in_its_words(error)
    if type(error).__name__ == "NotImplemented":
        return UnsupportedError("no-kernel", f"ONNX Runtime has no kernel for a part of {path}", why=why)
    return InputError("broken-model", f"ONNX Runtime cannot open {path}", why=why, hint="build the artifact again")


def _no_provider(runtime: ModuleType, why: str) -> UnsupportedError:
    return UnsupportedError(
        "no-provider",
        f"CUDA was asked for, and onnxruntime {runtime.__version__} here has no {CUDA} that works",
        why=why,
        hint="pip uninstall -y onnxruntime && pip install 'lora2edge[onnxruntime-gpu]'; or take a target for the CPU",
    )


def _why_not_loaded(runtime: ModuleType) -> str:
    """What the dynamic linker says of the provider's library."""
    folder = Path(runtime.__file__ or "").parent / "capi"
    try:
        ctypes.CDLL(str(folder / "libonnxruntime_providers_shared.so"))
        ctypes.CDLL(str(folder / "libonnxruntime_providers_cuda.so"))
    except OSError as error:
        return str(error)
    return "its libraries load, but no GPU answers"


def _build(runtime: ModuleType, device: str, nodes: Mapping[str, Mapping[str, int]]) -> str:
    """E.g. "onnxruntime 1.31.1 6af1a93 (AVX512_VNNI); CPUExecutionProvider runs 169 nodes"."""
    commit = re.search(r"git-commit-id=(\w+)", runtime.get_build_info())
    flags = set(vector_flags())
    best = next((flag.upper() for flag in _DECISIVE if flag in flags), "")
    version = " ".join(filter(None, ("onnxruntime", runtime.__version__, commit[1] if commit else "")))
    kernels = f"CUDA {runtime.cuda_version}" if device == "cuda" else best
    where = ", ".join(f"{provider} runs {sum(kinds.values())} nodes" for provider, kinds in nodes.items())
    return f"{version} ({kernels}); {where}" if kernels else f"{version}; {where}"


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _broken(error: Exception) -> MissingExtraError:
    return MissingExtraError(
        "broken-extra",
        "onnxruntime is installed, but does not load",
        why=f"{type(error).__name__}: {error}",
        hint="pip install --force-reinstall --no-deps onnxruntime==1.31.1",
    )
