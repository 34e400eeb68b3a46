"""llama.cpp through ctypes: which shared library, whether its structures are known here, and its C functions.

Two builds are known, and their parameter structures differ by one field. With the wrong layout nothing fails: the
flags are only shifted. So a version that is not listed, or a default that is not the expected one, is refused.
Quantizing (`Library.quantize_chunk`) passes plain numbers and pointers and depends on no structure.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import threading
from collections import deque
from collections.abc import Mapping
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int32, c_int64, c_size_t, c_uint32, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lora2edge.errors import MissingExtraError, UnsupportedError

Kind = Literal["auto", "prebuilt", "native"]

ERROR_LEVEL = 4
CONTINUATION_LEVEL = 5
LOG_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_int, c_char_p, c_void_p)


class ModelParams(ctypes.Structure):
    """`llama_model_params` of llama.cpp 0.5.0 and 0.6.0."""

    _fields_ = (
        ("devices", c_void_p),
        ("tensor_buft_overrides", c_void_p),
        ("n_gpu_layers", c_int32),
        ("split_mode", c_int32),
        ("load_mode", c_int32),
        ("lazy_mode", c_int32),
        ("main_gpu", c_int32),
        ("tensor_split", c_void_p),
        ("progress_callback", c_void_p),
        ("progress_callback_user_data", c_void_p),
        ("kv_overrides", c_void_p),
        ("vocab_only", c_bool),
        ("check_tensors", c_bool),
        ("use_extra_bufts", c_bool),
        ("no_host", c_bool),
        ("no_alloc", c_bool),
        ("load_mtp", c_bool),
    )


_CONTEXT_HEAD: tuple[tuple[str, Any], ...] = (
    ("n_ctx", c_uint32),
    ("n_batch", c_uint32),
    ("n_ubatch", c_uint32),
    ("n_seq_max", c_uint32),
    ("n_rs_seq", c_uint32),
    ("n_outputs_max", c_uint32),
    ("n_outputs_max_per_seq", c_uint32),
    ("n_threads", c_int32),
    ("n_threads_batch", c_int32),
    ("ctx_type", c_int32),
    ("rope_scaling_type", c_int32),
    ("pooling_type", c_int32),
    ("attention_type", c_int32),
    ("flash_attn_type", c_int32),
    ("rope_freq_base", c_float),
    ("rope_freq_scale", c_float),
    ("yarn_ext_factor", c_float),
    ("yarn_attn_factor", c_float),
    ("yarn_beta_fast", c_float),
    ("yarn_beta_slow", c_float),
    ("yarn_orig_ctx", c_uint32),
    ("defrag_thold", c_float),
    ("cb_eval", c_void_p),
    ("cb_eval_user_data", c_void_p),
    ("type_k", c_int32),
    ("type_v", c_int32),
    ("abort_callback", c_void_p),
    ("abort_callback_data", c_void_p),
)
_CONTEXT_TAIL: tuple[tuple[str, Any], ...] = (
    ("embeddings", c_bool),
    ("offload_kqv", c_bool),
    ("no_perf", c_bool),
    ("op_offload", c_bool),
    ("swa_full", c_bool),
    ("kv_unified", c_bool),
    ("samplers", c_void_p),
    ("n_samplers", c_size_t),
    ("ctx_other", c_void_p),
)


class ContextParams5(ctypes.Structure):
    """`llama_context_params` of llama.cpp 0.5.0."""

    _fields_ = (*_CONTEXT_HEAD, *_CONTEXT_TAIL)


class ContextParams6(ctypes.Structure):
    """`llama_context_params` of llama.cpp 0.6.0: one more field before the flags."""

    _fields_ = (*_CONTEXT_HEAD, ("moe_cache_size", c_size_t), *_CONTEXT_TAIL)


class Batch(ctypes.Structure):
    """`llama_batch`: arrays of `n_tokens` entries; `logits` is non-zero where the output is wanted."""

    _fields_ = (
        ("n_tokens", c_int32),
        ("token", c_void_p),
        ("embd", c_void_p),
        ("pos", c_void_p),
        ("n_seq_id", c_void_p),
        ("seq_id", c_void_p),
        ("logits", c_void_p),
    )


CONTEXT_LAYOUTS: Mapping[str, type[ctypes.Structure]] = {"0.5.0-dev": ContextParams5, "0.6.0-dev": ContextParams6}
"""`llama_version()` → layout of the context parameters."""

MODEL_DEFAULTS: Mapping[str, Any] = {
    "n_gpu_layers": -1,
    "split_mode": 1,
    "load_mode": -1,
    "lazy_mode": 1,
    "main_gpu": 0,
    "vocab_only": False,
    "check_tensors": False,
    "use_extra_bufts": True,
    "no_host": False,
    "no_alloc": False,
    "load_mtp": False,
}
CONTEXT_DEFAULTS: Mapping[str, Any] = {
    "n_ctx": 512,
    "n_batch": 2048,
    "n_ubatch": 512,
    "n_seq_max": 1,
    "n_rs_seq": 0,
    "n_outputs_max": 0,
    "n_outputs_max_per_seq": 1,
    "ctx_type": 0,
    "rope_scaling_type": -1,
    "pooling_type": -1,
    "attention_type": -1,
    "flash_attn_type": -1,
    "rope_freq_base": 0.0,
    "yarn_ext_factor": -1.0,
    "yarn_orig_ctx": 0,
    "defrag_thold": -1.0,
    "cb_eval": None,
    "type_k": 1,
    "type_v": 1,
    "embeddings": False,
    "offload_kqv": True,
    "no_perf": True,
    "op_offload": True,
    "swa_full": True,
    "kv_unified": False,
    "samplers": None,
    "n_samplers": 0,
    "ctx_other": None,
}


@dataclass(frozen=True, slots=True)
class _Package:
    """A Python package that carries llama.cpp as a shared library."""

    kind: Literal["prebuilt", "native"]
    module: str
    distribution: str
    library: str
    """Pattern of the library's file inside the package folder."""
    extra: str
    pin: str


