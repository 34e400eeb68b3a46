"""What a build will meet and need, told from headers alone: the adapter against its base, and each stage's costs."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora2edge.adapters import Adapter, MergedCheckpoint
from lora2edge.bench.scenario import classify_scenarios, language_scenarios
from lora2edge.checkpoint import FLOAT_DTYPES, embedding_name, head_name, vocabulary_size
from lora2edge.contracts import CLASSIFICATIONS, Base, Checkpoint, Estimate, Machine, TensorInfo
from lora2edge.quality.proof import PROOF_POSITIONS
from lora2edge.recipe import Recipe
from lora2edge.target import Target

_TORCH_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
OVERHEAD_BYTES = 800 << 20
"""Activations, tokenizer, Python and libraries beside the weights, measured on small models."""
_DISK_BYTES_PER_SECOND = 1e9
"""Of a solid-state disk, read and written: no lowering is faster."""
_ADAPTER_BYTES_PER_SECOND = 500e6
"""Reading and checking the adapter's tensors, on one core."""
_PROOF_PASSES, _BASELINE_PASSES = 4, 2
"""Passes of a model over the calibration text, and over the test text."""
_PROMPT_SHARE = 3
"""Prompts are read as well as scored: a clinical question is about twice as long as its answer."""
_TEXT_TOKENS = {"sequence-classification": 64, "token-classification": 2}
"""Tokens of a classifier's decision: of a text, and of a word with its share of the special tokens."""
_SAMPLE_BYTES = 24
"""Of a token in a stored sample, its text included."""
_NOT_LINEAR = re.compile(r"embed|wte|wpe|shared\.weight|lm_head|norm|(^|\.)ln_|relative_attention_bias")
_EXPERTS = re.compile(r"\.experts(\.|$)")
_LAYER = re.compile(r".*?\.\d+\.")
_BATCH_TOKENS = 1024
"""That the calibration pass runs together, padding counted in."""


@dataclass(frozen=True, slots=True)
class StageForecast:
    """What one stage will need: memory and disk at most, and about how long it takes."""

    stage: str
    """As the report names it: merge, prove, calibrate, baseline, lower, measure, bench."""
    target: str | None
    """None for a stage that all targets share."""
    ram_bytes: int
    disk_bytes: int
    seconds: float
    note: str = ""


@dataclass(frozen=True, slots=True)
class Coverage:
    """Which layers an adapter changes."""

    modules: int
    """Modules that it adapts."""
    missed: tuple[str, ...]
    """Entries of target_modules and modules_to_save that it holds no module for: they hit nothing in training."""
    unadapted: Mapping[str, int]
    """Linear layers of the base that it leaves as they are, by name with `*` for numbers → how many."""


@dataclass(frozen=True, slots=True)
class Delta:
    """How large the adapter is, and how much of the model it changes."""

    parameters: int
    bytes: int
    """As stored."""
    changed: int
    """Weights of the merged model that it changes."""
    share: float
    """Of all weights."""


def forecast_stages(
    view: MergedCheckpoint,
    targets: Sequence[Target],
    estimates: Mapping[str, Estimate],
    recipe: Recipe,
    rate: float,
    code: str | None = None,
) -> list[StageForecast]:
    """Memory, disk and time of every stage, for the targets that have an estimate.

    `rate`: float32 operations per second. `code`: what of the checkpoint's own would have to be run. Stages that need
    text are in it whether or not there is any.
    """
    second_per_token = 2.0 * active_weights(view) / rate
    calibration = max((target.calibration.tokens for target in targets), default=0)
    classifies = view.task in CLASSIFICATIONS
    test = (_TEXT_TOKENS[view.task] if classifies else _PROMPT_SHARE) * recipe.tokens
    model = proof_bytes(view)
    kept = any(estimate.layer_inputs for estimate in estimates.values())
    proofs = len(view.adapters) if view.reference or view.combination.method == "sequence" else 1
    runs = f"would run the base's own code, {code}" if code else ""
    stages = [
        _merge(view, rate),
        StageForecast("prove", None, model, 0, proofs * _PROOF_PASSES * calibration * second_per_token, runs),
    ]
    if classifies:
        stages.append(StageForecast("calibrate", None, 0, _SAMPLE_BYTES * calibration, 0.0, "the texts are kept"))
    else:
        ram, disk = calibration_bytes(view, calibration, kept)
        stages.append(StageForecast("calibrate", None, ram, disk, calibration * second_per_token, runs))
    record = _SAMPLE_BYTES * test if classifies else _record_bytes(view, recipe)
    stages.append(StageForecast("baseline", None, model, record, _BASELINE_PASSES * test * second_per_token, runs))
    for target in targets:
        estimate = estimates.get(target.name)
        if estimate is None:
            continue
        seconds = max(estimate.seconds, (stored_bytes(view) + estimate.disk_bytes) / _DISK_BYTES_PER_SECOND)
        needs = (estimate.ram_bytes, estimate.disk_bytes + estimate.scratch_bytes, seconds)
        scratch = (f"{estimate.scratch_bytes / 1e6:,.1f} MB of the disk only until it is written",)
        notes = (*estimate.notes, *(scratch if estimate.scratch_bytes else ()))
        stages.append(StageForecast("lower", target.name, *needs, "; ".join(notes)))
        loaded = estimate.disk_bytes + OVERHEAD_BYTES
        stages.append(StageForecast("measure", target.name, loaded, 0, test * second_per_token, runs))
        both = loaded + stored_bytes(view) + OVERHEAD_BYTES
        choose = classify_scenarios if classifies else language_scenarios
        budget = sum(scenario.max_seconds for scenario in choose(target.scenarios))
        note = runs or "baseline and artifact side by side"
        stages.append(StageForecast("bench", target.name, both, 0, budget, note))
    return stages


