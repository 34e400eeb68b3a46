"""The processor that this process runs on: what decides which of a runtime's kernels run."""

from __future__ import annotations

import contextlib
import platform
from pathlib import Path

_DECIDING = ("avx", "amx", "fma", "f16c", "sse4", "asimd", "sve", "sme", "i8mm", "bf16", "gfni")


def read_processor(root: Path = Path("/")) -> tuple[str, frozenset[str]]:
    """The processor's name and its flags, as the kernel lists them; no flags where it lists none."""
    model, flags = platform.processor() or platform.machine(), frozenset[str]()
    with contextlib.suppress(OSError):
        for line in (root / "proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                model = value.strip()
            elif key.strip() in {"flags", "Features"}:
                flags = frozenset(value.split())
                break
    return model, flags


def vector_flags(root: Path = Path("/")) -> list[str]:
    """The flags of vector and matrix instructions, sorted: weights packed for one set of them may not fit another."""
    return sorted(flag for flag in read_processor(root)[1] if flag.startswith(_DECIDING) and flag != "smep")