_PACKAGES: Mapping[str, _Package] = {
    "native": _Package(
        "native", "llama_cpp", "llama-cpp-python", "lib/libllama.so", "gguf-native", "llama-cpp-python==0.3.36"
    ),
    "prebuilt": _Package("prebuilt", "xllamacpp", "xllamacpp", "xllamacpp*.so", "gguf", "xllamacpp==2026.10.11549"),
}

_loaded: dict[str, Library] = {}
_load_lock = threading.Lock()


class Library:
    """A loaded llama.cpp. One per process: `load_library` gives the same object again.

    `facts`: library (distribution), version, llama_cpp, build ("prebuilt (AVX2)", "native (AVX512)"), system_info.
    `c`: the C functions with their argument types set.
    """

    def __init__(self, package: _Package, path: Path) -> None:
        self.kind = package.kind
        self.path = path
        self.c = _open(package, path)
        _declare(self.c, package)
        version = self.c.llama_version().decode()
        layout = CONTEXT_LAYOUTS.get(version)
        if layout is None:
            known = ", ".join(f"{item.pin} (llama.cpp {name})" for item, name in _known_pins())
            raise UnsupportedError(
                "llama-version",
                f"{package.distribution} {_distribution_version(package)} holds llama.cpp {version}, "
                "whose structures are not known here",
                why=f"known: {known}",
                hint=f"pip install '{package.pin}'",
            )
        self.context_params = layout
        self.c.llama_context_default_params.restype = layout
        self.c.llama_init_from_model.argtypes = [c_void_p, layout]
        _check_defaults(self.c, package, version)
        self._errors: deque[str] = deque(maxlen=8)
        self._last_level = 0
        self._callback = LOG_CALLBACK(self._log)  # referenced for as long as the library may call it
        self.c.llama_log_set(self._callback, None)
        self.c.llama_backend_init()
        system_info = self.c.llama_print_system_info().decode().strip(" |")
        self.facts: dict[str, str] = {
            "library": package.distribution,
            "version": _distribution_version(package),
            "llama_cpp": version,
            "build": f"{package.kind} ({_widest_instructions(system_info)})",
            "system_info": system_info,
        }

    def quantize_chunk(
        self, type_id: int, src: int, dst: int, start_row: int, nrows: int, ncols: int, imatrix: int | None
    ) -> int:
        """Quantizes rows `start_row : start_row + nrows` of a float32 matrix; returns the bytes written.

        `src`, `dst`: addresses of the whole matrices; `imatrix`: address of `ncols` float32 weights, or None.
        `type_id`: a `ggml_type`. Releases the GIL, and may run in several threads on different rows. Raises
        UnsupportedError where llama.cpp would end the process: rows that are no whole number of blocks, or a type
        that needs an importance matrix and got none.
        """
        block = self.c.ggml_blck_size(type_id)
        if block <= 0 or ncols % block:
            raise UnsupportedError(
                "block-size",
                f"rows of {ncols} elements cannot be quantized to ggml type {type_id}, blocks of {block}",
            )
        if imatrix is None and self.c.ggml_quantize_requires_imatrix(type_id):
            raise UnsupportedError(
                "imatrix-needed",
                f"ggml type {type_id} cannot be quantized without an importance matrix",
                hint="calibrate, or choose another precision, e.g. q4_k_m",
            )
        return int(self.c.ggml_quantize_chunk(type_id, src, dst, start_row * ncols, nrows, ncols, imatrix))

    def take_errors(self) -> str:
        """The last lines that the library logged as errors, and forgets them."""
        lines = []
        while self._errors:
            lines.append(self._errors.popleft().strip())
        return "; ".join(line for line in lines if line)

    def device_names(self) -> list[str]:
        """Descriptions of the compute devices that the library sees, in its order."""
        return [
            self.c.ggml_backend_dev_description(self.c.ggml_backend_dev_get(index)).decode()
            for index in range(self.c.ggml_backend_dev_count())
        ]

    def _log(self, level: int, text: bytes, _data: int | None) -> None:
        if level != CONTINUATION_LEVEL:
            self._last_level = level
        if self._last_level == ERROR_LEVEL:
            self._errors.append(text.decode("utf-8", "replace"))


