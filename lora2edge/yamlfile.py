"""YAML files that people write, checked against a pydantic model: all errors of a file at once."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from lora2edge.errors import TargetError

Model = TypeVar("Model", bound=BaseModel)


class _Loader(yaml.SafeLoader):
    """Reads `3e-4` as a float, which YAML 1.1 (and so PyYAML) takes for a string."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*)(\.\d*)?([eE][-+]?\d+)$|^[-+]?\.\d+([eE][-+]?\d+)?$"),
    list("-+0123456789."),
)


def load_yaml(path: Path) -> dict[str, Any]:
    """The mapping in `path`. Raises TargetError where the file is missing, is not YAML, or is not a mapping."""
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # noqa: S506, a SafeLoader
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise TargetError("yaml-unreadable", f"cannot read {path}", why=str(error)) from error
    if not isinstance(data, dict):
        raise TargetError("yaml-shape", f"{path} holds no mapping", why="expected lines like `key: value`")
    return data


def validate(model: type[Model], data: dict[str, Any], source: str, code: str) -> Model:
    """`data` as a `model`; raises one TargetError that lists every wrong key of `source`."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        problems = [f"{'.'.join(str(part) for part in item['loc'])}: {item['msg']}" for item in error.errors()]
        known = ", ".join(model.model_fields)
        raise TargetError(
            code,
            f"{source} has {len(problems)} wrong key(s)",
            why="; ".join(problems),
            hint=f"known keys: {known}",
        ) from error
