"""LoRA (arXiv 2106.09685) with its variants: rsLoRA (2312.03732), DoRA (2402.09353), starts, biases, single tokens."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from lora2edge.adapters.kinds.common import COMMON_KEYS, RESTORE, other_shape, pattern_value, whole
from lora2edge.adapters.kinds.starts import OLORA, PISSA, find_start
from lora2edge.adapters.kinds.tokens import TokenRows
from lora2edge.adapters.parts import Part, Update
from lora2edge.checkpoint import TensorReader
from lora2edge.errors import AdapterError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lora2edge.contracts import FloatArray

KEYS = COMMON_KEYS | {
    "alpha_pattern", "corda_config", "ensure_weight_tying", "eva_config", "init_lora_weights", "loftq_config",
    "lora_alpha", "lora_bias", "lora_dropout", "lora_ga_config", "megatron_core", "qalora_group_size", "r",
    "rank_pattern", "runtime_config", "target_parameters", "trainable_token_indices", "use_dora", "use_rslora",
}  # fmt: skip
"""Settings that are handled here or have no effect after training."""

_LOW_RANK = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(\.weight)?")
_MAGNITUDE = re.compile(r"(?P<module>.+)\.lora_magnitude_vector(\.weight)?")
_BIAS = re.compile(r"(?P<module>.+)\.lora_B\.bias")
_EXPERTS, _ROUTER = ".experts", ".gate"
_HEADS = ("lm_head", "embed_out")
_TOKENS = re.compile(r"(?P<module>.+)\.token_adapter\.trainable_tokens_delta")


@dataclass(frozen=True, slots=True)
class LowRank:
    """One LoRA pair: ΔW = scale · B A, as PEFT computes it; with `magnitude`, rows of W + ΔW of that length (DoRA)."""

    module: str
    reader: TensorReader
    embedding: bool
    """Whether PEFT stored it as an embedding's: A `[r, vocabulary]`, B `[hidden, r]`."""
    a: str
    b: str
    """Names of the two tensors in the file."""
    rank: int
    scale: float
    shape: tuple[int, int]
    """`[out, in]` of BA."""
    magnitude: str | None = None
    """`[out]`."""
    start: str | None = None
    """`pissa` or `olora`, where PEFT takes that start off the base's weight: ΔW = scale · (B A − B₀ A₀)."""

    @property
    def parameter(self) -> str:
        return "weight"

    @property
    def tensors(self) -> tuple[str, ...]:
        return (self.a, self.b) if self.magnitude is None else (self.a, self.b, self.magnitude)

    def misfit(self, shape: tuple[int, ...]) -> str | None:
        if shape == self.shape:
            too_large = self.start and self.rank > min(shape)
            return f"{self.module} is {list(shape)}: it has no start of rank {self.rank}" if too_large else None
        return f"{self.module}: lora_A and lora_B make {list(self.shape)}, the base has {list(shape)}"

    def load(self) -> PairUpdate:
        assert self.start is None, "depends on the weight: load_for()"
        a, b = self._factors()
        return PairUpdate.of(b, a, lengths=self._lengths())

    def load_for(self, slabs: Callable[[], Iterator[tuple[int, int, FloatArray]]], *, transposed: bool) -> PairUpdate:
        """The same where it depends on the weight, or where that is stored `[in, out]` and `apply` takes rows of that.

        `slabs` gives all of the unmerged weight as (start, stop, rows): for the start, which holds it whole, and for
        DoRA's lengths.
        """
        a, b = self._factors()
        if self.start:
            stored = np.concatenate([rows for _, _, rows in slabs()])
            weight = stored.T if transposed else stored
            left, right = find_start(self.start, weight, self.rank, self.scale, self.module)
            a, b = np.concatenate((a, right)), np.concatenate((b, -left), axis=1)
        if not transposed:
            return PairUpdate.of(b, a, lengths=self._lengths())
        update = PairUpdate.of(np.ascontiguousarray(a.T), np.ascontiguousarray(b.T))
        lengths = self._lengths()
        if lengths is None:
            return update
        squares = np.zeros(len(lengths), np.float64)
        for start, stop, rows in slabs():
            squares += np.square(update.add(rows, start, stop), dtype=np.float64).sum(0)
        return replace(update, columns=(lengths / np.sqrt(squares)).astype(np.float32))

    def _factors(self) -> tuple[FloatArray, FloatArray]:
        """A and scale · B, in float32."""
        return whole(self.reader, self.a), whole(self.reader, self.b) * np.float32(self.scale)

    def _lengths(self) -> FloatArray | None:
        return None if self.magnitude is None else whole(self.reader, self.magnitude)


