"""Scenarios: load patterns as data, and the requests that they are made of."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from lora2edge.errors import DataError, TargetError
from lora2edge.shipped import shipped
from lora2edge.yamlfile import load_yaml, validate


class LoadPattern(BaseModel):
    """What every scenario has."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_.-]*$")
    description: str = ""
    rounds: int = Field(default=6, ge=2)
    """Rounds wanted; each has every level on both sides. The unit of the intervals."""
    warmup: int = Field(default=2, gt=0)
    """Unmeasured requests, one after the other, before the first round; one set at the top level follows."""
    max_seconds: float = Field(default=600.0, gt=0)
    """Budget of the warm-up and all rounds, both sides together; loading is not in it."""
    load_seconds: float = Field(default=1800.0, gt=0)
    """Longest time that one side may take to open."""


class Scenario(LoadPattern):
    """A closed-loop load pattern: so many requests at a time, each sent when an earlier one is done."""

    requests: int = Field(default=4, gt=0)
    """Requests per round at each level of concurrency; rounded up to a multiple of the level."""
    prompt_tokens: int | None = Field(default=None, gt=0)
    """Length that every prompt is tiled or cut to; None: prompts as they are, within the two bounds below."""
    prompt_min: int = Field(default=1, gt=0)
    """Prompts shorter than this are left out."""
    prompt_max: int = Field(default=1024, gt=0)
    """Prompts longer than this are cut to it."""
    new_tokens: int = Field(default=64, ge=2)
    """Tokens that each request generates, exactly."""
    concurrency: tuple[Annotated[int, Field(gt=0)], ...] = (1, 2, 4)
    """Levels: requests in flight at a time. Level 1 gives latencies, so it is always among them."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if 1 not in self.concurrency or len(set(self.concurrency)) != len(self.concurrency):
            raise ValueError("concurrency must hold 1, and each level once")
        if self.prompt_min > self.prompt_max:
            raise ValueError(f"prompt_min {self.prompt_min} is above prompt_max {self.prompt_max}")
        return self

    @property
    def slots(self) -> int:
        """Requests that a session must be able to hold at a time."""
        return max(self.concurrency)


class ClassifyScenario(LoadPattern):
    """A closed loop of batches of texts to a classifier: one at a time, the next when the last one is done."""

    batch_sizes: tuple[Annotated[int, Field(gt=0)], ...] = (1, 8)
    """Texts of a batch. Ascending, however they were given: reports call the first one's latency the smallest's."""
    texts: int = Field(default=64, gt=0)
    """Per round at each batch size; rounded up to whole batches."""
    tokens: int | None = Field(default=None, ge=3)
    """Length that every text is made of, its inner tokens repeated or cut; None: texts as they are."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.batch_sizes or len(set(self.batch_sizes)) != len(self.batch_sizes):
            raise ValueError("batch_sizes must hold at least one size, and each once")
        return self

    @field_validator("batch_sizes")
    @classmethod
    def _ascending(cls, sizes: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(sorted(sizes))


def load_scenario(name: str) -> Scenario | ClassifyScenario:
    """The shipped scenario `name`, or the user's file where `name` is a path. Raises TargetError.

    One with `batch_sizes` is for classifiers.
    """
    path = Path(name)
    if path.suffix in {".yaml", ".yml"}:
        return _read(path)
    known = shipped_scenarios()
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
        raise TargetError(
            "unknown-scenario",
            f"there is no scenario {name!r}",
            why="known: " + ", ".join(sorted(known)),
            hint=f"scenarios: [{close[0] if close else 'chat'}]",
        )
    return _read(known[name])


def shipped_scenarios() -> dict[str, Path]:
    """Name → file of every scenario that ships."""
    return {path.stem: path for path in sorted(shipped("scenarios").glob("*.yaml"))}


def make_requests(scenario: Scenario, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Token ids of the distinct prompts that `scenario` sends, made from the user's own test `prompts`.

    Raises DataError where no prompt fits the scenario.
    """
    if scenario.prompt_tokens is not None:
        length = scenario.prompt_tokens
        made = [list(islice(cycle(prompt), length)) for prompt in prompts if prompt]
    else:
        made = [list(prompt[: scenario.prompt_max]) for prompt in prompts if len(prompt) >= scenario.prompt_min]
    distinct = [list(ids) for ids in dict.fromkeys(tuple(ids) for ids in made)]
    if not distinct:
        longest = max((len(prompt) for prompt in prompts), default=0)
        raise DataError(
            "no-bench-prompt",
            f"no test prompt fits the scenario {scenario.name!r}",
            why=f"prompt_min is {scenario.prompt_min} tokens, the longest of {len(prompts)} prompts has {longest}",
            hint=f"prompt_tokens: {scenario.prompt_min}",
        )
    return distinct


def context_needed(scenario: Scenario, requests: Sequence[Sequence[int]]) -> int:
    """Tokens that a slot must hold: the longest prompt and its answer."""
    return max(len(ids) for ids in requests) + scenario.new_tokens


def language_scenarios(names: Sequence[str]) -> list[Scenario]:
    """Those of `names` that are for language models; `chat` where there are none."""
    found = [scenario for name in names if isinstance(scenario := load_scenario(name), Scenario)]
    if names and not found:
        chat = load_scenario("chat")
        assert isinstance(chat, Scenario)
        found = [chat]
    return found


def classify_scenarios(names: Sequence[str]) -> list[ClassifyScenario]:
    """Those of `names` that are for classifiers; `classify` where there are none: a target names `chat` by default."""
    found = [scenario for name in names if isinstance(scenario := load_scenario(name), ClassifyScenario)]
    if names and not found:
        classify = load_scenario("classify")
        assert isinstance(classify, ClassifyScenario)
        found = [classify]
    return found


def _read(path: Path) -> Scenario | ClassifyScenario:
    data: dict[str, Any] = {"name": path.stem.lower(), **load_yaml(path)}
    if "batch_sizes" in data:
        return validate(ClassifyScenario, data, str(path), "scenario-keys")
    return validate(Scenario, data, str(path), "scenario-keys")
