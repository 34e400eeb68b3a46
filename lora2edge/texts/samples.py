"""The calibration and test samples of a build: chosen fairly, within a budget, never the same prompt in both."""

from __future__ import annotations

import collections
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from lora2edge.contracts import AnySample, Item, Sample
from lora2edge.errors import DataError
from lora2edge.recipe import DataFiles
from lora2edge.storage import digest
from lora2edge.texts.coverage import describe_coverage, find_overlap
from lora2edge.texts.items import prompt_key, read_items, split_items
from lora2edge.texts.renderer import Renderer

T = TypeVar("T", bound=AnySample)
_LABEL_VALUES = 24


@dataclass(frozen=True, slots=True)
class Texts(Generic[T]):
    """What a build is calibrated with and measured on: `Sample`s, or a classifier's `LabelledSample`s."""

    calibration: list[T]
    test: list[T]
    notes: Mapping[str, Any] = field(default_factory=dict)
    """JSON-ready: per side items, tokens, scored positions, counts per label; what was dropped, and why."""


def load_texts(
    data: DataFiles | str, renderer: Renderer, *, max_length: int, calibration_tokens: int, test_tokens: int
) -> Texts[Sample]:
    """Reads, splits, tokenizes and selects.

    A calibration item whose prompt is also a test prompt is dropped, and so are repeated items and samples of more
    than `max_length` tokens (nothing is cut); all are counted in the notes. Items are taken in the order of a
    hash, so that a budget (`calibration_tokens` tokens, `test_tokens` scored positions) cuts a fair sample that is
    the same in every run; the last item taken may exceed it. Raises DataError where a side has no sample left.
    """
    if isinstance(data, str):
        source, items = data, read_items(Path(data))
        calibration, test = split_items(items)
    else:
        source = data.test
        calibration, test = read_items(Path(data.calibration)), read_items(Path(data.test))
    test, test_repeated = _unique(test)
    calibration, repeated = _unique(calibration)
    tested = {prompt_key(item) for item in test}
    kept = [item for item in calibration if prompt_key(item) not in tested]
    sides = {}
    notes: dict[str, Any] = {}
    for side, pool, budget in (("calibration", kept, calibration_tokens), ("test", test, test_tokens)):
        samples, too_long = _select(pool, renderer, max_length, budget, scored=side == "test")
        if not samples:
            raise none_left(side, source, len(pool), too_long, max_length)
        sides[side] = samples
        notes[side] = {**_describe(samples), "available": len(pool), "too_long": too_long}
    notes["calibration"]["repeated"] = repeated
    notes["test"]["repeated"] = test_repeated
    notes["calibration"]["also_in_test"] = len(calibration) - len(kept)
    notes["test"]["in_calibration"] = find_overlap(sides["calibration"], sides["test"])
    return Texts(sides["calibration"], sides["test"], notes)


def load_calibration(
    data: DataFiles | str, renderer: Renderer, *, max_length: int, calibration_tokens: int
) -> Texts[Sample]:
    """All of `data` (of two files, the calibration file) as calibration samples, for work that measures nothing
    on held-out text. Selected as in `load_texts`; `test` is empty. Raises DataError where no sample is left.
    """
    source = data if isinstance(data, str) else data.calibration
    items, repeated = _unique(read_items(Path(source)))
    samples, too_long = _select(items, renderer, max_length, calibration_tokens, scored=False)
    if not samples:
        raise none_left("calibration", source, len(items), too_long, max_length)
    notes = {**_describe(samples), "available": len(items), "too_long": too_long, "repeated": repeated}
    return Texts(samples, [], {"calibration": notes})


def write_samples(path: Path, samples: Iterable[Sample]) -> None:
    """One JSON object a line: ids, prompt_length, messages, labels."""
    with path.open("w", encoding="utf-8") as file:
        for sample in samples:
            file.write(json.dumps(_sample_json(sample), ensure_ascii=False) + "\n")


def read_samples(path: Path) -> list[Sample]:
    """What `write_samples` wrote."""
    found = []
    with path.open(encoding="utf-8") as file:
        for line in file:
            data = json.loads(line)
            item = Item(tuple(data["messages"]), data["labels"])
            found.append(Sample(tuple(data["ids"]), data["prompt_length"], item))
    return found


def samples_digest(samples: Iterable[Sample]) -> str:
    """sha256 over all samples, hex: what figures over them are keyed by."""
    return digest([_sample_json(sample) for sample in samples])


def _sample_json(sample: Sample) -> dict[str, Any]:
    return {
        "ids": list(sample.ids),
        "prompt_length": sample.prompt_length,
        "messages": [dict(message) for message in sample.item.messages],
        "labels": dict(sample.item.labels),
    }


def _unique(items: Sequence[Item]) -> tuple[list[Item], int]:
    """The items in the order of their hashes, without repetitions, and how many repetitions there were."""
    found = {digest([dict(message) for message in item.messages]): item for item in items}
    return [found[key] for key in sorted(found)], len(items) - len(found)


def _select(
    items: Sequence[Item], renderer: Renderer, max_length: int, budget: int, *, scored: bool
) -> tuple[list[Sample], int]:
    """Samples until the budget is used up, and how many of those looked at were too long."""
    samples: list[Sample] = []
    too_long = used = 0
    for item in items:
        if used >= budget:
            break
        sample = renderer.sample(item)
        if len(sample.ids) > max_length:
            too_long += 1
            continue
        samples.append(sample)
        used += len(sample.positions) if scored else len(sample.ids)
    return samples, too_long


def _describe(samples: Sequence[Sample]) -> dict[str, Any]:
    return {
        "items": len(samples),
        "tokens": sum(len(sample.ids) for sample in samples),
        "positions": sum(len(sample.positions) for sample in samples),
        **describe_coverage(samples),
        "labels": count_labels(samples),
    }


def count_labels(samples: Sequence[AnySample]) -> dict[str, dict[str, int]]:
    """Samples of each value of the labels that have at most 24 values."""
    values: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for sample in samples:
        for label, value in sample.item.labels.items():
            values[label][value] += 1
    return {
        label: dict(sorted(counts.items())) for label, counts in sorted(values.items()) if len(counts) <= _LABEL_VALUES
    }


def none_left(side: str, source: str, available: int, too_long: int, max_length: int) -> DataError:
    """The error where a side of the split has no sample."""
    why = (
        f"all {too_long} are longer than {max_length} tokens"
        if too_long
        else "20 % of the prompts of one data file are for the test, chosen by a hash: here all fell on one side"
        if available == 0
        else "no token was asked for"
    )
    return DataError(
        f"no-{side}-text",
        f"{source} leaves no {side} sample",
        why=why,
        hint="give more, shorter or separate items, or two files in a recipe: `data: {calibration: A, test: B}`",
    )
