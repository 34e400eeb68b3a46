"""`lora2edge build` of a sequence and a token classifier, with figures against transformers and PEFT used directly."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel

from lora2edge.report.schema import check_report
from tests.classifiers import (
    CLASSES,
    TAGS,
    make_classifier,
    make_classifier_adapter,
    make_labelled_data,
    make_tagged_data,
)
from tests.cli.conftest import Outcome

Run = Callable[..., Outcome]
TARGET = """\
name: ours
backend: hf
precision: stored
gates: {kl_mean: {max: 1.0e-6}, macro_f1_loss: {max: 0.005}, macro_f1: {min: 0.2, action: warn}, ppl_ratio: {max: 1.1}}
scenarios: [ward.yaml, chat]
"""
SCENARIO = "batch_sizes: [1, 4]\ntexts: 8\nrounds: 2\nwarmup: 1\n"


@dataclass(frozen=True)
class Built:
    root: Path
    report: dict[str, Any]
    printed: str

    @property
    def out(self) -> Path:
        return self.root / "out"

    @property
    def given(self) -> list[str]:
        return ["--base", str(self.root / "base"), "--adapter", str(self.root / "adapter"),
                "--data", str(self.root / "data.jsonl")]  # fmt: skip


def train(base: Path, adapter: Path, task: str, data: Path) -> None:
    """A few steps on the data, so that the fine-tune is worth something."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    names = TAGS if task == "TokenClassification" else CLASSES
    torch.manual_seed(0)
    model = getattr(transformers, f"AutoModelFor{task}").from_pretrained(base, dtype=torch.float32)
    live = PeftModel.from_pretrained(model, str(adapter), is_trainable=True)
    optimizer = torch.optim.Adam([each for each in live.parameters() if each.requires_grad], lr=0.03)
    lines = [json.loads(line) for line in data.read_text().splitlines()]
    inputs, gold = encode(tokenizer, lines, names)
    for _ in range(40):
        logits = live(**inputs).logits.reshape(-1, 3)
        loss = torch.nn.functional.cross_entropy(logits, gold.reshape(-1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    live.save_pretrained(adapter)


def encode(tokenizer: Any, lines: list[dict[str, Any]], names: tuple[str, ...]) -> tuple[Any, Any]:
    """All lines in one padded batch, and the class of each row or token; -100 where there is none."""

    def index(label: Any) -> int:
        return label if isinstance(label, int) else names.index(label)

    if "text" in lines[0]:
        inputs = tokenizer([line["text"] for line in lines], padding=True, return_tensors="pt")
        return inputs, torch.tensor([index(line["label"]) for line in lines])
    inputs = tokenizer([line["tokens"] for line in lines], is_split_into_words=True, padding=True, return_tensors="pt")
    gold = torch.full(inputs["input_ids"].shape, -100)
    for row, line in enumerate(lines):
        seen = set()
        for place, word in enumerate(inputs.word_ids(row)):
            if word is not None and word not in seen:
                seen.add(word)
                gold[row, place] = index(line["labels"][word])
    return inputs, gold


def build(root: Path, task: str, *options: str) -> Built:
    root.mkdir()
    tagged = task == "TokenClassification"
    base = make_classifier(root / "base", task=task, labels=TAGS if tagged else CLASSES)
    kind = "TOKEN_CLS" if tagged else "SEQ_CLS"
    adapter = make_classifier_adapter(root / "adapter", base, kind, strength=0.05)
    data = (make_tagged_data if tagged else make_labelled_data)(root / "data.jsonl", 120)
    train(base, adapter, task, data)
    (root / "ours.yaml").write_text(TARGET)
    (root / "ward.yaml").write_text(SCENARIO)
    command = ["build", "--base", base, "--adapter", adapter, "--data", data, "--out", root / "out", "--threads", "1"]
    environment = {**os.environ, "LORA2EDGE_CACHE": str(root / "cache"), "COLUMNS": "160"}
    done = subprocess.run(
        [sys.executable, "-m", "lora2edge", *map(str, command), *options],
        env=environment, cwd=root, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return Built(root, json.loads((root / "out" / "report.json").read_text()), done.stdout)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return build(tmp_path_factory.mktemp("texts") / "b", "SequenceClassification", "--target", "ours.yaml")


@pytest.fixture(scope="module")
def tagged(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return build(
        tmp_path_factory.mktemp("words") / "b", "TokenClassification", "--target", "hf/merged", "--no-bench"
    )  # fmt: skip


def f1_by_hand(gold: list[int], predicted: list[int]) -> float:
    """Mean over the classes of `gold` of the harmonic mean of precision and recall."""
    scores = []
    for each in sorted(set(gold)):
        right = sum(a == b == each for a, b in zip(gold, predicted, strict=True))
        if not right:
            scores.append(0.0)
            continue
        precision, recall = right / predicted.count(each), right / gold.count(each)
        scores.append(2 * precision * recall / (precision + recall))
    return sum(scores) / len(scores)


def expected(built: Built, task: str) -> dict[str, Any]:
    """The test side's figures by transformers and PEFT alone. Its lines are told by the notes' counts of the split."""
    from lora2edge.texts.items import is_for_calibration
    from lora2edge.texts.labelled import LabelledReader, text_key

    names = TAGS if task == "TokenClassification" else CLASSES
    kind: Any = "token-classification" if task == "TokenClassification" else "sequence-classification"
    data = built.root / "data.jsonl"
    lines = [json.loads(line) for line in data.read_text().splitlines()]
    items = LabelledReader(names, kind).read(data)
    lines = [line for line, item in zip(lines, items, strict=True) if not is_for_calibration(text_key(item))]
    tokenizer = transformers.AutoTokenizer.from_pretrained(built.root / "base")
    inputs, gold = encode(tokenizer, lines, names)
    auto = getattr(transformers, f"AutoModelFor{task}")
    base = auto.from_pretrained(built.root / "base", dtype=torch.float32).eval()
    found: dict[str, Any] = {}
    with torch.inference_mode():
        for side in ("base", "live", "written"):
            if side == "live":
                base = PeftModel.from_pretrained(base, str(built.root / "adapter")).eval()
            if side == "written":
                folder = next((built.out / "artifacts").iterdir())
                base = auto.from_pretrained(folder, dtype=torch.float32).eval()
            logits = base(**inputs).logits.reshape(-1, 3).double()
            kept = gold.reshape(-1) != -100
            found[side] = torch.log_softmax(logits[kept], -1).numpy()
    right = gold.reshape(-1)[kept].numpy()
    nll = {side: float(-rows[np.arange(len(right)), right].mean()) for side, rows in found.items()}
    chosen = {side: rows.argmax(1).tolist() for side, rows in found.items()}
    return {
        "positions": len(right),
        "items": len(lines),
        "nll": nll,
        "accuracy": {side: float(np.mean(np.array(rows) == right)) for side, rows in chosen.items()},
        "macro_f1": {side: f1_by_hand(right.tolist(), rows) for side, rows in chosen.items()},
        "kl": float((np.exp(found["live"]) * (found["live"] - found["written"])).sum(1).mean()),
    }


@pytest.mark.parametrize("task", ["SequenceClassification", "TokenClassification"])
def test_figures_are_those_of_transformers_and_peft(task: str, request: pytest.FixtureRequest) -> None:
    built: Built = request.getfixturevalue("tagged" if task == "TokenClassification" else "texts")
    report = built.report
    wanted = expected(built, task)
    (target,) = report["targets"].values()
    quality, baseline = target["quality"], report["baseline"]
    assert (quality["positions"], quality["items"]) == (wanted["positions"], wanted["items"])
    for side, found in (("base", baseline["base"]), ("live", baseline), ("written", quality)):
        for figure in ("nll", "accuracy", "macro_f1"):
            assert found[figure] == pytest.approx(wanted[figure][side], abs=2e-6), (side, figure)
    assert baseline["gain"]["value"] == pytest.approx(wanted["nll"]["base"] - wanted["nll"]["live"], abs=2e-6)
    assert baseline["gain"]["low"] > 0 and baseline["accuracy"] > 0.6
    assert quality["kl_mean"] == pytest.approx(wanted["kl"], abs=1e-9)
    assert quality["gain_kept"]["value"] == pytest.approx(1, abs=1e-3)
    assert quality["flips"] == 0 and abs(quality["macro_f1_loss"]) < 1e-9
    check_report(report)
    assert report["merge"]["logit_error"] < 1e-5
    assert report["verdict"] == "pass" and report["exit_code"] == 0
    names = TAGS if task == "TokenClassification" else CLASSES
    assert list(quality["by_class"]) == list(names)
    classes = report["inputs"]["data"]["test"]["classes"]
    assert classes == {name: found["support"] for name, found in quality["by_class"].items()}


def test_the_report_speaks_of_classes(texts: Built, tagged: Built) -> None:
    for built, unit in ((texts, "text"), (tagged, "word")):
        page, text = ((built.out / f"report.{kind}").read_text().lower() for kind in ("html", "md"))
        for shown in (page, text, built.printed.lower()):
            assert "macro-f1" in shown
            for alien in ("perplexity", "decod", "first token", "next token", "top token", "per token", "response"):
                if alien == "perplexity" and built is texts and shown is not built.printed.lower():
                    continue  # its target has a gate on it, which is told not to apply
                assert alien not in shown, alien
        assert f"nats per {unit}" in page and "f1 by class" in page and "f1 by class" in text
        assert built.report["task"].startswith("sequence" if unit == "text" else "token")
    gates = {gate["metric"]: gate for gate in texts.report["targets"]["ours"]["gates"]}
    assert gates["ppl_ratio"]["verdict"] == "not applicable" and gates["macro_f1_loss"]["verdict"] == "pass"
    assert "not measured: it is a figure of a language model" in (texts.out / "report.md").read_text()


def test_speed_is_of_batches_of_texts(texts: Built, tagged: Built) -> None:
    target = texts.report["targets"]["ours"]
    assert list(target["scenarios"]) == ["ward"], "a scenario of language models was run"
    speed = target["speed"]
    assert speed["texts"] == {"1": 16, "4": 16} and speed["rounds"] == 2 and speed["failures"] == 0
    for side in (speed, speed["baseline"]):
        for size in ("1", "4"):
            times = side["latency_ms"][size]
            assert 0 < times["p50"] <= times["p90"] <= times["p99"] and times["n"] == 16 // int(size)
            assert side["qps"][size] > 0
    for size, ratio in speed["qps_ratio"].items():
        assert ratio["low"] <= ratio["value"] <= ratio["high"] and size in speed["latency_ratio"]
    assert "texts/s" in texts.printed.lower()
    assert tagged.report["targets"]["hf/merged"]["speed"] is None


def test_the_verbs_of_one_stage(texts: Built, lora2edge: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LORA2EDGE_CACHE", str(texts.root / "cache"))
    artifact = texts.out / "artifacts" / "ours"
    monkeypatch.chdir(texts.root)
    measured = lora2edge("measure", artifact, "--threads", "1", "--json")
    assert measured.code == 0, measured.err
    again = json.loads(measured.out)
    assert again["reused"] and again["quality"] == texts.report["targets"]["ours"]["quality"]
    shown = lora2edge("measure", artifact, "--threads", "1").out
    assert "F1 by class" in shown and "Measured earlier" in shown and "Gain kept: 100.0" in shown
    benched = lora2edge("bench", artifact, "--scenario", "ward.yaml", "--threads", "1", "--json")
    assert benched.code == 0, benched.err
    assert "latency_ms" in json.loads(benched.out)["scenarios"]["ward"]
    merged = lora2edge("merge", *texts.given, "--prove", "--threads", "1", "--out", tmp_path / "merged")
    assert merged.code == 0 and "nats per text" in merged.out, merged.err
    looked = lora2edge("inspect", artifact, "--json")
    assert json.loads(looked.out)["task"] == "sequence-classification"
    plan = lora2edge("build", *texts.given, "--target", "ours.yaml", "--plan", "--json")
    stages = {stage["stage"]: stage for stage in json.loads(plan.out)["stages"]}
    assert plan.code == 0 and stages["calibrate"]["ram_bytes"] == 0 and stages["bench"]["seconds"] == 600


def test_a_wrong_merge_ends_the_build(
    texts: Built, lora2edge: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The view gives rows of the base; its own formula check is not asked."""
    from lora2edge.adapters import MergedCheckpoint

    monkeypatch.setattr(
        MergedCheckpoint, "rows", lambda self, name, start, stop: (
            self.base if name in self.base.tensors else self
        ).rows(name, start, stop),
    )  # fmt: skip
    done = lora2edge("build", *texts.given, "--target", "hf/merged", "--out", tmp_path / "out", "--threads", "1")
    assert done.code == 3 and "merge-proof" in done.err and "logit_error" in done.err
    assert not (tmp_path / "out" / "artifacts").exists()


def test_bad_lines_and_targets_are_refused_together(texts: Built, lora2edge: Run, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "chills", "label": "cold"}\n{"prompt": "a", "response": "b"}\n')
    given = [*texts.given[:4], "--data", data, "--out", tmp_path / "out", "--json"]
    done = lora2edge("build", *given, "--target", "gguf/q8_0", "--target", "hf/merged")
    assert done.code == 2 and not (tmp_path / "out").exists()
    error = json.loads(done.out)["error"]
    codes = {each["code"] for each in error["errors"]}
    assert {"bad-line", "gguf-task"} <= codes
    told = str(error)
    assert "cold" in told and "fever, fracture, rash" in told and "needs text and label" in told
    assert "the checkpoint is for sequence-classification" in told
