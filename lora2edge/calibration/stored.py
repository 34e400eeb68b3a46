"""A finished calibration: a folder of samples.jsonl, stats.npz and manifest.json."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lora2edge.contracts import ChannelStats, Sample
from lora2edge.errors import DataError
from lora2edge.storage import digest, sha256_file, write_json
from lora2edge.texts import read_samples, samples_digest, write_samples

if TYPE_CHECKING:
    from numpy.typing import NDArray

_SCHEMA = 1
_SAMPLES, _STATS, _MANIFEST = "samples.jsonl", "stats.npz", "manifest.json"


class StoredCalibration:
    """Implements contracts.Calibration. Samples and statistics are read when they are asked for."""

    def __init__(self, path: Path, counts: Mapping[str, int], digest: str) -> None:
        self.path = path
        self.digest = digest
        """sha256 over samples and statistics, hex."""
        self._counts = dict(counts)

    @property
    def samples(self) -> Sequence[Sample]:
        return read_samples(self.path / _SAMPLES)

    @property
    def names(self) -> Sequence[str]:
        return list(self._counts)

    def vectors(self, name: str) -> ChannelStats:
        """Statistics of the inputs of weight `name`; KeyError where none were taken.

        Where the output layer is tied to the embedding, the embedding's are those of the output layer's input.
        """
        with np.load(self.path / _STATS, allow_pickle=False) as stats:
            return ChannelStats(mean_square=stats[name], count=self._counts[name])


def store(
    folder: Path, samples: Sequence[Sample], means: Mapping[str, NDArray[np.float32]], counts: Mapping[str, int]
) -> StoredCalibration:
    """Writes the folder's files; `means`: mean of x² per channel of each weight's input, `counts`: tokens seen."""
    write_samples(folder / _SAMPLES, samples)
    arrays: dict[str, Any] = {name: means[name] for name in counts}
    with (folder / _STATS).open("wb") as file:
        np.savez(file, **arrays)
    state = digest([samples_digest(samples), {name: means[name].tobytes().hex() for name in counts}, dict(counts)])
    files = {name: sha256_file(folder / name) for name in (_SAMPLES, _STATS)}
    write_json(folder / _MANIFEST, {"schema": _SCHEMA, "digest": state, "counts": dict(counts), "files": files})
    return StoredCalibration(folder, counts, state)


def open_calibration(path: Path) -> StoredCalibration:
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
    return StoredCalibration(path, manifest["counts"], manifest["digest"])
