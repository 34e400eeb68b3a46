"""Weights packed once for this machine and this ONNX Runtime, and memory-mapped from then on.

ONNX Runtime rearranges weights for its kernels when it opens a model. `finalize` keeps the result in a folder inside
the artifact, with a stamp of what it was made for; the portable files stay, and are what is opened where the stamp
does not fit. (`session.save_external_prepacked_constant_initializers` of ONNX Runtime.)
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lora2edge.backends.onnxruntime.runtime import (
    MODEL_FILE,
    Device,
    Opened,
    check_files,
    load_runtime,
    open_model,
)
from lora2edge.contracts import MANIFEST, Manifest
from lora2edge.errors import InputError, OutputError, UnsupportedError
from lora2edge.processor import vector_flags
from lora2edge.storage import atomic_folder, sha256_file, write_json

if TYPE_CHECKING:
    from numpy.typing import NDArray

FOLDER, STAMP = "finalized", "stamp.json"
_DATA = f"{MODEL_FILE}.data"
_SCHEMA = 1
_OPTIONS = {
    "session.save_external_prepacked_constant_initializers": "1",
    "session.optimized_model_external_initializers_file_name": _DATA,
    "session.optimized_model_external_initializers_min_size_in_bytes": "64",
}
"""MatMulNBits packs a matrix together with its scales: where those stay in the model's own file, because they are
small, the packed matrix is read back without them (NaN, ONNX Runtime 1.31.1). The constants of shapes are smaller than
64 bytes, and must stay in it."""
_GROWTH = 3.0
"""At most, of the portable weights: originals are kept beside the packed ones, and integers are packed with sums."""
_EXAMPLE_TOKENS = (8, 1)


def finalize(folder: Path) -> dict[str, Any]:
    """Packs the weights of the artifact in `folder` into its folder `finalized`, whole or not at all.

    Both compute the same bits, or nothing is kept. Returns `folder`, `size_bytes`, `reused`, and the stamp. Raises
    InputError, code `artifact-changed`, where the files are not those of the manifest; UnsupportedError, code
    `finalized-differs`, where ONNX Runtime packs a matrix wrongly (1.31.1 does so with those of an odd number of rows
    in one or two blocks); what `open_model` raises; and OutputError.
    """
    check_files(folder)
    out = folder / FOLDER
    if not _differences(folder):
        return {**_report(out), "reused": True}
    portable = _portable(folder)
    size = sum(entry["size_bytes"] for entry in portable.values())
    if (free := shutil.disk_usage(folder).free) < _GROWTH * size:
        raise OutputError(
            "disk-full",
            f"packed weights take up to {_GROWTH * size / 1e9:.1f} GB, {free / 1e9:.1f} GB are free at {folder}",
            hint="free space, or copy the artifact to a larger disk",
        )
    with atomic_folder(out) as partial:
        source = open_model(folder, device="cpu", threads=1, options=_OPTIONS, optimized=partial / MODEL_FILE)
        wanted = _example(source.session)
        del source
        packed = open_model(partial, device="cpu", threads=1)
        found = _example(packed.session)
        del packed
        if found.shape != wanted.shape or found.tobytes() != wanted.tobytes():
            raise UnsupportedError(
                "finalized-differs",
                f"the packed weights of {folder} do not compute what the portable ones do",
                why=f"largest difference {_largest(found, wanted):g}",
                hint="the portable files are unchanged, and work without it",
            )
        stamp = {
            "schema": _SCHEMA,
            "machine": _machine(),
            "options": _OPTIONS,
            "portable": portable,
            "finalized": {path.name: _entry(path) for path in sorted(partial.iterdir())},
        }
        write_json(partial / STAMP, stamp)
    return {**_report(out), "reused": False}


def open_finalized(folder: Path, *, device: Device, threads: int) -> Opened:
    """Opens the artifact in `folder`: its packed weights where they are for this machine and these files, else the
    portable ones. `build` says which. Warns, with both sides, where there are packed weights that do not fit.
    """
    is_there = device == "cpu" and (folder / FOLDER / STAMP).is_file()
    differences = _differences(folder) if is_there else []
    if is_there and not differences:
        return _noted(open_model(folder / FOLDER, device=device, threads=threads), "weights packed by finalize")
    if differences:
        warnings.warn(
            f"{folder / FOLDER} is not used: {'; '.join(differences)}. Renew it with: lora2edge finalize {folder}",
            RuntimeWarning,
            stacklevel=2,
        )
        return _noted(
            open_model(folder, device=device, threads=threads), "weights packed at load, finalized ones stale"
        )
    opened = open_model(folder, device=device, threads=threads)
    return _noted(opened, "weights packed at load") if device == "cpu" else opened


def _noted(opened: Opened, note: str) -> Opened:
    return Opened(
        opened.session, opened.folder, opened.device, opened.nodes, f"{opened.build}; {note}", opened.versions
    )


def _differences(folder: Path) -> list[str]:
    """Why the packed weights cannot be used, in words; empty where they can."""
    try:
        stamp = json.loads((folder / FOLDER / STAMP).read_text(encoding="utf-8"))
        made, options, schema = stamp["machine"], stamp["options"], stamp["schema"]
        files = {folder: dict(stamp["portable"]), folder / FOLDER: dict(stamp["finalized"])}
        if schema != _SCHEMA or options != _OPTIONS:
            return ["it was made by another version of lora2edge"]
        found = [*_machine_differences(made, _machine())]
        for place, entries in files.items():
            found += [
                f"{place / name} has changed" for name in sorted(entries) if not _is_same(place / name, entries[name])
            ]
    except OSError as error:
        return [f"its stamp cannot be read ({error.strerror})"]
    except (ValueError, KeyError, TypeError, AttributeError):
        return ["its stamp is damaged"]
    return found


def _machine_differences(made: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    found = []
    if made["onnxruntime"] != here["onnxruntime"]:
        found.append(f"it was packed by onnxruntime {made['onnxruntime']}, this is {here['onnxruntime']}")
    before, now = set(made["processor"]), set(here["processor"])
    if before != now:
        lacking, more = (", ".join(sorted(flags)) or "none" for flags in (before - now, now - before))
        found.append(f"it was packed for another processor (only there: {lacking}; only here: {more})")
    return found


def _machine() -> dict[str, Any]:
    runtime = load_runtime()
    return {"onnxruntime": f"{runtime.__version__} ({runtime.get_build_info()})", "processor": vector_flags()}


def _portable(folder: Path) -> dict[str, dict[str, Any]]:
    """The model's files, which must be those that the manifest lists."""
    names = [MODEL_FILE, *(external.location for external in check_files(folder).externals)]
    entries = {name: _entry(folder / name) for name in names}
    path = folder / MANIFEST
    listed = Manifest.from_json(path.read_text(encoding="utf-8")).files if path.is_file() else {}
    for name, entry in entries.items():
        if name in listed and listed[name] != entry["sha256"]:
            raise InputError(
                "artifact-changed",
                f"{folder / name} is not the file that {MANIFEST} lists",
                why=f"its sha256 is {entry['sha256'][:12]}…, listed is {listed[name][:12]}…",
                hint="build it again",
            )
    return entries


