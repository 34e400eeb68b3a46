"""A finished calibration: a folder of samples.jsonl, statistics and inputs by layer, and manifest.json."""

from __future__ import annotations

import functools
import io
import json
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lora2edge.calibration.layout import Layout
from lora2edge.checkpoint import decode
from lora2edge.contracts import ChannelStats, LabelledSample, Sample
from lora2edge.errors import DataError
from lora2edge.storage import digest, sha256_file, write_json
from lora2edge.texts import (
    describe_coverage,
    labelled_digest,
    read_labelled,
    read_samples,
    samples_digest,
    write_labelled,
    write_samples,
)

if TYPE_CHECKING:
    from lora2edge.contracts import FloatArray

_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\..+")
_SCHEMA = 3
_SAMPLES, _COVERAGE, _MANIFEST = "samples.jsonl", "coverage.json", "manifest.json"


def stats_name(layer: int) -> str:
    """File of the statistics of what runs with `layer`."""
    return f"stats-{layer:04}.npz"


def inputs_name(layer: int) -> str:
    """File of what `layer` is given: `[rows, hidden]` bfloat16, rows in the layout's order.

    Behind the last layer comes the output layer.
    """
    return f"inputs-{layer:04}.bf16"


def hidden_name(layer: int) -> str:
    """File of the same in the dtype of the pass, there only until the layer is finished."""
    return f"hidden-{layer:04}.bin"


@dataclass(frozen=True, slots=True)
class Settings:
    """How the model was run: what runs its layers again does it in the same way."""

    device: str
    dtype: str
    """As torch names it."""
    threads: int


class StoredCalibration:
    """Implements contracts.Calibration. Samples and statistics are read when they are asked for."""

    def __init__(self, path: Path, manifest: Mapping[str, Any]) -> None:
        self.path = path
        self.digest: str = manifest["digest"]
        """sha256 over samples and statistics, hex."""
        self.prefix: int = manifest["prefix"]
        """Tokens that all samples begin with, and that were run once."""
        self.layers: int = manifest["layers"]
        """Decoder or encoder layers; 1 where the model was run whole."""
        self.settings = Settings(**manifest["settings"])
        self.keeps_inputs: bool = manifest["layer_inputs"]
        self._places: dict[str, tuple[int, int]] = manifest["tensors"]

    @functools.cached_property
    def samples(self) -> Sequence[Sample]:
        return read_samples(self.path / _SAMPLES)

    @property
    def classified(self) -> Sequence[LabelledSample]:
        return ()

    @property
    def names(self) -> Sequence[str]:
        return list(self._places)

    @property
    def counts(self) -> dict[str, int]:
        """Tokens that each weight saw."""
        return {name: count for name, (_, count) in self._places.items()}

    def experts(self) -> dict[str, Any] | None:
        """How many tokens the experts saw, JSON-ready; None where there are none.

        `stacks` of a mixture's experts, `experts` in all of them, `unseen`: `layer: experts` that no token was sent to;
        `fewest` and `most` tokens of one, `warning` where one saw none.
        """
        counts: dict[tuple[str, int], int] = {}
        for name, count in self.counts.items():
            if found := _EXPERT.fullmatch(name):
                counts[found[1], int(found[2])] = count
        if not counts:
            return None
        unseen: dict[str, list[int]] = {}
        for (stack, expert), count in counts.items():
            if not count:
                unseen.setdefault(stack, []).append(expert)
        told: dict[str, Any] = {
            "stacks": len({stack for stack, _ in counts}),
            "experts": len(counts),
            "unseen": {stack: sorted(experts) for stack, experts in unseen.items()},
            "fewest": min(counts.values()),
            "most": max(counts.values()),
        }
        if unseen:
            missed = sum(map(len, unseen.values()))
            told["warning"] = f"{missed} of {len(counts)} experts saw no token: nothing weighs their rounding errors"
        return told

    @functools.cached_property
    def layout(self) -> Layout:
        """Which row of a layer's inputs is which token."""
        return Layout(tuple(sample.ids for sample in self.samples), self.prefix)

    def vectors(self, name: str) -> ChannelStats:
        """Statistics of weight `name`; KeyError where none were taken.

        Where the output layer is tied to the embedding, the embedding's are those of the output layer's input.
        """
        layer, _ = self._places[name]
        return unpack_stats(self.path / stats_name(layer), only=name)[name]

    def inputs_path(self, layer: int) -> Path:
        """The file of what `layer`, or behind the last the output layer, is given. Raises DataError where it was not
        kept."""
        path = self.path / inputs_name(layer)
        if not self.keeps_inputs or not path.is_file():
            raise DataError(
                "no-layer-inputs",
                f"the calibration in {self.path} did not keep what layer {layer} is given",
                why=f"it has {self.layers} layers" if self.keeps_inputs else "no target asked for it",
                hint=f"remove {self.path}: the next build makes it again",
            )
        return path

    def check_inputs(self, layer: int, width: int) -> None:
        """Raises DataError where that file is not of rows of `width` values; the manifest has no hash of it."""
        path = self.inputs_path(layer)
        found, wanted = path.stat().st_size, 2 * width * self.layout.rows
        if found != wanted:
            raise DataError(
                "stale-calibration",
                f"the calibration in {self.path} cannot be used",
                why=f"{path.name} has {found:,} bytes, not {wanted:,}: it was damaged",
                hint=f"remove {self.path}: the next build makes it again",
            )

    def layer_inputs(self, layer: int) -> Iterator[FloatArray]:
        """As contracts.Calibration has it; the samples' common prefix is in each array."""
        rows = np.memmap(self.inputs_path(layer), np.uint16, "r").reshape(self.layout.rows, -1)
        first = rows[: self.prefix]
        for place in self.layout.places():
            raw = np.concatenate([first, rows[place.start : place.stop]])
            yield decode(raw.reshape(-1).view(np.uint8), "BF16").reshape(raw.shape)


