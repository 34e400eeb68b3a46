"""The merged checkpoint: a view that computes rows of W + ΔW when they are asked for, and writes nothing.

What the live model computes with tied embeddings was read off PEFT 0.21's outputs, not off its merge:
merge_and_unload() adds a LoRA of one tied module to both, and adds two of them twice; the live adapter does not.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from lora2edge.adapters.ends import Change
from lora2edge.adapters.kinds.lora import LowRank, PairUpdate
from lora2edge.adapters.parts import Part, Update
from lora2edge.adapters.places import place_adapter
from lora2edge.adapters.read import Adapter, read_adapter
from lora2edge.checkpoint import (
    BnbSettings,
    check_vocabulary,
    embedding_name,
    merge_tokenizer_files,
    open_checkpoint,
    requantized,
)
from lora2edge.contracts import Base, Checkpoint, CheckpointRef, StoredBytes, Task, TensorInfo, TokenizerFiles
from lora2edge.errors import AdapterError, CheckpointError, ProofError

if TYPE_CHECKING:
    from lora2edge.contracts import FloatArray

TOLERANCE = 4e-6
"""Largest relative error of the formula check. float32 sums give 1e-7 to 5e-7; one wrong pair gives far more."""

_UPDATES_KEPT = 4
_LOADING_COPIES = 3
"""Of an update's tensors, while it is loaded: as stored, in float32, and scaled or turned."""
_SLAB_ELEMENTS = 1 << 20