def load_library(kind: Kind = "auto") -> Library:
    """The llama.cpp library of this process. `auto` prefers the one that was built on this machine.

    Raises MissingExtraError where none is installed or the installed one does not load, UnsupportedError where its
    version is not known here or where the other build is loaded already: the two share C++ objects of one name and
    different layouts (the dynamic linker makes such symbols unique in a process, RTLD_LOCAL or not).
    """
    with _load_lock:
        package = _choose(kind)
        if _loaded:
            library = next(iter(_loaded.values()))
            if kind == "auto" or library.kind == package.kind:
                return library
            raise UnsupportedError(
                "two-llama-libraries",
                f"this process has loaded the {library.kind} llama.cpp already, and {package.kind} was asked for",
                why="two versions of llama.cpp in one process share symbols and corrupt each other",
                hint=f"use 'library: {library.kind}' in every target of this run, or one run per library",
            )
        library = Library(package, _library_path(package))
        _loaded[package.kind] = library
        return library


def _choose(kind: Kind) -> _Package:
    if kind != "auto":
        return _PACKAGES[kind]
    if importlib.util.find_spec(_PACKAGES["native"].module) is not None:
        return _PACKAGES["native"]
    return _PACKAGES["prebuilt"]


def _library_path(package: _Package) -> Path:
    """The library's file, found without importing the package."""
    spec = importlib.util.find_spec(package.module)
    if spec is None:
        raise MissingExtraError(
            "missing-extra",
            f"llama.cpp is not installed ({package.distribution})",
            why="GGUF targets are quantized, checked and run with it",
            hint=f"pip install 'lora2edge[{package.extra}]'",
        )
    for folder in spec.submodule_search_locations or ():
        found = sorted(Path(folder).glob(package.library))
        if found:
            return found[0]
    raise _broken(package, f"no {package.library} in {spec.origin}")


def _open(package: _Package, path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path), mode=ctypes.RTLD_LOCAL)
    except OSError as error:
        raise _broken(package, str(error)) from error


def _broken(package: _Package, why: str) -> MissingExtraError:
    return MissingExtraError(
        "broken-extra",
        f"{package.distribution} {_distribution_version(package)} is installed, but its llama.cpp does not load",
        why=why,
        hint=f"pip install --force-reinstall --no-deps '{package.pin}'",
    )


def _distribution_version(package: _Package) -> str:
    try:
        return importlib.metadata.version(package.distribution)
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"


