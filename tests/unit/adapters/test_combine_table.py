"""The table of docs/combining.md, cell by cell: what each method is exact against, and what PEFT does there.

`LORA2EDGE_UPDATE_DOCS=1` writes it anew; without it, a cell that is not true fails.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoHaConfig, PeftModel, get_peft_model
from peft.utils import merge_utils
from safetensors.torch import load_file

from lora2edge.adapters import MergedCheckpoint
from lora2edge.adapters.arithmetic import keep_largest, merge_elected, random_mask
from lora2edge.adapters.methods import FACTORED, METHODS
from lora2edge.errors import AdapterError
from tests.tiny import make_adapter, make_checkpoint, shake_adapter
from tests.unit.adapters.test_combine import (
    answers,
    change_of,
    combined,
    error_between,
    live_together,
    load,
    merged_answers,
    weighted_adapter,
)

DOCUMENT = Path(__file__).parents[3] / "docs" / "combining.md"
BEGIN, END = "<!-- table -->", "<!-- end of table -->"
KINDS: Mapping[str, dict[str, Any]] = {
    "LoRA": {},
    "rsLoRA": {"use_rslora": True},
    "lora_bias": {"lora_bias": True},
    "DoRA": {"use_dora": True},
    "modules_to_save in one": {},
    "LoHa (other kinds)": {},
}
WEIGHTS, DENSITY, SEED, RANK = [0.7, 0.5], 0.5, 3, 4
MODULES = ("q_proj", "v_proj")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("table") / "base", "qwen2", dtype="float32", layers=1, tied=False)


def make_pair(kind: str, base: Path, folder: Path) -> list[Path]:
    pair = []
    for seed in (1, 2):
        out = folder / f"{kind.split()[0]}-{seed}"
        if kind.startswith("LoHa"):
            settings = LoHaConfig(r=4, alpha=8, target_modules=list(MODULES), task_type="CAUSAL_LM")
            live = get_peft_model(load(base), settings)
            shake_adapter(live, 0.3, seed)
            live.save_pretrained(out)
        else:
            saved = {"modules_to_save": ["lm_head"]} if kind.startswith("modules") and seed == 1 else {}
            make_adapter(out, base, targets=MODULES, seed=seed, **KINDS[kind], **saved)
        pair.append(out)
    return pair


def formula(method: str, name: str, base: Path, pair: list[Path], weights: list[float]) -> np.ndarray[Any, Any]:
    """The change of one tensor in float64, by PEFT's functions on what each adapter does alone."""
    module, _, parameter = name.rpartition(".")
    stem = method.removesuffix("_svd")

    def mix(tensors: list[torch.Tensor], factors: list[float], end: str = "") -> torch.Tensor:
        weighted = torch.tensor(factors, dtype=torch.float64)
        if stem in {"sum", "linear", "svd"}:
            return merge_utils.task_arithmetic(tensors, weighted)
        if stem == "magnitude_prune":
            return merge_utils.magnitude_prune(tensors, weighted, DENSITY)
        if stem == "ties":
            return merge_utils.ties(tensors, weighted, DENSITY)
        masks = [random_mask(tuple(t.shape), DENSITY, SEED, name + end, index) for index, t in enumerate(tensors)]
        with given_masks(iter(masks)):
            return getattr(merge_utils, stem)(tensors, weighted, DENSITY)

    files = [load_file(path / "adapter_model.safetensors") for path in pair]
    key = f"base_model.model.{module}"
    if parameter == "bias":
        return mix([2.0 * file[f"{key}.lora_B.bias"].double() for file in files], weights).numpy()
    if method in FACTORED:
        scale = 4.0 if f"{pair[0].name}".startswith("rsLoRA") else 2.0
        roots = [(weight * scale) ** 0.5 for weight in weights]
        a, b = (mix([f[f"{key}.lora_{side}.weight"].double() for f in files], roots, f".lora_{side}") for side in "AB")
        return (b @ a).numpy()
    total = mix([torch.from_numpy(change_of(base, path, name)) for path in pair], weights)
    if method == "sum":
        return total.numpy()
    u, sizes, v = torch.linalg.svd(total, full_matrices=False)
    return (u[:, :RANK] * sizes[:RANK] @ v[:RANK]).numpy()


class given_masks:  # noqa: N801  (a context manager that reads as a verb)
    """PEFT's random pruning, with these masks in turn."""

    def __init__(self, masks: Iterator[Any]) -> None:
        self.masks = masks

    def __enter__(self) -> None:
        self.before = merge_utils.random_pruning
        merge_utils.random_pruning = lambda tensor, density, rescale: (
            tensor * torch.from_numpy(next(self.masks)) / density
        )

    def __exit__(self, *_: object) -> None:
        merge_utils.random_pruning = self.before


def is_formula(view: MergedCheckpoint, method: str, base: Path, pair: list[Path], weights: list[float]) -> bool:
    """Every adapted matrix and bias, within 2e-5 of the change's size; what one adapter saved stands as it is."""
    if "lm_head.weight" in view.adapted:
        saved = load_file(pair[0] / "adapter_model.safetensors")["base_model.model.lm_head.weight"].numpy()
        if not np.array_equal(saved, view.rows("lm_head.weight", 0, len(saved))):
            return False
    for name in sorted(view.adapted - {"lm_head.weight"}):
        rows = view.tensors[name].shape[0]
        change = view.rows(name, 0, rows).astype(np.float64) - view.root.rows(name, 0, rows)
        wanted = formula(method, name, base, pair, weights)
        if np.linalg.norm(change - wanted) > 2e-5 * np.linalg.norm(wanted):
            return False
    return True


