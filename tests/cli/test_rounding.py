"""Targets of two backends in one build: one calibration pass, and each target's own feedback stream."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from lora2edge.report.schema import check_report
from tests.cli.conftest import Model, Outcome


def test_targets_share_one_pass(lora2edge: Callable[..., Outcome], model: Model, tmp_path: Path) -> None:
    (tmp_path / "plain.yaml").write_text("backend: gguf\nprecision: q4_0\noptions: {rounding: llama.cpp}\n")
    targets = ["gguf/q4_0", "gguf/q4_k_m", "gguf/q8_0", "onnxruntime/cpu-int4", tmp_path / "plain.yaml"]
    chosen = [part for target in targets for part in ("--target", target)]
    options = ["--base", model.base, "--adapter", model.adapter, "--data", model.data, "--no-bench"]
    outcome = lora2edge("build", *chosen, *options, "--out", tmp_path / "out")
    assert outcome.code in {0, 3}, outcome.err  # random weights may miss a gate
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    check_report(report)
    stages = {stage["name"]: stage for stage in report["stages"]}
    assert [stage["name"] for stage in report["stages"]].count("calibrate") == 1
    phases = {name: [phase["what"] for phase in stages[f"lower {name}"]["phases"]] for name in report["targets"]}
    assert phases == {
        "gguf/q4_0": ["round", "quantize"],
        "gguf/q4_k_m": ["round", "quantize"],
        "gguf/q8_0": ["quantize"],
        "onnxruntime/cpu-int4": ["round", "write"],
        "plain": ["quantize"],
    }
    assert "(round " in (tmp_path / "out" / "report.md").read_text()
    methods = {name: target["lowering"]["notes"]["rounding"]["method"] for name, target in report["targets"].items()}
    assert set(methods.values()) == {"gptq", "llama.cpp"}