def forecast_choice(view: Checkpoint, candidates: int, rate: float) -> StageForecast:
    """The live model and each candidate in turn, on the proof's text."""
    tokens = _PROMPT_SHARE * PROOF_POSITIONS * (1 + candidates)
    return StageForecast("merge-base", None, proof_bytes(view), 0, tokens * 2.0 * active_weights(view) / rate)


def calibration_bytes(view: Checkpoint, tokens: int, layer_inputs: bool) -> tuple[int, int]:
    """Memory and disk of the calibration pass: one layer in float32 and what is in none but the output layer, of the
    embedding the rows that occur; on the disk what two layers are given, with `layer_inputs` all of them in bfloat16.
    """
    layers: Counter[str] = Counter()
    ends = 0
    embedding, head = embedding_name(view.tensors), head_name(view.tensors)
    for name, tensor in view.tensors.items():
        if found := _LAYER.match(name):
            layers[found[0]] += tensor.size
        elif name not in {embedding, head}:
            ends += tensor.size
    rows, hidden = view.tensors[embedding].shape if embedding else (0, 0)
    text = view.config.get("text_config", view.config)
    inner = max(text.get("intermediate_size") or 0, 4 * hidden)
    activations = _BATCH_TOKENS * (4 * inner + 8 * hidden)
    ram = 4 * (max(layers.values(), default=0) + ends + min(rows, tokens) * hidden + activations) + OVERHEAD_BYTES
    return ram, tokens * hidden * (2 * 4 + (2 * len(layers) if layer_inputs else 0))


def proof_bytes(view: Checkpoint) -> int:
    """Memory of the merge proof and the baseline: one model in float32 at a time."""
    return 4 * sum(tensor.size for tensor in view.tensors.values()) + OVERHEAD_BYTES


def stored_bytes(view: Checkpoint) -> int:
    """The view's tensors as they are stored."""
    return sum(tensor.size * FLOAT_DTYPES.get(tensor.dtype, 1) for tensor in view.tensors.values())


def stored_dtype(view: Checkpoint) -> str:
    """The dtype that most of `view` is stored in, as torch names it."""
    sizes: Counter[str] = Counter()
    for tensor in view.tensors.values():
        sizes[tensor.dtype] += tensor.size
    return _TORCH_DTYPES.get(max(sizes, key=lambda name: sizes[name]), "float32")


def active_weights(view: Checkpoint) -> float:
    """Weights that one token is multiplied with: all but the experts that it is not sent to."""
    experts = view.config.get("num_experts") or view.config.get("num_local_experts")
    chosen = view.config.get("num_experts_per_tok")
    share = chosen / experts if isinstance(experts, int) and isinstance(chosen, int) and 0 < chosen < experts else 1.0
    return sum(tensor.size * (share if _EXPERTS.search(name) else 1.0) for name, tensor in view.tensors.items())


def operations_per_second(machine: Machine) -> float:
    """The machine's rate in float32 matrix products: as stated, else measured in some milliseconds."""
    if machine.operations_per_second is not None:
        return machine.operations_per_second
    import numpy as np

    block = np.ones((768, 768), np.float32)
    best = float("inf")
    for _ in range(3):
        started = time.perf_counter()
        block @ block
        best = min(best, time.perf_counter() - started)
    return 2 * 768**3 / best


def find_coverage(base: Base, adapter: Adapter, changed: frozenset[str]) -> Coverage:
    """The adapter's reach. `changed`: names of the tensors that it changes in the base."""
    modules = {part.module for part in adapter.parts.values()}
    saved = {path.rpartition(".")[0] for path in adapter.saved}
    entries = _entries(adapter.config.get("target_modules"))
    missed = [entry for entry in entries if not any(_hits(entry, module) for module in modules)]
    left = Counter(
        re.sub(r"\.\d+(?=\.)", ".*", name.removesuffix(".weight"))
        for name, tensor in base.tensors.items()
        if name not in changed and is_linear(tensor)
    )
    return Coverage(len(modules | saved), tuple(missed), dict(sorted(left.items())))


