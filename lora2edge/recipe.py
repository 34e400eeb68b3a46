"""The recipe: everything that a build is described by."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, field_validator

from lora2edge.contracts import AdapterRef
from lora2edge.errors import AdapterError
from lora2edge.yamlfile import load_yaml, validate


class DataFiles(BaseModel):
    """Two files, never with the same prompt in both."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    calibration: str
    test: str


class Combine(BaseModel):
    """How several adapters become one change; which methods and values there are, `adapters.Combination` knows."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: str = "sum"
    density: float | None = None
    """Share of the entries that pruning keeps."""
    majority_sign: str | None = None
    svd_rank: int | None = None


class QuantizedTraining(BaseModel):
    """How a 16-bit base was quantized for training: transformers' BitsAndBytesConfig with load_in_4bit."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    quant_type: Literal["nf4", "fp4"]
    """`bnb_4bit_quant_type`."""
    double_quant: bool = False
    """`bnb_4bit_use_double_quant`."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """The `dtype` of from_pretrained; None: the one that the base is stored in. Not `bnb_4bit_compute_dtype`."""
    blocksize: Literal[64, 128, 256, 512, 1024, 2048, 4096] = 64
    kernel: Literal["cuda", "cpu"] = "cuda"
    """Where it was trained: the two round double-quantized scales differently."""
    names: list[str] | None = None
    """The weights that were quantized; None: of all linear layers but the output head."""


QUANTIZED_TRAININGS = {
    "nf4": QuantizedTraining(quant_type="nf4"),
    "nf4-double": QuantizedTraining(quant_type="nf4", double_quant=True),
    "fp4": QuantizedTraining(quant_type="fp4"),
    "fp4-double": QuantizedTraining(quant_type="fp4", double_quant=True),
}
PLAIN_TRAINING = "16bit"
"""`trained_on` for an adapter whose training did not quantize the base, whatever its name says."""


class Recipe(BaseModel):
    """A build. Paths are absolute here, and relative to the recipe's folder in its file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    base: str | None = None
    """Checkpoint folder, or hub id with an optional `@revision`; None: the adapter's own base."""
    adapter: str | list[str] | None = None
    """PEFT adapter folder or hub id, or several, each with an optional `=WEIGHT`; None: the base alone."""
    combine: Combine | None = None
    """A method's name, or a mapping; None: the weighted sum."""
    trained_on: QuantizedTraining | str | None = None
    """The quantized base that the adapter was trained on, where `base` is the original: "nf4", "nf4-double", "fp4",
    "fp4-double", settings, or the folder or hub id of a saved one. "16bit": none, whatever its name says."""
    merge_base: Literal["original", "dequantized", "measure"] | None = None
    """Which base an adapter that was trained on a quantized one is merged into; None: measure where both are there."""
    trust_remote_code: bool = False
    """Run the code that the base comes with, where transformers has no model of its kind."""
    targets: list[str] = Field(default_factory=list)
    data: DataFiles | str | None = None
    """One JSONL file (split by a hash of the prompt, 80 to 20), or two."""
    out: str | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the baseline. auto: float32 for quality, the checkpoint's own for speed."""
    tokens: int = Field(default=20000, gt=0)
    """Budget of what is scored of the test text: tokens of responses; of a classifier texts, or words."""
    threads: int | None = Field(default=None, gt=0)
    """None: all physical cores."""
    seed: int = 0
    """Of the bootstrap, and of what DARE drops."""

    @field_validator("combine", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        return {"method": value} if isinstance(value, str) else value

    @property
    def adapters(self) -> tuple[AdapterRef, ...]:
        """The adapters and their weights, in order. Raises AdapterError for a weight that is no number."""
        listed = [self.adapter] if isinstance(self.adapter, str) else self.adapter or []
        return tuple(_adapter_ref(text) for text in listed)

    @property
    def combination(self) -> dict[str, Any]:
        """For `adapters.Combination.from_json`."""
        return {**(self.combine.model_dump() if self.combine else {}), "seed": self.seed}


_PATH_FIELDS = ("base", "trained_on", "out")
_COMBINE_OPTIONS = ("density", "majority_sign", "svd_rank")


def load_recipe(path: Path | None, options: dict[str, Any]) -> Recipe:
    """The recipe in `path` (or an empty one), with `options` (those that are not None) over its fields.

    Relative paths in the file are taken from the file's folder, those in `options` from the working folder.
    Raises TargetError with every wrong key.
    """
    data = _absolute(load_yaml(path), path.resolve().parent) if path else {}
    given = {key: value for key, value in options.items() if value is not None and value != ()}
    how = {key: given.pop(key) for key in _COMBINE_OPTIONS if key in given}
    if how:
        before = given.get("combine", data.get("combine"))
        given["combine"] = {**({"method": before} if isinstance(before, str) else before or {}), **how}
    if isinstance(given.get("adapter"), tuple):
        given["adapter"] = given["adapter"][0] if len(given["adapter"]) == 1 else list(given["adapter"])
    data.update(_absolute(given, Path.cwd()))
    return validate(Recipe, data, str(path or "the command line"), "recipe-keys")


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML, which repeats the build."""
    return yaml.safe_dump(recipe.model_dump(exclude_none=True), sort_keys=False, allow_unicode=True)


def _absolute(data: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Makes the relative paths of `data` absolute. A base or adapter that is no folder there is a hub id."""
    result = dict(data)
    for key in _PATH_FIELDS:
        value = result.get(key)
        if isinstance(value, str) and not (key == "trained_on" and value in (*QUANTIZED_TRAININGS, PLAIN_TRAINING)):
            result[key] = _real(folder, value) if key == "out" else _absolute_source(value, folder)
    adapters = result.get("adapter")
    if isinstance(adapters, str):
        result["adapter"] = _absolute_adapter(adapters, folder)
    elif isinstance(adapters, list):
        result["adapter"] = [_absolute_adapter(name, folder) if isinstance(name, str) else name for name in adapters]
    if isinstance(result.get("targets"), list):
        result["targets"] = [_absolute_target(name, folder) for name in result["targets"]]
    files = result.get("data")
    if isinstance(files, str):
        result["data"] = _real(folder, files)
    elif isinstance(files, dict):
        result["data"] = {key: _real(folder, str(value)) for key, value in files.items()}
    return result


def _absolute_source(name: str, folder: Path) -> str:
    exists = os.path.exists(folder / name)  # noqa: PTH110
    return _real(folder, name) if exists or name.startswith((".", "/")) else name


def _absolute_adapter(text: str, folder: Path) -> str:
    path, weight = _split_weight(text, folder)
    return _absolute_source(path, folder) + ("" if weight is None else f"={weight}")


def _split_weight(text: str, folder: Path) -> tuple[str, str | None]:
    """`PATH=WEIGHT` as its two halves; a folder whose own name is all of it wins."""
    path, sign, weight = text.rpartition("=")
    if not sign or not path or os.path.exists(folder / text):  # noqa: PTH110
        return text, None
    return path, weight


def _adapter_ref(text: str) -> AdapterRef:
    path, weight = _split_weight(text, Path.cwd())
    try:
        return AdapterRef(path, 1.0 if weight is None else float(weight))
    except ValueError as error:
        raise AdapterError(
            "adapter-weight",
            f"{weight!r}, after the last = of {text}, is no weight",
            why="there is no folder of that whole name, so what follows = is read as a number",
            hint="--adapter PATH=0.5",
        ) from error


def _absolute_target(name: Any, folder: Path) -> Any:
    if isinstance(name, str) and name.endswith((".yaml", ".yml")) and os.path.exists(folder / name):  # noqa: PTH110
        return _real(folder, name)
    return name


def _real(folder: Path, name: str) -> str:
    """The absolute path of `name` in `folder`, links followed. A loop of links, or a name that no file can have,
    stays what it is and is refused where it is opened; pathlib would raise.
    """
    try:
        return os.path.realpath(folder / name)
    except ValueError:  # a NUL
        return str(folder / name)
