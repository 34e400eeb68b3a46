"""docs/models.md: the plan over the published configurations. `python -m tests.public_table` writes it anew.

A test compares the file with what this gives. The machine is a fixed one, so that it is the same everywhere.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

from lora2edge.contracts import Machine
from lora2edge.forecast import StageForecast
from lora2edge.recipe import Recipe
from lora2edge.report import words
from lora2edge.survey import Survey, survey_build
from lora2edge.target import load_target, shipped_targets
from tests.public import make_public_adapter, make_public_checkpoint, public_models, read_model, tensor_shapes
from tests.tiny import make_data

PAGE = Path(__file__).parent.parent / "docs" / "models.md"
MACHINE = Machine(
    cores=16, ram_bytes=64_000_000_000, disk_bytes=4_000_000_000_000, cuda=None, operations_per_second=1e12
)
MEASURED = "gguf/q4_k_m"
"""The target whose stages the second table shows, or else hf/merged."""

_INTRO = f"""# Bases that people tune

What `lora2edge build --plan` answers for the published configurations of well-known models: header-only checkpoints,
config.json and the names and shapes of all tensors, without a weight. The adapter is a LoRA of rank 16 on every linear
layer (experts one by one, routers left out). This page is made from `tests/fixtures/models`, and a test compares it;
after a change, `python -m tests.public_table` writes it anew.

The plan is made for a fixed machine: {MACHINE.cores} cores, {words.size(MACHINE.ram_bytes)} of memory,
{words.size(MACHINE.disk_bytes)} of disk, no GPU, {MACHINE.operations_per_second:.0e} float32 operations a second. For
yours, `--plan` tells there. Tokenizers are no part of this: every model has a small stand-in, and whether GGUF can
hold a model's own tokenizer is told by the plan over the real folder.

## Lowering

Size of the artifact and time for each target, with the adapter merged on the way; memory is the most that any target
needs. q4_0, q4_k_m, q5_k_m and q6_k are rounded with GPTQ, which needs calibration text, and as much disk again until
the file is written; with `rounding: llama.cpp`, or without text, they take about the time of q3_k_m.
A code in the place of a size is a refusal, explained below.
"""
_STAGES = """
## A whole build

What the other stages need: the merge proof and the baseline hold one model in float32, calibrate one layer of it;
measure and bench are those of `gguf/q4_k_m`, or of `hf/merged` where GGUF refuses. The last column says what
a build with `--data` comes to on this machine. Where it is refused, lowering, which streams, still works.
"""
_REFUSALS = """
## What is refused, and why

"""
_SOURCES = """
## Where the configurations were read

"""


def _data(path: Path, adapter: Path) -> Path:
    """Lines that suit the model's task."""
    if "SEQ_CLS" not in (adapter / "adapter_config.json").read_text(encoding="utf-8"):
        return make_data(path, 4)
    path.write_text('{"text": "Case 1: chills.", "label": 0}\n', encoding="utf-8")
    return path


def render() -> str:
    """The page. Takes some seconds and next to no disk."""
    names = public_models()
    with tempfile.TemporaryDirectory(prefix="lora2edge-") as folder:
        surveys = {name: survey(Path(folder) / name, name) for name in names}
        parts = [_INTRO, _targets(surveys), _STAGES, _stages(surveys), _REFUSALS, *_refusals(surveys)]
        parts += [
            _SOURCES,
            *(f"- {read_model(name)['id']}: {'; '.join(read_model(name)['source'])}\n" for name in names),
        ]
        for found in surveys.values():
            for opened in (found.base, *found.adapters):
                if opened is not None:
                    opened.close()
    return "".join(parts)


def survey(folder: Path, name: str) -> Survey:
    """The plan of building fixture `name` for every shipped target, on the fixed machine."""
    base = make_public_checkpoint(folder / "base", name)
    adapter = make_public_adapter(folder / "adapter", base, name)
    recipe = Recipe(base=str(base), adapter=str(adapter), data=str(_data(folder / "data.jsonl", adapter)))
    return survey_build(recipe, [load_target(target) for target in shipped_targets()], machine=MACHINE)


def _targets(surveys: dict[str, Survey]) -> str:
    names = list(shipped_targets())
    rows = [["Model", "Parameters", "Adapter", "Memory", *names]]
    for model, found in surveys.items():
        lowering = {stage.target: stage for stage in found.stages if stage.stage == "lower"}
        memory = words.size(max(stage.ram_bytes for stage in lowering.values())) if lowering else words.NONE
        sizes = tensor_shapes(model).values()
        described = found.describe_adapters()[0]
        adapter = words.parameters(described["delta"]["parameters"]) if "delta" in described else words.NONE
        cells = [_need(found, lowering[name]) if name in lowering else _codes(found, name) for name in names]
        rows.append([model, words.parameters(sum(map(_product, sizes))), adapter, memory, *cells])
    return _table(rows)


def _stages(surveys: dict[str, Survey]) -> str:
    rows = [["Model", "prove", "calibrate", "baseline", "measure", "bench", "Here"]]
    for model, found in surveys.items():
        shown = MEASURED if MEASURED in found.estimates else "hf/merged"
        stages = {stage.stage: stage for stage in found.stages if stage.target in (None, shown)}
        cells = []
        for name in rows[0][1:-1]:
            stage = stages.get(name)
            disk = f" + {words.size(stage.disk_bytes)} of disk" if stage and stage.disk_bytes else ""
            ram = f"{words.size(stage.ram_bytes)}{disk}" if stage else ""
            cells.append(f"{ram}, {words.duration(stage.seconds)}" if stage else words.NONE)
        here = "; ".join(
            f"refused: needs {words.size(stages['prove'].ram_bytes)}" if error.code == "memory" else f"`{error.code}`"
            for error in found.errors
        )
        rows.append([model, *cells, here or "works"])
    return _table(rows)


def _refusals(surveys: dict[str, Survey]) -> Iterator[str]:
    """Each refusal once, with the models that it stands for."""
    told: dict[tuple[str, str, str], list[str]] = {}
    for model, found in surveys.items():
        for error in found.refusals:
            what = "the merge proof does not fit into the memory" if error.code == "memory" else error.what
            models = told.setdefault((error.code, what, error.why), [])
            if model not in models:
                models.append(model)
    for (code, what, why), models in sorted(told.items()):
        yield f"- `{code}`: {what}; {why}. {', '.join(models)}\n"


def _need(found: Survey, stage: StageForecast) -> str:
    assert stage.target
    return f"{words.size(found.estimates[stage.target].disk_bytes)}, {words.duration(stage.seconds)}"


def _codes(found: Survey, target: str) -> str:
    errors = found.refused.get(target) or found.errors
    return "`" + " ".join(dict.fromkeys(error.code for error in errors)) + "`"


def _table(rows: list[list[str]]) -> str:
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    return "\n" + "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _product(shape: tuple[int, ...]) -> int:
    total = 1
    for length in shape:
        total *= length
    return total


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