class MergedCheckpoint:
    """Base and adapter as one checkpoint. Safe to read from several threads."""

    def __init__(self, base: Base, adapters: Sequence[Adapter]) -> None:
        self.base = base
        self.adapters = tuple(adapters)
        self.checks: dict[str, float] = {}
        """Worst relative error of the formula check, per adapted tensor, over the rows read so far."""
        self._changes: dict[str, Change] = {}
        self._tensors = dict(base.tensors)
        self._config = dict(base.config)
        self._task = base.task
        self._dropped: frozenset[str] = frozenset()
        self._tokenizer = base.tokenizer
        self._updates: OrderedDict[str, Update] = OrderedDict()
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
        return self._task

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    @property
    def adapted(self) -> frozenset[str]:
        """Names of the tensors that the adapters change."""
        return frozenset(name for name, change in self._changes.items() if change.whole or change.part)

    @property
    def ref(self) -> CheckpointRef:
        return replace(self.base.ref, adapters=tuple(adapter.ref for adapter in self.adapters))

    def rows(self, name: str, start: int, stop: int) -> FloatArray:
        """Contract's rows. Each adapted slab is checked against the formula by another route.

        Raises ProofError where the check fails, CheckpointError where the base holds NaN or infinity.
        """
        change = self._changes.get(name)
        if change is None:
            return self.base.rows(name, start, stop)
        rows = self._unadapted(name, change, start, stop)
        if change.part is None:
            return rows
        update = self._update_of(name, change)
        if not isinstance(update, PairUpdate):
            return update.apply(rows, start, stop)
        before = rows @ update.probe
        update.add(rows, start, stop)
        self._check(name, before, rows, update, start, stop)
        return update.resize(rows, start, stop)

    def delta(self, name: str, start: int, stop: int) -> FloatArray | None:
        change = self._changes.get(name)
        if change is None or change.source is None or not (change.whole or change.part):
            return None
        update = self._update_of(name, change) if change.part else None
        if isinstance(update, PairUpdate) and update.is_sum and change.whole is None:
            return update.product(start, stop)
        rows = self._unadapted(name, change, start, stop)
        if update is not None:
            rows = update.apply(rows, start, stop)
        known = self.base.tensors[change.source].shape[0]  # fewer than there are rows, where tokens were added
        known = min(max(known - start, 0), stop - start)
        rows[:known] -= self.base.rows(change.source, start, start + known)
        return rows

    def stored(self, name: str) -> StoredBytes | None:
        change = self._changes.get(name)
        if change is None:
            return self.base.stored(name)
        return None if change.whole or change.part or change.source is None else self.base.stored(change.source)

    def account(self) -> dict[str, dict[str, list[str]]]:
        """What became of every tensor: of the base, of the adapters, and what is new in the view.

        `base`: `copied`, `merged`, `replaced`, `dropped` (a language model's head, where the view is a classifier);
        together all of the base's tensors. `adapter`: `merged`, `replaced` (it stands in for one of the base),
        `equal` (a copy of the base's own weight), `head` (of the classifier); together all of the adapters'.
        `added`: tensors of the view that the base's files lack: `untied`, `bias`, `head`.
        """
        account: dict[str, dict[str, list[str]]] = {
            "base": {"copied": [], "merged": [], "replaced": [], "dropped": sorted(self._dropped)},
            "adapter": {"merged": [], "replaced": [], "equal": [], "head": []},
            "added": {"untied": [], "bias": [], "head": []},
        }
        heads = {
            name: change.whole.name for name, change in self._changes.items() if change.whole and not change.source
        }
        for name in self._tensors:
            change = self._changes.get(name)
            if name in heads:
                account["added"]["head"].append(name)
            elif name not in self.base.tensors:
                account["added"]["bias" if name.endswith(".bias") else "untied"].append(name)
            elif change is None or not (change.whole or change.part):
                account["base"]["copied"].append(name)
            else:
                account["base"]["merged" if change.part else "replaced"].append(name)
        wholes = {change.whole.name for change in self._changes.values() if change.whole}
        for adapter in self.adapters:
            parts = {name for part in adapter.parts.values() for name in part.tensors}
            for name in adapter.reader.tensors:
                role = "merged" if name in parts else "replaced" if name in wholes else "equal"
                role = "head" if name in heads.values() else role
                account["adapter"][role].append(name)
        return account

    def update_bytes(self) -> int:
        """Memory at most of the adapters' tensors, in float32: of the updates that are kept and two that are loaded."""
        stored = {name: info.size for adapter in self.adapters for name, info in adapter.reader.tensors.items()}
        largest = 0
        for name, change in self._changes.items():
            if change.part is not None:
                size = sum(stored.get(tensor, 0) for tensor in change.part.tensors)
                if change.transposed and not isinstance(change.part, LowRank):
                    size += self._tensors[name].size  # merged whole
                largest = max(largest, size)
        return 4 * largest * (_UPDATES_KEPT + 2 * _LOADING_COPIES)

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
        self._tensors.update((info.name, info) for info in placed.added)
        self._tensors = {name: info for name, info in self._tensors.items() if name not in placed.dropped}
        self._dropped = placed.dropped
        self._task = placed.task or self._task
        self._config.update(placed.config)
        self._tokenizer = merge_tokenizer_files(self.base.tokenizer, adapter.path)
        embedding = embedding_name(self.base.tensors)
        path = self._tokenizer.files.get("tokenizer.json")
        if path is None or path == self.base.tokenizer.files.get("tokenizer.json") or embedding is None:
            return
        if problem := check_vocabulary(path, self._tensors[embedding].shape[0]):
            raise problem

    def _unadapted(self, name: str, change: Change, start: int, stop: int) -> FloatArray:
        """What the part changes: the base's rows, zeros, or those that the adapter saved whole."""
        if change.whole is not None:
            return change.whole.reader.rows(change.whole.name, start, stop)
        if change.source is None:
            return np.zeros((stop - start, *self._tensors[name].shape[1:]), np.float32)
        return self.base.rows(change.source, start, stop)

    def _update_of(self, name: str, change: Change) -> Update:
        """The part's tensors in float32; the last few are kept, since tensors are read slab by slab."""
        with self._lock:
            update = self._updates.get(name)
            if update is None:
                assert change.part is not None
                update = self._updates[name] = self._load(name, change, change.part)
                if len(self._updates) > _UPDATES_KEPT:
                    self._updates.popitem(last=False)
            return update

    def _load(self, name: str, change: Change, part: Part) -> Update:
        started = isinstance(part, LowRank) and part.start is not None
        if not change.transposed and not started:
            return part.load()

        def slabs() -> Iterator[tuple[int, int, FloatArray]]:
            shape = self._tensors[name].shape
            step = max(1, _SLAB_ELEMENTS // shape[1])
            for start in range(0, shape[0], step):
                stop = min(start + step, shape[0])
                yield start, stop, self._unadapted(name, change, start, stop)

        if isinstance(part, LowRank):
            return part.load_for(slabs, transposed=change.transposed)
        weight = np.concatenate([rows for _, _, rows in slabs()])
        return _Whole(np.ascontiguousarray(part.load().apply(weight.T.copy(), 0, weight.shape[1]).T))

    def _check(
        self, name: str, before: FloatArray, rows: FloatArray, update: PairUpdate, start: int, stop: int
    ) -> None:
        """Freivalds' check (1977): (W + s·BA)x against Wx + s·B(Ax) for a fixed vector x of ±1.

        A wrong entry of the slab shows with a probability of at least one half, a wrong pair, scale or
        orientation practically always.
        """
        change = update.left[start:stop].astype(np.float64) @ update.right_probe
        expected = before + change
        with np.errstate(invalid="ignore"):  # a base that holds infinity: told below
            error = float(np.linalg.norm(rows @ update.probe - expected))
        size = float(np.linalg.norm(before)) + float(np.linalg.norm(change))
        relative = error / size if size else error
        if relative > TOLERANCE:  # few rows may be nearly at right angles to the probe
            relative = error / max(size, float(np.linalg.norm(rows)))
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
class _Whole:
    """A merged tensor, whole: for parts whose rows are the columns of the stored weight."""

    values: FloatArray

    def apply(self, rows: FloatArray, start: int, stop: int) -> FloatArray:
        return self.values[start:stop].copy()


def merge(base: Base, adapters: Sequence[Adapter]) -> MergedCheckpoint:
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
    return merge(open_base(ref), [read_adapter(adapter.path) for adapter in ref.adapters])


def open_base(ref: CheckpointRef) -> Base:
    """The base of `ref` alone, as its adapters were trained on it."""
    base = open_checkpoint(ref.base, trust_remote_code=ref.trust_remote_code)
    return base if ref.requantized is None else requantized(base, BnbSettings.from_json(ref.requantized))


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
