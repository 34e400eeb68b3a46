"""The table of backends: name → where it lives. Nothing is imported until it is asked for."""

from __future__ import annotations

import importlib

from lora2edge.contracts import Backend
from lora2edge.errors import TargetError

_TABLE = {
    "gguf": "lora2edge.backends.gguf:GgufBackend",
    "hf": "lora2edge.backends.hf:HfBackend",
    "onnxruntime": "lora2edge.backends.onnxruntime:OnnxRuntimeBackend",
}


def backend_names() -> list[str]:
    """Names of all backends."""
    return list(_TABLE)


def load_backend(name: str) -> Backend:
    """The backend `name`. Importing it loads no heavy library. Raises TargetError for an unknown name."""
    if name not in _TABLE:
        raise TargetError("unknown-backend", f"there is no backend {name!r}", why="known: " + ", ".join(_TABLE))
    module, attribute = _TABLE[name].split(":")
    backend: Backend = getattr(importlib.import_module(module), attribute)()
    return backend