@dataclass(frozen=True, slots=True)
class ExpertStack:
    """`target_parameters`: pairs for all experts of a layer at once. PEFT wraps one such parameter in another and
    does not save which is which: the shapes tell. `places` takes it apart into an `ExpertPair` for each matrix."""

    module: str
    """That of the experts."""
    parameter: str
    """Which of the nested wrappers: `weight`, `base_layer.weight`, …"""
    reader: TensorReader
    a: str
    """`[experts · r, in]`."""
    b: str
    """`[out, r · experts]`: the experts vary fastest."""
    rank: int
    scale: float
    config: Mapping[str, Any]

    @property
    def tensors(self) -> tuple[str, ...]:
        return self.a, self.b

    def of(self, name: str) -> ExpertStack:
        """The stack if it is the parameter `name`'s, whose rank and scale the patterns may give."""
        rank, scale = _scale(self.config, f"{self.module}.{name}")
        return replace(self, rank=rank, scale=scale)

    def misfit(self, shape: tuple[int, ...]) -> str | None:
        """`shape`: `[experts, out, in]`."""
        a, b = self.reader.tensors[self.a].shape, self.reader.tensors[self.b].shape
        experts, out, inputs = shape
        if a == (experts * self.rank, inputs) and b == (out, self.rank * experts):
            return None
        return f"{self.module}: lora_A {list(a)} and lora_B {list(b)} are not for experts of shape {list(shape)}"

    def load(self) -> Update:
        raise AdapterError(
            "adapter-experts",
            f"the experts of {self.module} are stored as one tensor",
            why="such bases are not supported: experts are expected as a matrix each",
        )

    def pair(self, module: str, expert: int, experts: int, first_row: int, rows: int) -> ExpertPair:
        """The part for rows `first_row:first_row + rows` of one expert."""
        return ExpertPair(module, self, expert, experts, first_row, rows)


@dataclass(frozen=True, slots=True)
class ExpertPair:
    """One expert's share of a stack: ΔW = scale · B_e A_e."""

    module: str
    stack: ExpertStack
    expert: int
    experts: int
    first_row: int
    rows: int

    @property
    def parameter(self) -> str:
        return "weight"

    @property
    def tensors(self) -> tuple[str, ...]:
        return self.stack.tensors

    def misfit(self, shape: tuple[int, ...]) -> str | None:
        wanted = (self.rows, self.stack.reader.tensors[self.stack.a].shape[1])
        return None if shape == wanted else f"{self.module} is {list(shape)} in the base, {list(wanted)} is needed"

    def load(self) -> PairUpdate:
        rank = self.stack.rank
        a = self.stack.reader.rows(self.stack.a, self.expert * rank, (self.expert + 1) * rank)
        b = self.stack.reader.rows(self.stack.b, self.first_row, self.first_row + self.rows)
        left = b[:, self.expert :: self.experts] * np.float32(self.stack.scale)
        return PairUpdate.of(np.ascontiguousarray(left), a)


@dataclass(frozen=True, slots=True)
class PairUpdate:
    """ΔW = left · right, in the orientation of the rows that `apply` takes."""

    left: FloatArray
    """`[rows, r]`, scale included."""
    right: FloatArray
    """`[r, columns]`."""
    probe: FloatArray
    """`[columns]`, ±1: for a check of the product by another route."""
    right_probe: NDArray[np.float64]
    """right · probe, `[r]`."""
    lengths: FloatArray | None = None
    """`[rows]`: DoRA's magnitudes, the length of each merged row."""
    columns: FloatArray | None = None
    """`[columns]`: the same where rows are inputs: what each column of the sum is multiplied by."""

    @staticmethod
    def of(left: FloatArray, right: FloatArray, lengths: FloatArray | None = None) -> PairUpdate:
        signs = np.random.default_rng(right.shape[1]).random(right.shape[1]) < 0.5
        probe = np.where(signs, -1, 1).astype(np.float32)
        return PairUpdate(left, right, probe, right.astype(np.float64) @ probe, lengths)

    @property
    def is_sum(self) -> bool:
        """Whether the merged weight is W + ΔW and no more."""
        return self.lengths is None and self.columns is None

    def product(self, start: int, stop: int) -> FloatArray:
        """Rows of ΔW."""
        product: FloatArray = self.left[start:stop] @ self.right
        return product

    def add(self, rows: FloatArray, start: int, stop: int) -> FloatArray:
        """Adds rows of ΔW to `rows` itself."""
        rows += self.product(start, stop)
        return rows

    def resize(self, rows: FloatArray, start: int, stop: int) -> FloatArray:
        """Gives rows of W + ΔW the lengths that DoRA trained."""
        if self.lengths is not None:
            norms = np.sqrt(np.square(rows, dtype=np.float64).sum(1))
            with np.errstate(divide="ignore", invalid="ignore"):  # a row of zeros: whoever writes it refuses the NaN
                rows *= (self.lengths[start:stop] / norms).astype(np.float32)[:, None]
        if self.columns is not None:
            rows *= self.columns
        return rows

    def apply(self, rows: FloatArray, start: int, stop: int) -> FloatArray:
        return self.resize(self.add(rows, start, stop), start, stop)


