"""Finds the data files that ship with the package, in a wheel and in a checkout alike."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def shipped(kind: str) -> Path:
    """The folder of `kind`: "targets" or "scenarios"."""
    in_wheel = _PACKAGE / "_data" / kind
    if in_wheel.is_dir():
        return in_wheel
    in_checkout = {"targets": "targets", "scenarios": "benchmarks/scenarios"}[kind]
    return _PACKAGE.parent / in_checkout
