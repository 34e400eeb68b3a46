"""The merged checkpoint: a view that computes rows of W + ΔW when they are asked for, and writes nothing.

What the live model computes with tied embeddings was read off PEFT 0.21's outputs, not off its merge:
merge_and_unload() adds a LoRA of one tied module to both, and adds two of them twice; the live adapter does not.
"""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lora2edge.adapters.changes import load_update, read_unadapted
from lora2edge.adapters.combine import (
    NO_LIVE_FORM,
    check_together,
    combine_placements,
    has_live_form,
)
from lora2edge.adapters.ends import Change
from lora2edge.adapters.joint import Joint
from lora2edge.adapters.kinds.lora import LowRank, PairUpdate
from lora2edge.adapters.methods import SEQUENCE, Combination
from lora2edge.adapters.parts import Update
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
from lora2edge.contracts import Base, CheckpointRef, StoredBytes, Task, TensorInfo, TokenizerFiles
from lora2edge.errors import CheckpointError, ProofError

if TYPE_CHECKING:
    from lora2edge.contracts import FloatArray

TOLERANCE = 4e-6
"""Largest relative error of the formula check. float32 sums give 1e-7 to 5e-7; one wrong pair gives far more."""

_UPDATES_KEPT = 4
_LOADING_COPIES = 3
"""Of an update's tensors, while it is loaded: as stored, in float32, and scaled or turned."""