@dataclass(frozen=True, slots=True)
class AddedBias:
    """`lora_bias`: the base's bias, or zeros, plus scale · b."""

    module: str
    reader: TensorReader
    tensor: str
    scale: float

    @property
    def parameter(self) -> str:
        return "bias"

    @property
    def tensors(self) -> tuple[str, ...]:
        return (self.tensor,)

    def misfit(self, shape: tuple[int, ...]) -> str | None:
        return other_shape(self, self.reader.tensors[self.tensor].shape, shape)

    def load(self) -> Update:
        return _Addition(whole(self.reader, self.tensor) * np.float32(self.scale))


@dataclass(frozen=True, slots=True)
class _Addition:
    values: FloatArray

    def apply(self, rows: FloatArray, start: int, stop: int) -> FloatArray:
        rows += self.values[start:stop]
        return rows


def read(config: Mapping[str, Any], reader: TensorReader, tensors: Mapping[str, str]) -> list[Part]:
    """The parts of a LoRA adapter; `tensors`: path in the model → name in the file. Other tensors are left alone.

    Raises AdapterError for pairs that are incomplete or do not agree with the configuration.
    """
    sides: dict[tuple[str, bool], dict[str, str]] = {}
    magnitudes: dict[str, str] = {}
    parts: list[Part] = []
    for path, name in tensors.items():
        if found := _LOW_RANK.fullmatch(path):
            sides.setdefault((found["module"], bool(found["embedding"])), {})[found["side"]] = name
        elif found := _MAGNITUDE.fullmatch(path):
            magnitudes[found["module"]] = name
        elif found := _BIAS.fullmatch(path):
            parts.append(AddedBias(found["module"], reader, name, _scale(config, found["module"])[1]))
        elif found := _TOKENS.fullmatch(path):
            parts.append(_token_rows(config, reader, found["module"], name))
    stacks = [key for key in sides if _holds_experts(config, key[0])]
    parts += [_stack(config, reader, module, sides.pop((module, side))) for module, side in stacks]
    _check_magnitudes(config, {module for module, _ in sides}, magnitudes)
    pairs = [
        _pair(config, reader, module, embedding, found, magnitudes.get(module))
        for (module, embedding), found in sides.items()
    ]
    return [*pairs, *parts]


def _pair(
    config: Mapping[str, Any],
    reader: TensorReader,
    module: str,
    embedding: bool,
    found: Mapping[str, str],
    magnitude: str | None,
) -> LowRank:
    present = next(iter(found.values()))
    if len(found) == 1:
        missing = "B" if "A" in found else "A"
        raise AdapterError(
            "adapter-incomplete",
            f"{module} has no lora_{missing}",
            why=f"the file holds {present} only",
            hint="the save was cut short: save the adapter again",
        )
    rank, scale = _scale(config, f"{module}.weight" if _is_router(config, module) else module)
    a, b = reader.tensors[found["A"]], reader.tensors[found["B"]]
    if len(a.shape) != 2 or len(b.shape) != 2:
        raise AdapterError(
            "adapter-shape",
            f"{module}: lora_A is {list(a.shape)}, lora_B is {list(b.shape)}",
            why="both must have two axes; convolutions are not supported, and DeepSpeed or FSDP saves shards when "
            "they are not gathered first",
            hint="gather the weights, then save the adapter again",
        )
    if a.shape[0] == b.shape[1] and config.get("ensure_weight_tying") and module.endswith(_HEADS):
        rank = a.shape[0]  # the embedding's pair is the head's; its scale is that of the head's own rank and alpha
    if not a.shape[0] == b.shape[1] == rank:
        raise AdapterError(
            "adapter-rank",
            f"{module}: lora_A has rank {a.shape[0]}, lora_B {b.shape[1]}, adapter_config.json says {rank}",
            why="r, or the key of rank_pattern that matches the module",
            hint="restore the adapter_config.json that was saved with these weights",
        )
    shape = (b.shape[0], a.shape[1])
    if magnitude is not None and reader.tensors[magnitude].shape != shape[:1]:
        raise AdapterError(
            "adapter-shape",
            f"{module}: lora_magnitude_vector is {list(reader.tensors[magnitude].shape)}, [{shape[0]}] is needed",
            why="DoRA has a length for each output",
            hint="save the adapter again",
        )
    start = None if embedding else _start(config)
    if start and scale <= 0:
        raise AdapterError(
            "adapter-setting",
            f"{module}: a start {start!r} with the scale {scale:g} is not supported",
            why="PEFT divides by it",
            hint=RESTORE,
        )
    return LowRank(module, reader, embedding, found["A"], found["B"], rank, scale, shape, magnitude, start)


