"""Every kind of adapter on every architecture against PEFT's live model; docs/adapters.md holds what came out.

`LORA2EDGE_UPDATE_DOCS=1 python -m pytest tests/unit/adapters/test_matrix.py` writes the table anew.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model

from lora2edge.adapters import merge, read_adapter
from lora2edge.backends.hf.write import write_checkpoint
from lora2edge.checkpoint import open_checkpoint
from lora2edge.errors import InputError, Refusals
from lora2edge.progress import SILENT
from tests.architectures import ARCHITECTURES, KINDS, Architecture, make_model
from tests.tiny import shake_adapter

IDS = torch.tensor([[5, 30, 77, 40, 12, 9, 60, 33, 3, 41, 150, 7]])
TOLERANCE = 1e-5
"""Of the largest logit."""
DOCUMENT = Path(__file__).resolve().parents[3] / "docs" / "adapters.md"
BEGIN, END = "<!-- table -->", "<!-- end of table -->"


def cell(kind: str, architecture: Architecture, model: Any, base: Path, scratch: Path) -> str:
    """What becomes of the kind on the architecture: ✓, or the code of the refusal."""
    if "experts" in kind and not architecture.parameters:
        return "–"
    try:
        peft = get_peft_model(copy.deepcopy(model), KINDS[kind](architecture))
    except (ValueError, TypeError, NotImplementedError):
        return "not in PEFT"
    shake_adapter(peft)
    peft.save_pretrained(scratch / "adapter")
    live = PeftModel.from_pretrained(copy.deepcopy(model), scratch / "adapter").eval()
    inputs = {"input_ids": IDS, **({"decoder_input_ids": IDS[:, :7]} if model.config.is_encoder_decoder else {})}
    with torch.no_grad():
        plain = model(**inputs).logits
        try:
            expected = live(**inputs).logits
        except RuntimeError:  # OLoRA gives a Conv1D factors of the wrong shapes
            return "not in PEFT"
    try:
        view = merge(open_checkpoint(base), [read_adapter(scratch / "adapter")])
    except InputError as error:
        found = error.errors if isinstance(error, Refusals) else (error,)
        return "`" + "`, `".join(sorted({single.code for single in found})) + "`"
    (scratch / "out").mkdir()
    write_checkpoint(view, scratch / "out", SILENT)
    merged = type(model).from_pretrained(scratch / "out", dtype=torch.float32).eval()
    with torch.no_grad():
        found_logits = merged(**inputs).logits
    assert (expected - plain).abs().max() > 1e-3, "the adapter does nothing"
    error_size = float((expected - found_logits).abs().max() / expected.abs().max())
    assert error_size <= TOLERANCE, f"{kind}: {error_size:.1e}"
    return "✓"


def read_table() -> dict[str, dict[str, str]]:
    """Architecture → kind → cell, as the document has them."""
    text = DOCUMENT.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    head, *rows = [[text.strip() for text in line.strip("|").split("|")] for line in lines]
    return {name: {row[0]: row[column] for row in rows} for column, name in enumerate(head) if column}


def write_table(table: dict[str, dict[str, str]]) -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    lines = [f"| kind | {' | '.join(ARCHITECTURES)} |", "|---" * (len(ARCHITECTURES) + 1) + "|"]
    lines += [f"| {kind} | {' | '.join(table.get(a, {}).get(kind, '') for a in ARCHITECTURES)} |" for kind in KINDS]
    DOCUMENT.write_text(f"{before}{BEGIN}\n" + "\n".join(lines) + f"\n{END}{rest.partition(END)[2]}", encoding="utf-8")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_kind(name: str, tmp_path: Path) -> None:
    architecture = ARCHITECTURES[name]
    model = make_model(architecture, tmp_path / "base")
    found = {}
    for index, kind in enumerate(KINDS):
        scratch = tmp_path / str(index)
        scratch.mkdir()
        found[kind] = cell(kind, architecture, model, tmp_path / "base", scratch)
    if os.environ.get("LORA2EDGE_UPDATE_DOCS"):
        write_table({**read_table(), name: found})
    assert read_table()[name] == found
