"""The merged checkpoint: a view that computes rows of W + ΔW when they are asked for, and writes nothing.

What the live model computes with tied embeddings was read off PEFT 0.21's outputs, not off its merge:
merge_and_unload() adds a LoRA of one tied module to both, and adds two of them twice; the live adapter does not.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lora2edge.adapters.places import Change, place_adapter
from lora2edge.adapters.read import Adapter, LowRank, read_adapter
from lora2edge.checkpoint import (
    StoredCheckpoint,
    check_vocabulary,
    embedding_name,
    merge_tokenizer_files,
    open_checkpoint,
)
from lora2edge.contracts import Checkpoint, CheckpointRef, StoredBytes, Task, TensorInfo, TokenizerFiles
from lora2edge.errors import AdapterError, CheckpointError, ProofError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lora2edge.contracts import FloatArray

TOLERANCE = 4e-6
"""Largest relative error of the formula check. float32 sums give 1e-7 to 5e-7; one wrong pair gives far more."""

_FACTORS_KEPT = 4


class MergedCheckpoint:
    """Base and adapter as one checkpoint. Safe to read from several threads."""

    def __init__(self, base: StoredCheckpoint, adapters: Sequence[Adapter]) -> None:
        self.base = base
        self.adapters = tuple(adapters)
        self.checks: dict[str, float] = {}
        """Worst relative error of the formula check, per adapted tensor, over the rows read so far."""
        self._changes: dict[str, Change] = {}
        self._tensors = dict(base.tensors)
        self._config = dict(base.config)
        self._tokenizer = base.tokenizer
        self._factors: OrderedDict[str, _Factors] = OrderedDict()
        self._lock = threading.Lock()
        for adapter in adapters:
            self._apply(adapter)

    @property
    def config(self) -> Mapping[str, Any]:
        return self._config

    @property
    def tokenizer(self) -> TokenizerFiles:
        return self._tokenizer

    @property
    def task(self) -> Task:
        return self.base.task

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    @property
    def adapted(self) -> frozenset[str]:
        """Names of the tensors that the adapters change."""
        return frozenset(name for name, change in self._changes.items() if change.whole or change.pair)

    @property
    def ref(self) -> CheckpointRef:
        return CheckpointRef(str(self.base.path), tuple(adapter.ref for adapter in self.adapters))

    def rows(self, name: str, start: int, stop: int) -> FloatArray:
        """Contract's rows. Each adapted slab is checked against the formula by another route.

        Raises ProofError where the check fails, CheckpointError where the base holds NaN or infinity.
        """
        change = self._changes.get(name)
        if change is None:
            return self.base.rows(name, start, stop)
        rows = self._unadapted(change, start, stop)
        if change.pair is None:
            return rows
        factors = self._factors_of(name, change.pair)
        before = rows @ factors.probe
        rows += factors.left[start:stop] @ factors.right
        self._check(name, before, rows, factors, start, stop)
        return rows

    def delta(self, name: str, start: int, stop: int) -> FloatArray | None:
        change = self._changes.get(name)
        if change is None or not (change.whole or change.pair):
            return None
        if change.pair is None:
            return self._unadapted(change, start, stop) - self.base.rows(change.source, start, stop)
        factors = self._factors_of(name, change.pair)
        product: FloatArray = factors.left[start:stop] @ factors.right
        if change.whole:
            product += self._unadapted(change, start, stop) - self.base.rows(change.source, start, stop)
        return product

    def stored(self, name: str) -> StoredBytes | None:
        change = self._changes.get(name)
        if change is None:
            return self.base.stored(name)
        return None if change.whole or change.pair else self.base.stored(change.source)

    def module_names(self, name: str) -> list[str]:
        return self.base.module_names(name) if name in self.base.tensors else [name]

    def close(self) -> None:
        self.base.close()
        for adapter in self.adapters:
            adapter.close()

    def fingerprint(self) -> dict[str, Any]:
        """The base's fingerprint, and full hashes of the adapter files: a retrained adapter has the same sizes."""
        return {
            "base": self.base.fingerprint(),
            "adapters": [adapter.file_hashes() for adapter in self.adapters],
        }

    def file_hashes(self) -> dict[str, str]:
        """`base/FILE` and `adapter/FILE` → sha256, weights included."""
        hashes = {f"base/{name}": value for name, value in self.base.file_hashes().items()}
        for adapter in self.adapters:
            hashes.update({f"adapter/{name}": value for name, value in adapter.file_hashes().items()})
        return hashes

    def _apply(self, adapter: Adapter) -> None:
        placed = place_adapter(self.base, adapter)
        self._changes = placed.changes
        if placed.untied_head is not None:
            self._tensors[placed.untied_head.name] = placed.untied_head
        if placed.tied is not None:
            self._config["tie_word_embeddings"] = placed.tied
        self._tokenizer = merge_tokenizer_files(self.base.tokenizer, adapter.path)
        embedding = embedding_name(self.base.tensors)
        path = self._tokenizer.files["tokenizer.json"]
        own = path != self.base.tokenizer.files["tokenizer.json"]
        if own and embedding and (problem := check_vocabulary(path, self._tensors[embedding].shape[0])):
            raise problem

    def _unadapted(self, change: Change, start: int, stop: int) -> FloatArray:
        """What the LoRA pair is added to: the base's rows, or those that the adapter saved whole."""
        if change.whole is None:
            return self.base.rows(change.source, start, stop)
        return change.whole.reader.rows(change.whole.name, start, stop)

    def _factors_of(self, name: str, pair: LowRank) -> _Factors:
        """The pair's matrices in float32; the last few are kept, since tensors are read slab by slab."""
        with self._lock:
            factors = self._factors.get(name)
            if factors is None:
                factors = self._factors[name] = _read_factors(self._changes[name], pair)
                if len(self._factors) > _FACTORS_KEPT:
                    self._factors.popitem(last=False)
            return factors

    def _check(self, name: str, before: FloatArray, rows: FloatArray, factors: _Factors, start: int, stop: int) -> None:
        """Freivalds' check (1977): (W + s·BA)x against Wx + s·B(Ax) for a fixed vector x of ±1.

        A wrong entry of the slab shows with a probability of at least one half, a wrong pair, scale or
        orientation practically always.
        """
        change = factors.left[start:stop].astype(np.float64) @ factors.right_probe
        expected = before + change
        with np.errstate(invalid="ignore"):  # a base that holds infinity: told below
            error = float(np.linalg.norm(rows @ factors.probe - expected))
        size = float(np.linalg.norm(before)) + float(np.linalg.norm(change))
        relative = error / size if size else error
        with self._lock:
            self.checks[name] = max(relative, self.checks.get(name, 0.0))
        if relative <= TOLERANCE:
            return
        if not np.isfinite(before).all():
            raise CheckpointError(
                "base-nan",
                f"base tensor {self._changes[name].source} holds NaN or infinity",
                why=f"in rows {start} to {stop - 1}",
                hint="download the base again",
            )
        raise ProofError(
            "merge-formula",
            f"rows {start} to {stop - 1} of {name} are not W + scale · BA",
            why=f"relative error {relative:.2e}, at most {TOLERANCE:.0e} is rounding",
            hint="run it again; where it stays, check the machine's memory and its numpy build, and report it",
        )