def _start(config: Mapping[str, Any]) -> str | None:
    """The start that PEFT takes off a linear layer's weight; an embedding's has none."""
    name = config.get("init_lora_weights")
    if name == PISSA:
        return PISSA
    return OLORA if isinstance(name, str) and name.lower() == OLORA else None


def _holds_experts(config: Mapping[str, Any], module: str) -> bool:
    """Whether target_parameters names a parameter of the module, perhaps by its bare name, as PEFT 0.21 writes it for
    target_modules that are layers of experts. A router's weight is a matrix like any linear layer's."""
    path = module.replace(".base_layer", "")
    owners = {str(target).rpartition(".")[0] for target in config.get("target_parameters") or []}
    if _is_router(config, path):
        return False
    return any(f".{path}".endswith(f".{owner}" if owner else _EXPERTS) for owner in owners)


def _is_router(config: Mapping[str, Any], module: str) -> bool:
    """Whether target_parameters names the module's weight, and it is the one that PEFT names for all-linear."""
    targets = config.get("target_parameters") or []
    return module.endswith(_ROUTER) and any(f".{module}.weight".endswith(f".{target}") for target in targets)


def _stack(config: Mapping[str, Any], reader: TensorReader, wrapped: str, found: Mapping[str, str]) -> ExpertStack:
    if len(found) == 1:
        raise AdapterError(
            "adapter-incomplete",
            f"{wrapped} has one of lora_A and lora_B only",
            why=next(iter(found.values())),
            hint="the save was cut short: save the adapter again",
        )
    module = wrapped.replace(".base_layer", "")
    rank, scale = _scale(config, module)
    nested = wrapped[len(module) + 1 :]
    return ExpertStack(module, f"{nested}.weight".lstrip("."), reader, found["A"], found["B"], rank, scale, config)


def _check_magnitudes(config: Mapping[str, Any], modules: set[str], magnitudes: Mapping[str, str]) -> None:
    wrong = (modules ^ set(magnitudes)) if config.get("use_dora") else set(magnitudes)
    if wrong:
        raise AdapterError(
            "adapter-incomplete",
            f"use_dora is {bool(config.get('use_dora'))}, and lora_magnitude_vector does not go with it: "
            + ", ".join(sorted(wrong)[:3]),
            why="DoRA has a length vector for each adapted module, plain LoRA none",
            hint="restore the adapter_config.json that was saved with these weights",
        )


def _scale(config: Mapping[str, Any], module: str) -> tuple[int, float]:
    """Rank and scale of a module."""
    rank = int(pattern_value(config, "rank_pattern", module, config["r"]))
    alpha = pattern_value(config, "alpha_pattern", module, config["lora_alpha"])
    return rank, alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _token_rows(config: Mapping[str, Any], reader: TensorReader, module: str, name: str) -> TokenRows:
    """A list belongs to the input embedding, an object names modules by the end of their path; a head that it does not
    name was saved because it is tied to the one that it names."""
    stored = config.get("trainable_token_indices")
    if isinstance(stored, dict):
        only = next(iter(stored.values())) if len(stored) == 1 and module.endswith(_HEADS) else None
        stored = next((indices for end, indices in stored.items() if f".{module}".endswith(f".{end}")), only)
    count = reader.tensors[name].shape[0] if reader.tensors[name].shape else 0
    ids = stored if isinstance(stored, list) else []
    numbers = all(isinstance(index, int) and not isinstance(index, bool) and index >= 0 for index in ids)
    if not numbers or not count == len(ids) == len(set(ids)):
        raise AdapterError(
            "bad-adapter-config",
            f"{module}: {count} token rows were saved, trainable_token_indices is {str(stored)[:80]}",
            why="it must list as many different token ids",
            hint="restore the adapter_config.json that was saved with these weights",
        )
    return TokenRows(module, reader, name, tuple(ids))