def store(
    folder: Path,
    samples: Sequence[Sample],
    places: Mapping[str, tuple[int, int]],
    prefix: int,
    layers: int,
    settings: Settings,
    *,
    kept: bool,
) -> StoredCalibration:
    """Writes what makes the finished files of a pass a calibration. `places`: layer of each weight, and tokens seen."""
    write_samples(folder / _SAMPLES, samples)
    files = {name: sha256_file(folder / name) for name in (_SAMPLES, *map(stats_name, range(layers)))}
    tensors = {name: list(place) for name, place in places.items()}
    manifest = {
        "schema": _SCHEMA,
        "digest": digest([samples_digest(samples), files, tensors]),
        "prefix": prefix,
        "layers": layers,
        "settings": asdict(settings),
        "layer_inputs": kept,
        "tensors": tensors,
        "files": files,
    }
    write_json(folder / _MANIFEST, manifest)
    done = StoredCalibration(folder, manifest)
    tokens = sum(len(sample.ids) for sample in samples)
    about = {"items": len(samples), "tokens": tokens, **describe_coverage(samples), "experts": done.experts()}
    write_json(folder / _COVERAGE, about)
    return done


def open_calibration(path: Path) -> StoredCalibration | LabelledCalibration:
    """The calibration in folder `path`. Raises DataError where it is incomplete or was changed."""
    hint = f"remove {path}: the next build makes it again"
    try:
        manifest = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
        changed = [name for name, sha in manifest["files"].items() if sha256_file(path / name) != sha]
    except (OSError, ValueError, KeyError) as error:
        raise DataError("no-calibration", f"{path} is no calibration folder", why=str(error), hint=hint) from error
    if manifest.get("schema") != _SCHEMA or changed:
        why = f"{', '.join(changed)} changed" if changed else "it was written by another version"
        raise DataError("stale-calibration", f"the calibration in {path} cannot be used", why=why, hint=hint)
    return LabelledCalibration(path, manifest) if manifest.get("labelled") else StoredCalibration(path, manifest)


class LabelledCalibration:
    """Implements contracts.Calibration for a classifier: a folder of its samples, without statistics."""

    def __init__(self, path: Path, manifest: Mapping[str, Any]) -> None:
        self.path = path
        self.digest: str = manifest["digest"]
        """sha256 over the samples, hex."""

    @property
    def samples(self) -> Sequence[Sample]:
        return ()

    @functools.cached_property
    def classified(self) -> Sequence[LabelledSample]:
        return read_labelled(self.path / _SAMPLES)

    @property
    def names(self) -> Sequence[str]:
        return ()

    def vectors(self, name: str) -> ChannelStats:
        raise KeyError(name)

    def layer_inputs(self, layer: int) -> Iterator[FloatArray]:
        raise DataError(
            "no-layer-inputs",
            f"the calibration in {self.path} did not keep what layer {layer} is given",
            why="it is a classifier's, of which only the samples are kept",
        )


def store_labelled(folder: Path, samples: Sequence[LabelledSample]) -> LabelledCalibration:
    """Writes a classifier's samples into the existing `folder`."""
    write_labelled(folder / _SAMPLES, samples)
    manifest = {
        "schema": _SCHEMA,
        "digest": labelled_digest(samples),
        "labelled": True,
        "files": {_SAMPLES: sha256_file(folder / _SAMPLES)},
    }
    write_json(folder / _MANIFEST, manifest)
    return LabelledCalibration(folder, manifest)


def pack_stats(stats: Mapping[str, ChannelStats]) -> bytes:
    """An .npz file of `name/field` arrays. numpy's own would hold the time; here equal statistics are equal bytes."""
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w") as archive:
        for name, found in stats.items():
            for field in fields(ChannelStats):
                if (value := getattr(found, field.name)) is not None:
                    with archive.open(zipfile.ZipInfo(f"{name}/{field.name}.npy"), "w") as file:
                        np.lib.format.write_array(file, np.asarray(value), allow_pickle=False)
    return memory.getvalue()


def unpack_stats(path: Path, only: str | None = None) -> dict[str, ChannelStats]:
    """What `pack_stats` packed, by tensor name; of one tensor where it is named."""
    found: dict[str, dict[str, Any]] = {}
    with np.load(path, allow_pickle=False) as archive:
        for key in archive.files:
            name, _, field = key.rpartition("/")
            if only in {None, name}:
                found.setdefault(name, {})[field] = archive[key]
    return {name: ChannelStats(**{**values, "count": int(values["count"])}) for name, values in found.items()}