@dataclass(frozen=True, slots=True)
class _Factors:
    """ΔW = left @ right, in the orientation of the stored weight."""

    left: FloatArray
    """`[rows, r]`, scale included."""
    right: FloatArray
    """`[r, columns]`."""
    probe: FloatArray
    """`[columns]`, ±1."""
    right_probe: NDArray[np.float64]
    """right @ probe, `[r]`."""


def merge(base: StoredCheckpoint, adapters: Sequence[Adapter]) -> MergedCheckpoint:
    """The view of `base` with `adapters` merged. Reads no base weight, but for two copies of tied embeddings.

    Without adapters it passes the base through. Raises AdapterError or CheckpointError where the adapter does not
    fit, or where base + ΔW is not what the live adapter computes.
    """
    if len(adapters) > 1:
        raise AdapterError(
            "several-adapters",
            f"{len(adapters)} adapters were given, one can be merged",
            why="merging several at once is not supported yet",
            hint="merge the first with `lora2edge merge`, and give the result as the base of the next",
        )
    return MergedCheckpoint(base, adapters)


def open_view(ref: CheckpointRef) -> MergedCheckpoint:
    """The view that `ref` describes, opened again, e.g. in another process."""
    for adapter in ref.adapters:
        if adapter.weight != 1.0:
            raise AdapterError(
                "adapter-weight",
                f"the adapter has the weight {adapter.weight}, only 1 can be merged",
                why="a weighted adapter is another model than the one that was trained",
                hint="leave the weight out",
            )
    return merge(open_checkpoint(ref.base), [read_adapter(adapter.path) for adapter in ref.adapters])


def written_config(view: Checkpoint) -> dict[str, Any]:
    """config.json for `view`: rotary settings under the names of transformers 4 and of 5.

    Version 4 reads `rope_theta`, `rope_scaling` and (Gemma 3) `rope_local_base_freq`, and takes its defaults
    without a word where they are missing; version 5 reads `rope_parameters`.
    """
    config = {key: value for key, value in view.config.items() if key != "_name_or_path"}
    parameters = config.get("rope_parameters")
    if isinstance(parameters, dict) and isinstance(parameters.get("full_attention"), dict):
        config.update(_old_rope(parameters["full_attention"], config))
        local = parameters.get("sliding_attention")
        if isinstance(local, dict) and "rope_theta" in local:
            config.setdefault("rope_local_base_freq", local["rope_theta"])
    elif isinstance(parameters, dict):
        config.update(_old_rope(parameters, config))
    elif "rope_theta" in config and "rope_local_base_freq" not in config:
        scaling = dict(config.get("rope_scaling") or {})
        kind = scaling.pop("type", None)
        scaling.setdefault("rope_type", kind or "default")
        config["rope_parameters"] = {**scaling, "rope_theta": config["rope_theta"]}
        if "partial_rotary_factor" in config:
            config["rope_parameters"]["partial_rotary_factor"] = config["partial_rotary_factor"]
    return config


def _old_rope(parameters: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """What transformers 4 wants beside `rope_parameters`, without touching keys that are there."""
    old = {key: parameters[key] for key in ("rope_theta", "partial_rotary_factor") if key in parameters}
    kind = parameters.get("rope_type", "default")
    if kind != "default":
        old["rope_scaling"] = {key: value for key, value in parameters.items() if key not in old}
    return {key: value for key, value in old.items() if config.get(key) is None}


def _read_factors(change: Change, pair: LowRank) -> _Factors:
    reader = change.adapter.reader
    a = reader.rows(pair.a, 0, reader.tensors[pair.a].shape[0])
    b = reader.rows(pair.b, 0, reader.tensors[pair.b].shape[0])
    left, right = (a.T, b.T) if change.transposed else (b, a)
    left = np.ascontiguousarray(left * np.float32(pair.scale))
    right = np.ascontiguousarray(right)
    probe = np.where(np.random.default_rng(right.shape[1]).random(right.shape[1]) < 0.5, -1, 1).astype(np.float32)
    return _Factors(left, right, probe, right.astype(np.float64) @ probe)