def ours(method: str, kind: str, base: Path, pair: list[Path]) -> tuple[str, MergedCheckpoint | None]:
    weights = [1.0, 1.0] if method == "sequence" else [1.0, 0.5] if kind.startswith("modules") else WEIGHTS
    settings = {
        "density": DENSITY if "ties" in method or "dare" in method or "prune" in method else None,
        "svd_rank": RANK if method.endswith("svd") else None,
    }
    try:
        view = combined(base, pair, weights, method=method, seed=SEED, **settings)
    except AdapterError as error:
        return f"`{error.code}`", None
    if method == "sequence":
        merged = PeftModel.from_pretrained(load(base), pair[0]).merge_and_unload()
        live = answers(PeftModel.from_pretrained(merged, pair[1]).eval())
        return ("✓ live" if error_between(merged_answers(view), live) <= 1e-5 else "WRONG"), view
    if not view.reference:
        live = answers(live_together(base, pair, weights))
        return ("✓ live" if error_between(merged_answers(view), live) <= 1e-5 else "WRONG"), view
    return ("✓ formula" if is_formula(view, method, base, pair, weights) else "WRONG"), view


def pefts(method: str, kind: str, base: Path, pair: list[Path], view: MergedCheckpoint | None) -> str:
    """What add_weighted_adapter does: "same", "differs" (without a word), or what it raises."""
    weights = [1.0, 0.5] if kind.startswith("modules") else WEIGHTS
    name = {"sum": "cat"}.get(method, method)
    settings: dict[str, Any] = {"density": DENSITY} if any(s in method for s in ("ties", "dare", "prune")) else {}
    if "svd" in method:
        settings["svd_rank"] = RANK
    masks = []
    for module in ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"):
        out = 64 if "q_proj" in module else 32
        shapes = {"": (out, 64)} if "svd" in method else {".lora_A": (RANK, 64), ".lora_B": (out, RANK)}
        masks += [
            random_mask(shape, DENSITY, SEED, f"{module}.weight{end}", index)
            for end, shape in shapes.items()
            for index in (0, 1)
        ]
    try:
        with given_masks(iter(masks)):
            live = answers(weighted_adapter(base, pair, weights, name, **settings))
    except (ValueError, AttributeError, RuntimeError, TypeError, KeyError, NotImplementedError) as error:
        return f"raises {type(error).__name__}"
    if view is None:
        return "drops a part silently"
    return "same" if error_between(live, merged_answers(view)) <= 1e-5 else "differs silently"


def cell(method: str, kind: str, base: Path, pair: list[Path]) -> str:
    mine, view = ours(method, kind, base, pair)
    if method == "sequence":
        return mine
    return f"{mine}; PEFT {pefts(method, kind, base, pair, view)}"


def read_table() -> dict[str, dict[str, str]]:
    text = DOCUMENT.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    head, *rows = [
        [part.strip() for part in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")
    ]
    return {row[0].strip("`"): dict(zip(head[1:], row[1:], strict=True)) for row in rows}


def write_table(table: Mapping[str, Mapping[str, str]]) -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    lines = [f"| method | {' | '.join(KINDS)} |", "|---" * (len(KINDS) + 1) + "|"]
    lines += [f"| `{method}` | {' | '.join(table[method][kind] for kind in KINDS)} |" for method in METHODS]
    DOCUMENT.write_text(f"{before}{BEGIN}\n" + "\n".join(lines) + f"\n{END}{rest.partition(END)[2]}", encoding="utf-8")


def test_every_method_with_every_kind(base: Path, tmp_path: Path) -> None:
    pairs = {kind: make_pair(kind, base, tmp_path) for kind in KINDS}
    table = {method: {kind: cell(method, kind, base, pairs[kind]) for kind in KINDS} for method in METHODS}
    assert not [(m, k) for m, row in table.items() for k, text in row.items() if "WRONG" in text]
    if os.environ.get("LORA2EDGE_UPDATE_DOCS"):
        write_table(table)
    assert read_table() == table


@pytest.mark.parametrize("seed", range(5))
def test_pruning_and_election_are_pefts(seed: int) -> None:
    """On random tensors that hold zeros and equal entries too."""
    random = np.random.default_rng(seed)
    tensors = [random.normal(size=(9, 7)).round(2).astype(np.float32) for _ in range(3)]
    for density in (0.01, 0.3, 0.99, 1.0):
        for tensor in tensors:
            kept = keep_largest(tensor, density)
            theirs = merge_utils.prune(torch.from_numpy(tensor), density, method="magnitude").numpy()
            np.testing.assert_array_equal(np.sort(np.abs(kept), None), np.sort(np.abs(theirs), None))
            assert np.isin(np.flatnonzero(kept), np.flatnonzero(kept == tensor)).all()
    for sign in ("total", "frequency"):
        stack = torch.from_numpy(np.stack(tensors))
        mask = merge_utils.calculate_majority_sign_mask(stack, sign)
        weights = [0.5, -2.0, 1.0]
        theirs = merge_utils.disjoint_merge(stack * torch.tensor(weights).view(3, 1, 1), mask).numpy()
        elected = np.abs(stack.sum(0).numpy()) > 1e-6 if sign == "total" else np.ones((9, 7), bool)  # no rounded zeros
        np.testing.assert_allclose(merge_elected(tensors, weights, sign)[elected], theirs[elected], atol=1e-6)