def _entry(path: Path) -> dict[str, Any]:
    stat = path.stat()
    return {"size_bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": sha256_file(path)}


def _is_same(path: Path, entry: Mapping[str, Any]) -> bool:
    """Whether a file is the stamped one: untouched since, or with the same bytes (a copied folder)."""
    try:
        stat = path.stat()
        if stat.st_size != entry["size_bytes"]:
            return False
        return bool(stat.st_mtime_ns == entry["mtime_ns"] or sha256_file(path) == entry["sha256"])
    except OSError:
        return False


def _report(out: Path) -> dict[str, Any]:
    stamp = json.loads((out / STAMP).read_text(encoding="utf-8"))
    size = sum(entry["size_bytes"] for entry in stamp["finalized"].values())
    return {"folder": str(out), "size_bytes": size, "machine": stamp["machine"]}


def _example(session: Any) -> NDArray[Any]:
    """The first output on several tokens, and on one, for which other kernels run."""
    output = session.get_outputs()[0].name
    found = [session.run([output], _feeds(session, count))[0].ravel() for count in _EXAMPLE_TOKENS]
    return np.concatenate(found)


def _feeds(session: Any, count: int) -> dict[str, NDArray[Any]]:
    ids = np.arange(1, count + 1, dtype=np.int64)[None]
    known = {"attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    feeds: dict[str, NDArray[Any]] = {}
    for value in session.get_inputs():
        if value.type == "tensor(int64)":
            feeds[value.name] = known.get(value.name, ids)
        else:  # a cache's, empty
            shape = (1, value.shape[1], 0, value.shape[3])
            feeds[value.name] = np.zeros(shape, np.float16 if value.type == "tensor(float16)" else np.float32)
    return feeds


def _largest(found: NDArray[Any], wanted: NDArray[Any]) -> float:
    return float(np.abs(found - wanted).max()) if found.shape == wanted.shape else float("inf")