class MergedCheckpoint:
    """Base and adapters as one checkpoint. Safe to read from several threads.

    Of a sequence each adapter has a view of its own, whose base is the view of those before it.
    """

    def __init__(self, base: Base, adapters: Sequence[Adapter], combination: Combination | None = None) -> None:
        self.base = base
        self.combination = combination or Combination()
        self._inner = base if isinstance(base, MergedCheckpoint) else None
        self._own = tuple(adapters)
        self._own_checks: dict[str, float] = {}
        self._changes: dict[str, Change] = {}
        self._touched: list[frozenset[str]] = []
        self._tensors = dict(base.tensors)
        self._config = dict(base.config)
        self._task = base.task
        self._dropped: frozenset[str] = frozenset()
        self._tokenizer = base.tokenizer
        self._updates: OrderedDict[str, Update] = OrderedDict()
        self._lock = threading.Lock()
        if adapters:
            self._apply(adapters)

    @property
    def root(self) -> Base:
        """The base that no adapter was merged into."""
        return self._inner.root if self._inner else self.base

    @property
    def path(self) -> Path:
        """The base's folder."""
        return self.base.path

    @property
    def is_quantized(self) -> bool:
        """Whether the base has quantized weights."""
        return self.base.is_quantized

    @property
    def adapters(self) -> tuple[Adapter, ...]:
        """All of them, in their order."""
        return (*(self._inner.adapters if self._inner else ()), *self._own)

    @property
    def checks(self) -> dict[str, float]:
        """Worst relative error of the formula check, per adapted tensor, over the rows read so far."""
        inner = self._inner.checks if self._inner else {}
        return {name: max(inner.get(name, 0.0), self._own_checks.get(name, 0.0)) for name in inner | self._own_checks}

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
        own = frozenset(name for name, change in self._changes.items() if change.whole or change.part)
        return own | frozenset(name for name in self._tensors if self._inner and self._before(name))

    @property
    def touched(self) -> list[frozenset[str]]:
        """The same for each adapter alone."""
        return [*(self._inner.touched if self._inner else ()), *self._touched]

    @property
    def ref(self) -> CheckpointRef:
        combine = self.combination.to_json() if self.combined else None
        return replace(self.root.ref, adapters=tuple(adapter.ref for adapter in self.adapters), combine=combine)

    @property
    def reference(self) -> str:
        """What the baseline is where PEFT has no live form of these adapters; "" where it has."""
        combined = self.combination.method != SEQUENCE and not has_live_form(self.adapters, self.combination)
        return NO_LIVE_FORM if combined else ""

    @functools.cached_property
    def steps(self) -> tuple[MergedCheckpoint, ...]:
        """The views that PEFT has a live form of, which together prove this one.

        This one where it has one itself; each adapter's on those before it in a sequence; else each adapter alone.
        """
        if self._inner:
            return (*self._inner.steps, self)
        if not self.reference:
            return (self,)
        return tuple(MergedCheckpoint(self.base, [replace(adapter, weight=1.0)]) for adapter in self._own)

    @property
    def combined(self) -> dict[str, Any] | None:
        """Weights, method and settings, JSON-ready; None where one adapter is merged as it was trained."""
        if not CheckpointRef("", tuple(adapter.ref for adapter in self.adapters)).is_combined:
            return None
        return {"weights": [adapter.weight for adapter in self.adapters], **self.combination.to_json()}

    @property
    def joints(self) -> tuple[Joint, ...]:
        """What several adapters make together, tensor by tensor."""
        return tuple(change.part for change in self._changes.values() if isinstance(change.part, Joint))

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
        own, before = self._own_delta(name, start, stop), self._delta_before(name, start, stop)
        if own is None or before is None or self._is_new(name):
            return before if own is None else own
        own[: len(before)] += before
        return own

    def _own_delta(self, name: str, start: int, stop: int) -> FloatArray | None:
        """The change that this view makes to its base, which may be another view."""
        change = self._changes.get(name)
        if change is None or change.source is None or not (change.whole or change.part) or self._is_new(name):
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

    def _delta_before(self, name: str, start: int, stop: int) -> FloatArray | None:
        """What the views before this one changed in the rows that it starts from."""
        change = self._changes.get(name)
        source = change.source if change else name
        if self._inner is None or source is None or self._is_new(name):
            return None
        stop = min(stop, self._inner.tensors[source].shape[0])
        return self._inner.delta(source, start, stop) if start < stop else None

    def _is_new(self, name: str) -> bool:
        """Whether the tensor starts from zeros, in this view or one before it: it has no delta."""
        change = self._changes.get(name)
        source = change.source if change else name
        return source is None or (self._inner is not None and self._inner._is_new(source))

    def _before(self, name: str) -> bool:
        """Whether a view before this one changed what `name` starts from."""
        change = self._changes.get(name)
        source = change.source if change else name
        return self._inner is not None and source is not None and source in self._inner.adapted

    def stored(self, name: str) -> StoredBytes | None:
        change = self._changes.get(name)
        if change is None:
            return self.base.stored(name)
        return None if change.whole or change.part or change.source is None else self.base.stored(change.source)

    def account(self) -> dict[str, dict[str, list[str]]]:
        """What became of every tensor: of the base, of the adapters, and what is new in the view.

        `base`: `copied`, `merged`, `replaced`, `dropped` (a language model's head, where the view is a classifier);
        together all of the base's tensors. `adapter`: `merged`, `replaced` (it stands in for one of the base),
        `equal` (a copy of the base's own weight), `head` (of the classifier); together all of the adapters', whose
        names begin with `0/`, `1/`, … where there are several.
        `added`: tensors of the view that the base's files lack: `untied`, `bias`, `head`.
        """
        account: dict[str, dict[str, list[str]]] = {
            "base": {"copied": [], "merged": [], "replaced": [], "dropped": self._gone()},
            "adapter": {"merged": [], "replaced": [], "equal": [], "head": []},
            "added": {"untied": [], "bias": [], "head": []},
        }
        levels = self._levels()
        heads = {
            (id(change.whole.reader), change.whole.name): name
            for level in levels
            for name, change in level._changes.items()
            if change.whole and not change.source
        }
        new = set(heads.values())
        for name in self._tensors:
            changes = [change for level in levels if (change := level._changes.get(name))]
            if name not in self.root.tensors:
                kind = "head" if name in new else "bias" if name.endswith(".bias") else "untied"
                account["added"][kind].append(name)
                continue
            role = "copied"
            for change in changes:
                role = "merged" if change.part else "replaced" if change.whole else role
            account["base"][role].append(name)
        wholes = {
            (id(change.whole.reader), change.whole.name)
            for level in levels
            for change in level._changes.values()
            if change.whole
        }
        for index, adapter in enumerate(self.adapters):
            parts = {name for part in adapter.parts.values() for name in part.tensors}
            prefix = f"{index}/" if len(self.adapters) > 1 else ""
            for name in adapter.reader.tensors:
                key = (id(adapter.reader), name)
                role = (
                    "merged" if name in parts else "head" if key in heads else "replaced" if key in wholes else "equal"
                )
                account["adapter"][role].append(prefix + name)
        return account

    def _gone(self) -> list[str]:
        """Tensors of the root that the view has no place for."""
        dropped = frozenset[str]().union(*(level._dropped for level in self._levels()))
        return sorted(dropped & self.root.tensors.keys())

    def _levels(self) -> list[MergedCheckpoint]:
        return [*(self._inner._levels() if self._inner else ()), self]

    def update_bytes(self) -> int:
        """Memory at most of the adapters' tensors, in float32: of the updates that are kept and two that are loaded."""
        largest = whole = 0
        for name, change in self._changes.items():
            members = change.part.members if isinstance(change.part, Joint) else ()
            size = 0
            for each in (member.change for member in members) if members else (change,):
                if each.part is not None:
                    stored = each.adapter.reader.tensors
                    size += sum(stored[tensor].size for tensor in each.part.tensors if tensor in stored)
                    if each.transposed and not isinstance(each.part, LowRank):
                        size += self._tensors[name].size  # merged whole
            largest = max(largest, size)
            whole = max(whole, change.part.cost[0] if isinstance(change.part, Joint) else 0)
        before = self._inner.update_bytes() if self._inner else 0
        return 4 * largest * (_UPDATES_KEPT + 2 * _LOADING_COPIES) + whole + before

    def module_names(self, name: str) -> list[str]:
        return self.base.module_names(name) if name in self.base.tensors else [name]

    def close(self) -> None:
        self.base.close()
        for adapter in self._own:
            adapter.close()

    def fingerprint(self) -> dict[str, Any]:
        """The base's fingerprint, and full hashes of the adapter files: a retrained adapter has the same sizes."""
        found = {"base": self.root.fingerprint(), "adapters": [adapter.file_hashes() for adapter in self.adapters]}
        return {**found, "combined": self.combined} if self.combined else found

    def file_hashes(self) -> dict[str, str]:
        """`base/FILE` and `adapter/FILE` → sha256, weights included; `adapters/0/FILE`, … where there are several."""
        hashes = {f"base/{name}": value for name, value in self.root.file_hashes().items()}
        for index, adapter in enumerate(self.adapters):
            folder = f"adapters/{index}" if len(self.adapters) > 1 else "adapter"
            hashes.update({f"{folder}/{name}": value for name, value in adapter.file_hashes().items()})
        return hashes

    def _apply(self, adapters: Sequence[Adapter]) -> None:
        if len(adapters) == 1 and adapters[0].weight == 1:
            placed = place_adapter(self.base, adapters[0])
            changed = frozenset(name for name, change in placed.changes.items() if change.whole or change.part)
            self._touched = [changed]
        else:
            placed, self._touched = combine_placements(self.base, adapters, self.combination)
        self._changes = placed.changes
        self._tensors.update((info.name, info) for info in placed.added)
        self._tensors = {name: info for name, info in self._tensors.items() if name not in placed.dropped}
        self._dropped = placed.dropped
        self._task = placed.task or self._task
        self._config.update(placed.config)
        for adapter in adapters:
            self._tokenizer = merge_tokenizer_files(self._tokenizer, adapter.path)
        embedding = embedding_name(self.base.tensors)
        path = self._tokenizer.files.get("tokenizer.json")
        if path is None or path == self.base.tokenizer.files.get("tokenizer.json") or embedding is None:
            return
        if problem := check_vocabulary(path, self._tensors[embedding].shape[0]):
            raise problem

    def _unadapted(self, name: str, change: Change, start: int, stop: int) -> FloatArray:
        return read_unadapted(self.base, change, self._tensors[name].shape, start, stop)

    def _update_of(self, name: str, change: Change) -> Update:
        """The part's tensors in float32; the last few are kept, since tensors are read slab by slab."""
        with self._lock:
            update = self._updates.get(name)
            if update is None:
                assert change.part is not None
                update = self._updates[name] = load_update(self.base, change, change.part, self._tensors[name].shape)
                if len(self._updates) > _UPDATES_KEPT:
                    self._updates.popitem(last=False)
            return update

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
            self._own_checks[name] = max(relative, self._own_checks.get(name, 0.0))
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


