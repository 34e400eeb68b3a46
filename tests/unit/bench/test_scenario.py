from __future__ import annotations

from pathlib import Path

import pytest

from lora2edge.bench.scenario import (
    Scenario,
    context_needed,
    load_scenario,
    make_requests,
    shipped_scenarios,
)
from lora2edge.errors import DataError, TargetError


def test_every_shipped_scenario_loads() -> None:
    assert "chat" in shipped_scenarios()
    for name in shipped_scenarios():
        assert load_scenario(name).name == name
    assert load_scenario("chat").concurrency == (1, 2, 4)


def test_the_users_own_file_is_named_after_itself(tmp_path: Path) -> None:
    path = tmp_path / "ward.yaml"
    path.write_text("new_tokens: 8\nconcurrency: [1, 8]\n")
    scenario = load_scenario(str(path))
    assert scenario.name == "ward" and scenario.slots == 8


def test_all_wrong_keys_are_refused_together(tmp_path: Path) -> None:
    path = tmp_path / "ward.yaml"
    path.write_text("new_token: 8\nrounds: 0\n")
    with pytest.raises(TargetError) as caught:
        load_scenario(str(path))
    assert caught.value.code == "scenario-keys"
    assert "new_token" in caught.value.why and "rounds" in caught.value.why


@pytest.mark.parametrize("text", ["concurrency: [2, 4]", "concurrency: [1, 1]", "prompt_min: 9\nprompt_max: 3"])
def test_what_makes_no_sense_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "ward.yaml"
    path.write_text(text)
    with pytest.raises(TargetError):
        load_scenario(str(path))


def test_an_unknown_name_gets_a_proposal() -> None:
    with pytest.raises(TargetError) as caught:
        load_scenario("chatt")
    assert caught.value.code == "unknown-scenario" and "chat" in caught.value.hint


def test_a_missing_file_is_an_input_error() -> None:
    with pytest.raises(TargetError):
        load_scenario("/no/such/file.yaml")


def test_prompts_are_tiled_and_cut_to_the_stated_length() -> None:
    scenario = Scenario(name="s", prompt_tokens=5, new_tokens=3)
    requests = make_requests(scenario, [[1, 2], [1, 2, 3, 4, 5, 6], []])
    assert requests == [[1, 2, 1, 2, 1], [1, 2, 3, 4, 5]]
    assert context_needed(scenario, requests) == 8


def test_prompts_within_bounds_are_kept_once() -> None:
    scenario = Scenario(name="s", prompt_min=2, prompt_max=3)
    assert make_requests(scenario, [[1], [1, 2], [1, 2], [1, 2, 3, 4]]) == [[1, 2], [1, 2, 3]]


def test_no_prompt_that_fits_is_an_error_with_both_numbers() -> None:
    with pytest.raises(DataError) as caught:
        make_requests(Scenario(name="s", prompt_min=50), [[1, 2, 3]])
    assert "50" in caught.value.why and "3" in caught.value.why
