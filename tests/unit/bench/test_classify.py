"""The bench of classifiers, with real child processes around one that sleeps."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from lora2edge.bench.batches import make_texts, run_batches
from lora2edge.bench.classify import ClassifySpeed, bench_classifier
from lora2edge.bench.process import Command
from lora2edge.bench.scenario import ClassifyScenario, classify_scenarios, language_scenarios, load_scenario
from lora2edge.contracts import Encoded
from lora2edge.errors import DataError, Lora2EdgeError, TargetError
from lora2edge.progress import SILENT
from lora2edge.report.schema import ClassifierSpeed
from tests.unit.bench.fake_worker import SleepingClassifier

ROOT = Path(__file__).resolve().parents[3]
WORKER = ROOT / "tests/unit/bench/fake_worker.py"
TEXTS = [Encoded((2, 7, 3)), Encoded((2, 7, 8, 3), (0, 0, 1, 1)), Encoded((2, 9, 9, 9, 9, 3))]
SMALL = ClassifyScenario(name="small", batch_sizes=(1, 4), texts=6, rounds=3, warmup=1, max_seconds=60)


def measure(baseline: dict[str, Any], artifact: dict[str, Any], scenario: ClassifyScenario = SMALL) -> ClassifySpeed:
    commands = [
        Command((sys.executable, str(WORKER), json.dumps(options)), {"PYTHONPATH": str(ROOT)})
        for options in (baseline, artifact)
    ]
    return bench_classifier(*commands, TEXTS, scenario, SILENT)


def test_an_artifact_twice_as_slow_has_half_the_speed() -> None:
    result = measure({"batch_ms": 40}, {"batch_ms": 80})
    for ratio in (*result.qps_ratio.values(), *result.latency_ratio.values()):
        assert ratio is not None and ratio.low is not None and ratio.high is not None
        assert ratio.low <= ratio.value <= ratio.high and 0.38 < ratio.value < 0.65
    data = json.loads(json.dumps(result.to_json()))
    ClassifierSpeed.model_validate(data)
    # Whole batches: 6 texts are 6 of one, and 8 in two of four.
    assert data["texts"] == {"1": 18, "4": 24} and data["latency_ms"]["4"]["n"] == 6
    assert data["latency_ms"]["1"]["p50"] == pytest.approx(80, rel=0.3)
    assert data["qps"]["4"] / data["qps"]["1"] == pytest.approx(4, rel=0.3)
    assert data["order"] == ["baseline artifact", "artifact baseline", "baseline artifact"] and data["failures"] == 0
    assert data["tokens"] == [3, 4, 6] and data["memory_ratio"] is not None


def test_a_run_that_fails_is_no_pair() -> None:
    result = measure({"batch_ms": 5}, {"batch_ms": 5, "fail_at": 4})
    assert result.artifact.failures == 1 and result.baseline.failures == 0
    assert "no memory for the batch" in result.artifact.failure_reasons[0]
    assert result.texts["1"] == 12 and result.texts["4"] == 24
    assert any("failed" in note for note in result.notes)


def test_nothing_but_failures_is_an_error() -> None:
    with pytest.raises(Lora2EdgeError) as caught:
        measure({"batch_ms": 5}, {"batch_ms": 5, "gives": 9})
    assert caught.value.code == "bench-no-round" and "gave 9 answers to 1 texts" in caught.value.why


def test_other_devices_are_not_compared_in_memory() -> None:
    result = measure({"batch_ms": 5}, {"batch_ms": 5, "device": "cuda"})
    assert result.memory_ratio is None and any("compare the devices" in note for note in result.notes)


def test_the_time_is_kept() -> None:
    run = run_batches(SleepingClassifier({"batch_ms": 30}), TEXTS * 40, batch_size=2, max_seconds=0.2)
    assert run.cut_off and 2 <= len(run.batch_ms) < 20 and run.wall_s < 1


def test_the_smallest_batch_comes_first() -> None:
    """The report's latency is that of the first size."""
    assert ClassifyScenario(name="s", batch_sizes=(8, 1, 4)).batch_sizes == (1, 4, 8)


def test_texts_of_a_wanted_length_keep_their_ends() -> None:
    scenario = ClassifyScenario(name="s", tokens=5)
    assert [text.ids for text in make_texts(scenario, TEXTS)] == [(2, 7, 7, 7, 3), (2, 7, 8, 7, 3), (2, 9, 9, 9, 3)]
    assert make_texts(SMALL, [*TEXTS, TEXTS[0]]) == TEXTS
    with pytest.raises(DataError):
        make_texts(scenario, [Encoded((2, 3))])


def test_each_task_takes_its_own_scenarios(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("batch_sizes: [2]\n")
    assert [each.name for each in classify_scenarios(["chat"])] == ["classify"]
    assert [each.name for each in classify_scenarios(["chat", str(own)])] == ["own"]
    assert [each.name for each in language_scenarios(["chat", str(own)])] == ["chat"]
    assert [each.name for each in language_scenarios([str(own)])] == ["chat"]
    assert classify_scenarios([]) == [] == language_scenarios([])
    shipped = load_scenario("classify")
    assert isinstance(shipped, ClassifyScenario) and shipped.batch_sizes == (1, 8)


@pytest.mark.parametrize(
    "text", ["batch_sizes: []", "batch_sizes: [1, 1]", "batch_sizes: [0]", "batch_sizes: [1]\nrequests: 4"]
)
def test_a_scenario_that_is_wrong(tmp_path: Path, text: str) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(text)
    with pytest.raises(TargetError) as caught:
        load_scenario(str(path))
    assert caught.value.code == "scenario-keys"