def _known_pins() -> list[tuple[_Package, str]]:
    return [(_PACKAGES["native"], "0.5.0-dev"), (_PACKAGES["prebuilt"], "0.6.0-dev")]


def _check_defaults(c: ctypes.CDLL, package: _Package, version: str) -> None:
    """A layout that is off by one field shows in the defaults."""
    found = c.llama_model_default_params(), c.llama_context_default_params()
    for params, expected in zip(found, (MODEL_DEFAULTS, CONTEXT_DEFAULTS), strict=True):
        for name, value in expected.items():
            if getattr(params, name) != value:
                raise UnsupportedError(
                    "llama-layout",
                    f"{package.distribution} {_distribution_version(package)} says that it holds llama.cpp "
                    f"{version}, but its structures are other ones",
                    why=f"{name} is {getattr(params, name)!r} by default, {value!r} was expected",
                    hint=f"pip install --force-reinstall --no-deps '{package.pin}'",
                )


def _widest_instructions(system_info: str) -> str:
    """The widest instruction set that the kernels were compiled for."""
    on = {part.split(" = ")[0].split()[-1] for part in system_info.split("|") if part.strip().endswith("= 1")}
    for name in ("CUDA", "AVX512", "AVX2", "AVX", "SVE", "NEON"):
        if name in on:
            return name
    return "portable"


def _declare(c: ctypes.CDLL, package: _Package) -> None:
    """Sets argument and result types; a missing function means a broken or foreign build."""
    for name, result, arguments in _FUNCTIONS:
        try:
            function = getattr(c, name)
        except AttributeError as error:
            raise _broken(package, str(error)) from error
        function.restype, function.argtypes = result, arguments


_FUNCTIONS: tuple[tuple[str, Any, list[Any]], ...] = (
    ("llama_version", c_char_p, []),
    ("llama_print_system_info", c_char_p, []),
    ("llama_log_set", None, [LOG_CALLBACK, c_void_p]),
    ("llama_backend_init", None, []),
    ("llama_supports_gpu_offload", c_bool, []),
    ("llama_model_default_params", ModelParams, []),
    ("llama_context_default_params", None, []),
    ("llama_model_load_from_file", c_void_p, [c_char_p, ModelParams]),
    ("llama_model_free", None, [c_void_p]),
    ("llama_model_get_vocab", c_void_p, [c_void_p]),
    ("llama_model_n_ctx_train", c_int32, [c_void_p]),
    ("llama_model_desc", c_int32, [c_void_p, c_char_p, c_size_t]),
    ("llama_model_meta_val_str", c_int32, [c_void_p, c_char_p, c_char_p, c_size_t]),
    ("llama_model_chat_template", c_char_p, [c_void_p, c_char_p]),
    ("llama_init_from_model", c_void_p, []),
    ("llama_free", None, [c_void_p]),
    ("llama_n_ctx_seq", c_uint32, [c_void_p]),
    ("llama_n_batch", c_uint32, [c_void_p]),
    ("llama_get_memory", c_void_p, [c_void_p]),
    ("llama_memory_clear", None, [c_void_p, c_bool]),
    ("llama_memory_seq_rm", c_bool, [c_void_p, c_int32, c_int32, c_int32]),
    ("llama_decode", c_int32, [c_void_p, Batch]),
    ("llama_get_logits", c_void_p, [c_void_p]),
    ("llama_vocab_n_tokens", c_int32, [c_void_p]),
    ("llama_vocab_get_text", c_char_p, [c_void_p, c_int32]),
    ("llama_vocab_get_attr", c_int32, [c_void_p, c_int32]),
    ("llama_tokenize", c_int32, [c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool]),
    ("llama_detokenize", c_int32, [c_void_p, POINTER(c_int32), c_int32, c_char_p, c_int32, c_bool, c_bool]),
    ("ggml_quantize_chunk", c_size_t, [ctypes.c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p]),
    ("ggml_quantize_requires_imatrix", c_bool, [ctypes.c_int]),
    ("ggml_blck_size", c_int64, [ctypes.c_int]),
    ("ggml_backend_dev_count", c_size_t, []),
    ("ggml_backend_dev_get", c_void_p, [c_size_t]),
    ("ggml_backend_dev_description", c_char_p, [c_void_p]),
)
