"""The verbs as a user meets them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from lora2edge.report.schema import check_report
from tests.cli.conftest import Model, Outcome

Run = Callable[..., Outcome]


def test_help_imports_nothing_heavy() -> None:
    code = "import sys; sys.argv = ['lora2edge', '--help']\nfrom lora2edge.cli import main\ntry: main()\nexcept SystemExit: pass\nprint(sorted(sys.modules))"  # noqa: E501
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = done.stdout.splitlines()[-1]
    for heavy in ("'torch'", "'numpy'", "'pydantic'", "'transformers'", "'rich'", "'yaml'"):
        assert heavy not in loaded


def test_targets(lora2edge: Run) -> None:
    outcome = lora2edge("targets", "--json")
    assert outcome.code == 0
    names = {target["name"] for target in json.loads(outcome.out)}
    assert {"hf/merged", "gguf/q8_0", "gguf/q4_k_m", "gguf/q2_k", "gguf/bf16"} <= names


def test_doctor(lora2edge: Run) -> None:
    outcome = lora2edge("doctor", "--json")
    backends = {backend["name"]: backend for backend in json.loads(outcome.out)["backends"]}
    assert backends["gguf"]["works"] and backends["hf"]["works"]


def test_inspect(lora2edge: Run, model: Model) -> None:
    checkpoint = json.loads(lora2edge("inspect", model.base, "--json").out)
    adapter = json.loads(lora2edge("inspect", model.adapter, "--json").out)
    assert checkpoint["kind"] == "checkpoint" and checkpoint["architecture"] == "Qwen2ForCausalLM"
    assert adapter["kind"] == "adapter" and adapter["rank"] == 4


def test_inspect_of_an_adapter_whose_base_is_not_there(lora2edge: Run, model: Model, tmp_path: Path) -> None:
    outcome = lora2edge("inspect", model.adapter, "--base", tmp_path / "nope")
    assert outcome.code == 2 and "error[no-checkpoint]" in outcome.err
    told = lora2edge("inspect", model.adapter, "--base", tmp_path / "nope", "--json")
    assert told.code == 2 and json.loads(told.out)["error"]["code"] == "no-checkpoint"
    assert lora2edge("inspect", model.adapter, "--base", model.base).code == 0


def test_merge_says_that_the_adapter_names_another_base(lora2edge: Run, model: Model, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(model.base, other)
    said = lora2edge("merge", "--base", other, "--adapter", model.adapter, "--out", tmp_path / "out")
    assert said.code == 0 and f"trained on {model.base}, and {other} has another name" in said.out
    same = lora2edge("merge", "--base", model.base, "--adapter", model.adapter, "--out", tmp_path / "out")
    assert same.code == 0 and "another name" not in same.out


def test_merge_proves(lora2edge: Run, model: Model, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    out = tmp_path / "merged"
    options = ["--base", model.base, "--adapter", model.adapter, "--data", model.data, "--out", out]
    outcome = lora2edge("merge", "--prove", "--json", *options)
    assert outcome.code == 0, outcome.err
    proof = json.loads(outcome.out)["merge"]
    assert proof["math_kl"] <= 1e-9 and proof["rounding_kl"] <= proof["floor_kl"]
    assert AutoModelForCausalLM.from_pretrained(out).config.hidden_size == 256


@pytest.fixture(scope="module")
def built(
    model: Model, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[subprocess.CompletedProcess[str]]]:
    """A build and its repetition, as processes."""
    root = tmp_path_factory.mktemp("built")
    scenario = root / "short.yaml"
    scenario.write_text("new_tokens: 4\nrequests: 1\nrounds: 2\nwarmup: 1\nconcurrency: [1, 2]\n")
    target = root / "mine.yaml"
    target.write_text(f"name: mine/q8_0\nbackend: gguf\nprecision: q8_0\ngates: {{}}\nscenarios: [{scenario}]\n")
    command = [sys.executable, "-m", "lora2edge", "build", "--base", model.base, "--adapter", model.adapter, "--target",
               target, "--data", model.data, "--out", root / "out"]  # fmt: skip
    environment = {**os.environ, "LORA2EDGE_CACHE": str(root / "cache")}
    runs = [
        subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, check=False)
        for _ in range(2)
    ]
    return root, runs


def test_build_writes_everything(built: tuple[Path, list[subprocess.CompletedProcess[str]]]) -> None:
    root, (first, _) = built
    assert first.returncode == 0, first.stderr
    out = root / "out"
    report = json.loads((out / "report.json").read_text())
    check_report(report)
    assert report["merge"]["math_kl"] <= 1e-9
    target = report["targets"]["mine/q8_0"]
    assert target["verdict"] == "pass" and target["quality"]["kl_mean"] < 0.05
    assert target["speed"]["decode_ratio"]["low"] <= target["speed"]["decode_ratio"]["value"]
    assert (out / "report.html").exists() and (out / "report.md").exists()
    assert (out / "artifacts" / "mine-q8_0" / "manifest.json").exists()
    manifest = (out / "artifacts" / "mine-q8_0" / "manifest.json").read_text()
    assert str(root) not in manifest


def test_second_build_reuses_every_stage(built: tuple[Path, list[subprocess.CompletedProcess[str]]]) -> None:
    root, (_, second) = built
    assert second.returncode == 0, second.stderr
    report = json.loads((root / "out" / "report.json").read_text())
    assert [stage["name"] for stage in report["stages"] if not stage["reused"]] == []


def test_measure_alone_finds_the_builds_recipe(
    built: tuple[Path, list[subprocess.CompletedProcess[str]]], lora2edge: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, _ = built
    monkeypatch.setenv("LORA2EDGE_CACHE", str(root / "cache"))
    outcome = lora2edge("measure", root / "out" / "artifacts" / "mine-q8_0", "--json")
    assert outcome.code == 0, outcome.err
    report = json.loads((root / "out" / "report.json").read_text())
    assert json.loads(outcome.out)["quality"] == report["targets"]["mine/q8_0"]["quality"]


def test_resolved_recipe_repeats_the_build(built: tuple[Path, list[subprocess.CompletedProcess[str]]]) -> None:
    root, _ = built
    recipe = yaml.safe_load((root / "out" / "recipe.resolved.yaml").read_text())
    assert recipe["out"] == str(root / "out") and Path(recipe["base"]).is_dir()


def test_missed_gate_rejects(lora2edge: Run, model: Model, tmp_path: Path) -> None:
    target = tmp_path / "strict.yaml"
    target.write_text("name: strict\nbackend: gguf\nprecision: q4_0\ngates: {kl_mean: {max: 1e-9}}\n")
    out = tmp_path / "out"
    options = ["--base", model.base, "--adapter", model.adapter, "--data", model.data, "--out", out]
    outcome = lora2edge("build", "--target", target, "--no-bench", *options)
    assert outcome.code == 3, outcome.err
    assert not (out / "artifacts" / "strict").exists()
    assert (out / "artifacts" / "strict.rejected" / "manifest.json").exists()
    assert json.loads((out / "report.json").read_text())["verdict"] == "fail"


def test_interrupt_leaves_nothing_half_written(model: Model, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "lora2edge", "build", "--base", model.base, "--adapter", model.adapter, "--target",
               "gguf/q8_0", "--data", model.data, "--out", out]  # fmt: skip
    environment = {**os.environ, "LORA2EDGE_CACHE": str(tmp_path / "cache")}
    child = subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True, env=environment)
    deadline = time.monotonic() + 120
    while not (out / "recipe.resolved.yaml").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1.0)
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=60)
    assert child.returncode == 130, errors
    assert "Traceback" not in errors
    assert sorted(path.name for path in out.iterdir()) == ["recipe.resolved.yaml"]
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.name.endswith(".partial")]