def merge(base: Base, adapters: Sequence[Adapter], combination: Combination | None = None) -> MergedCheckpoint:
    """The view of `base` with `adapters` merged. Reads no base weight, but for two copies of tied embeddings.

    Without adapters it passes the base through. `combination`: how several become one, default their weighted sum.
    Raises AdapterError or CheckpointError where an adapter does not fit, or where base + ΔW is not what the live
    adapter computes; Refusals for all that the combination cannot do exactly.
    """
    combination = combination or Combination()
    check_together(adapters, combination)
    if not adapters:
        return MergedCheckpoint(base, adapters)
    if combination.method != SEQUENCE:
        return MergedCheckpoint(base, adapters, combination)
    view = MergedCheckpoint(base, adapters[:1], combination)
    for adapter in adapters[1:]:
        view = MergedCheckpoint(view, [adapter], combination)
    return view


def open_view(ref: CheckpointRef) -> MergedCheckpoint:
    """The view that `ref` describes, opened again, e.g. in another process."""
    adapters = [replace(read_adapter(adapter.path), weight=adapter.weight) for adapter in ref.adapters]
    return merge(open_base(ref), adapters, Combination.from_json(ref.combine))


def open_base(ref: CheckpointRef) -> Base:
    """The base of `ref` alone, as its adapters were trained on it."""
    base = open_checkpoint(ref.base, trust_remote_code=ref.trust_remote_code)
    return base if ref.requantized is None else requantized(base, BnbSettings.from_json(ref.requantized))
