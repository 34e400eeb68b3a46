"""Targets: what to lower to, as data. Shipped ones by name, the user's own as YAML files."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from lora2edge.errors import TargetError
from lora2edge.shipped import shipped
from lora2edge.yamlfile import load_yaml, validate

Metric = Literal["kl_mean", "kl_p99", "flips", "ppl_ratio", "accuracy", "macro_f1", "macro_f1_loss", "gain_kept"]
"""Figures that a gate may bound. `macro_f1_loss` is the baseline's − the artifact's: 0.005 are half a point."""


class Gate(BaseModel):
    """A bound on one quality figure. It passes when the whole interval meets it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    min: float | None = None
    max: float | None = None
    action: Literal["fail", "warn"] = "fail"
    """Whether a missed bound fails the build or only says so."""


class CalibrationOptions(BaseModel):
    """How much of the calibration text is used."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tokens: int = Field(default=32768, gt=0)


class Target(BaseModel):
    """One thing to build."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_.-]*(/[a-z0-9][a-z0-9_.-]*)*$")
    """Its key in reports."""
    description: str = ""
    backend: Literal["gguf", "hf"]
    precision: str
    """In the backend's own words, e.g. `q4_k_m`."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    calibration: CalibrationOptions = CalibrationOptions()
    options: dict[str, Any] = Field(default_factory=dict)
    """The backend's own options; the backend refuses those that it does not know."""
    gates: dict[Metric, Gate] = Field(default_factory=dict)
    """By figure. Those of another task's figures bind nothing: one target serves language models and classifiers."""
    scenarios: list[str] = Field(default_factory=lambda: ["chat"])
    """Load patterns that the speed is measured with: shipped names, or YAML files, relative to this one."""
    python: str | None = None
    """Another interpreter for this target's lowering and sessions."""

    @property
    def folder(self) -> str:
        """Name of the artifact's folder."""
        return self.name.replace("/", "-")


def load_target(name: str) -> Target:
    """The shipped target `name`, or the user's file where `name` is a path. Raises TargetError."""
    path = Path(name)
    if path.suffix in {".yaml", ".yml"}:
        return _read(path, default_name=path.stem.lower())
    known = shipped_targets()
    resolved = name if name in known else _DEFAULTS.get(name, name)
    if resolved not in known:
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
        raise TargetError(
            "unknown-target",
            f"there is no target {name!r}",
            why="known: " + ", ".join(sorted(known)),
            hint=f"did you mean --target {close[0]}?" if close else "lora2edge targets",
        )
    return _read(known[resolved], default_name=resolved)


def shipped_targets() -> dict[str, Path]:
    """Name → file of every target that ships."""
    root = shipped("targets")
    return {f"{path.parent.name}/{path.stem}": path for path in sorted(root.glob("*/*.yaml"))}


def _read(path: Path, default_name: str) -> Target:
    data = {"name": default_name, **load_yaml(path)}
    scenarios = data.get("scenarios")
    if isinstance(scenarios, list):
        data["scenarios"] = [_beside(path, name) for name in scenarios]
    return validate(Target, data, str(path), "target-keys")


def _beside(path: Path, scenario: Any) -> Any:
    """A scenario that is the user's own file: its path is taken from the folder of the target's file."""
    if isinstance(scenario, str) and scenario.endswith((".yaml", ".yml")):
        return str((path.resolve().parent / scenario).resolve())
    return scenario


_DEFAULTS = {"gguf": "gguf/q4_k_m", "hf": "hf/merged"}