def is_linear(tensor: TensorInfo) -> bool:
    """Whether a stored tensor is the weight of a linear layer, or of fused experts; not an embedding, nor the head."""
    matrix = len(tensor.shape) == 2 and tensor.name.endswith(".weight")
    fused = len(tensor.shape) == 3 and bool(_EXPERTS.search(tensor.name))
    return (matrix or fused) and not _NOT_LINEAR.search(tensor.name)


def find_delta(view: MergedCheckpoint, adapter: Adapter, touched: frozenset[str]) -> Delta:
    """The adapter's size, and what it changes. `touched`: names of the tensors that it changes."""
    tensors = adapter.reader.tensors.values()
    total = sum(tensor.size for tensor in view.tensors.values())
    changed = sum(view.tensors[name].size for name in touched)
    stored = sum(tensor.size * FLOAT_DTYPES.get(tensor.dtype, 1) for tensor in tensors)
    return Delta(sum(tensor.size for tensor in tensors), stored, changed, changed / total if total else 0.0)


def match_base(view: MergedCheckpoint, adapter: Adapter, given: str | None) -> dict[str, Any]:
    """How well base and adapter belong together, JSON-ready. Names and shapes fit, else there were no view.

    Two checkpoints of one size have the same names and shapes, so the name that the adapter gives is compared too.
    """
    embedding = embedding_name(view.tensors)
    tokenizer = view.tokenizer.files.get("tokenizer.json")
    return {
        "parts": len(adapter.parts) + len(adapter.saved) + len(adapter.replaced),
        "tokenizer_ids": vocabulary_size(tokenizer) if tokenizer else None,
        "tokenizer_from": "adapter" if tokenizer and tokenizer.parent == adapter.path else "base",
        "embedding_rows": view.tensors[embedding].shape[0] if embedding else None,
        "output_head": "own" if head_name(view.tensors) else "the embedding",
        **compare_names(view, adapter, given),
    }


def compare_names(view: MergedCheckpoint, adapter: Adapter, given: str | None) -> dict[str, Any]:
    """What base the adapter names, and whether the one that was `given` has that name; None where either is missing."""
    named = adapter.base_model_name_or_path
    return {
        "named": named,
        "named_revision": adapter.revision,
        "given": given or named,
        "same_name": _same_name(named, view.base.path) if given and named else None,
    }


def _merge(view: MergedCheckpoint, rate: float) -> StageForecast:
    """The view costs what the adapters' tensors cost: rows are merged while a target is written.

    What is combined in whole tensors takes one of them at a time.
    """
    costs = [joint.cost for joint in view.joints]
    whole = max((size for size, _ in costs), default=0)
    seconds = sum(operations for _, operations in costs) / rate
    note = "in memory, while targets are written"
    if whole:
        note += f"; {view.combination.method} decomposes whole changes, one tensor at a time, for each pass"
    tensors = [tensor for adapter in view.adapters for tensor in adapter.reader.tensors.values()]
    stored = sum(tensor.size * FLOAT_DTYPES.get(tensor.dtype, 1) for tensor in tensors)
    largest = sorted((4 * tensor.size for tensor in tensors), reverse=True)[:8]
    return StageForecast("merge", None, sum(largest) + whole, 0, stored / _ADAPTER_BYTES_PER_SECOND + seconds, note)


def _record_bytes(view: Checkpoint, recipe: Recipe) -> int:
    """The baseline's record: its last hidden states at the scored positions and its head, in float32."""
    embedding = embedding_name(view.tensors)
    if embedding is None:
        return 0
    rows, hidden = view.tensors[embedding].shape
    return 4 * hidden * (recipe.tokens + rows)


def _entries(targets: Any) -> list[str]:
    """target_modules as a list: a pattern is one entry."""
    if isinstance(targets, str):
        return [] if targets == "all-linear" else [targets]
    return [str(entry) for entry in targets] if isinstance(targets, list) else []


def _hits(entry: str, module: str) -> bool:
    """PEFT's rule for a list: the module's path, or its end after a dot; a lone string is a pattern for all of it."""
    if module == entry or module.endswith(f".{entry}"):
        return True
    try:
        return re.fullmatch(entry, module) is not None
    except re.error:
        return False


def _same_name(named: str, folder: Path) -> bool:
    """Whether the folder's name, or that of the hub's cache which it lies in, is the name that the adapter gives."""
    if Path(named).exists() and Path(named).resolve() == folder.resolve():
        return True
    wanted = named.rstrip("/").rpartition("/")[2].lower()
    cached = f"models--{named.replace('/', '--')}".lower()
    return any(part.lower() in {wanted, cached} for part in folder.resolve().parts[-3:])
