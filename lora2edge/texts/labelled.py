"""A classifier's data: lines with a class, or with words and a class each; read, split and encoded as other texts."""

from __future__ import annotations

import collections
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lora2edge.contracts import Encoded, LabelledItem, LabelledSample, Task
from lora2edge.recipe import DataFiles
from lora2edge.storage import digest
from lora2edge.texts.coverage import find_overlap, guess_script
from lora2edge.texts.encoder import TextEncoder
from lora2edge.texts.items import check_string, is_for_calibration, read_lines, short_fields
from lora2edge.texts.samples import Texts, count_labels, none_left

UNSCORED = -100
"""The label of a word that is not scored, as in transformers."""
_NAMES_SHOWN = 12


class LabelledReader:
    """Reads the lines of one classifier's data: knows its `names`, and whether texts or tokens are classified."""

    def __init__(self, names: Sequence[str], task: Task) -> None:
        self.names = tuple(names)
        self._index = {name: index for index, name in enumerate(self.names)}
        self._words = task == "token-classification"
        # Where the names are numbers, but not the indices (1 to 5 stars), a bare number may mean either.
        self._numbers_are_clear = all(not _is_number(name) or int(name) == index for name, index in self._index.items())

    @property
    def hint(self) -> str:
        """A line as it should be."""
        first, last = (json.dumps(self.names[index], ensure_ascii=False) for index in (0, -1))
        if self._words:
            return f'a line looks like {{"tokens": ["…", "…"], "labels": [{first}, {last}]}}'
        return f'a line looks like {{"text": "…", "label": {first}}}, with a second text as "text_pair"'

    def read(self, path: Path) -> list[LabelledItem]:
        """The lines of a JSONL file. Raises DataError as `read_items` does; an unknown class names the known ones."""
        return read_lines(path, self._item, self.hint)

    def _item(self, line: Any) -> LabelledItem:
        if not isinstance(line, dict):
            raise ValueError(f"a line must be an object, this is a {type(line).__name__}")
        wanted = ("tokens", "labels") if self._words else ("text", "label")
        if any(key not in line for key in wanted):
            keys = ", ".join(sorted(map(str, line))) or "none"
            raise ValueError(f"needs {' and '.join(wanted)}; its keys: {keys}")
        return self._tagged(line) if self._words else self._text(line)

    def _text(self, line: Mapping[str, Any]) -> LabelledItem:
        text, pair = check_string(line["text"], "text"), line.get("text_pair")
        if pair is not None:
            check_string(pair, "text_pair")
        if not f"{text}{pair or ''}".strip():
            raise ValueError("the text is empty")
        gold = (self._class(line["label"]),)
        return LabelledItem(gold, text, pair, labels=short_fields(line, {"text", "text_pair", "label"}))

    def _tagged(self, line: Mapping[str, Any]) -> LabelledItem:
        words, labels = line["tokens"], line["labels"]
        if not isinstance(words, list) or not isinstance(labels, list):
            raise ValueError("tokens and labels must be lists, one label for each word")
        if len(words) != len(labels):
            raise ValueError(f"{len(words)} tokens and {len(labels)} labels: every word needs one")
        if not words:
            raise ValueError("tokens is empty")
        checked = tuple(check_string(word, f"tokens[{index}]") for index, word in enumerate(words))
        gold = tuple(
            None if label == UNSCORED and not isinstance(label, bool) else self._class(label) for label in labels
        )
        return LabelledItem(gold, words=checked, labels=short_fields(line, {"tokens", "labels"}))

    def _class(self, value: Any) -> int:
        """The index of a class that is given by name or index."""
        if isinstance(value, str) and value in self._index:
            return self._index[value]
        if isinstance(value, int) and not isinstance(value, bool):
            if not self._numbers_are_clear:
                raise ValueError(f"the label {value} may be an index or a name; write the name, quoted: {self._known}")
            if 0 <= value < len(self.names):
                return value
        shown = json.dumps(value, ensure_ascii=False)[:80]
        raise ValueError(f"the label {shown} is none of the classes in config.json: {self._known}")

    @property
    def _known(self) -> str:
        more = len(self.names) - _NAMES_SHOWN
        return ", ".join(self.names[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")


def load_labelled(
    data: DataFiles | str,
    reader: LabelledReader,
    encoder: TextEncoder,
    *,
    max_length: int,
    calibration_tokens: int,
    test_tokens: int,
) -> Texts[LabelledSample]:
    """Reads, splits, encodes and selects, as `load_texts` does; a text is on one side only, whatever its label.

    A budget counts tokens of the calibration side, and of the test side what is scored: texts, or words. The notes
    have `classes`, how many of these each class has. Raises DataError where a side has no sample left.
    """
    if isinstance(data, str):
        source, items = data, reader.read(Path(data))
        calibration = [item for item in items if is_for_calibration(text_key(item))]
        test = [item for item in items if not is_for_calibration(text_key(item))]
    else:
        source = data.test
        calibration, test = reader.read(Path(data.calibration)), reader.read(Path(data.test))
    test, test_repeated = _unique(test)
    calibration, repeated = _unique(calibration)
    tested = {text_key(item) for item in test}
    kept = [item for item in calibration if text_key(item) not in tested]
    sides, notes = {}, {}
    for side, pool, budget in (("calibration", kept, calibration_tokens), ("test", test, test_tokens)):
        samples, dropped = _select(pool, encoder, max_length, budget, scored=side == "test")
        if not samples:
            raise none_left(side, source, len(pool), dropped["too_long"], max_length)
        sides[side] = samples
        notes[side] = {**_describe(samples, reader.names), "available": len(pool), **dropped}
    notes["calibration"]["repeated"] = repeated
    notes["test"]["repeated"] = test_repeated
    notes["calibration"]["also_in_test"] = len(calibration) - len(kept)
    notes["test"]["in_calibration"] = find_overlap(sides["calibration"], sides["test"])
    return Texts(sides["calibration"], sides["test"], notes)


def load_labelled_calibration(
    data: DataFiles | str, reader: LabelledReader, encoder: TextEncoder, *, max_length: int, calibration_tokens: int
) -> Texts[LabelledSample]:
    """All of `data` (of two files, the calibration file) as calibration samples, for work that measures nothing."""
    source = data if isinstance(data, str) else data.calibration
    items, repeated = _unique(reader.read(Path(source)))
    samples, dropped = _select(items, encoder, max_length, calibration_tokens, scored=False)
    if not samples:
        raise none_left("calibration", source, len(items), dropped["too_long"], max_length)
    notes = {**_describe(samples, reader.names), "available": len(items), **dropped, "repeated": repeated}
    return Texts(samples, [], {"calibration": notes})


def text_key(item: LabelledItem) -> str:
    """sha256 of the text, hex, whatever its label; texts that differ in spacing or case only are the same."""
    parts = [" ".join(item.words)] if item.words else [item.text, item.pair or ""]
    return digest([" ".join(part.casefold().split()) for part in parts])


def write_labelled(path: Path, samples: Iterable[LabelledSample]) -> None:
    """One JSON object a line."""
    with path.open("w", encoding="utf-8") as file:
        for sample in samples:
            file.write(json.dumps(_to_json(sample), ensure_ascii=False) + "\n")


def read_labelled(path: Path) -> list[LabelledSample]:
    """What `write_labelled` wrote."""
    with path.open(encoding="utf-8") as file:
        return [_from_json(json.loads(line)) for line in file]


def labelled_digest(samples: Iterable[LabelledSample]) -> str:
    """sha256 over all samples, hex: what figures over them are keyed by."""
    return digest([_to_json(sample) for sample in samples])


def _unique(items: Sequence[LabelledItem]) -> tuple[list[LabelledItem], int]:
    """The items in the order of their hashes, without repetitions, and how many repetitions there were."""
    found = {digest([item.text, item.pair, list(item.words), list(item.gold)]): item for item in items}
    return [found[key] for key in sorted(found)], len(items) - len(found)


def _select(
    items: Sequence[LabelledItem], encoder: TextEncoder, max_length: int, budget: int, *, scored: bool
) -> tuple[list[LabelledSample], dict[str, int]]:
    """Samples until the budget is used up, and what of those looked at was left out."""
    samples: list[LabelledSample] = []
    dropped = {"too_long": 0, "unscored": 0}
    used = 0
    for item in items:
        if used >= budget:
            break
        sample = encoder.sample(item)
        if len(sample.ids) > max_length:
            dropped["too_long"] += 1
        elif not sample.positions:
            dropped["unscored"] += 1
        else:
            samples.append(sample)
            used += len(sample.positions) if scored else len(sample.ids)
    return samples, dropped


def _describe(samples: Sequence[LabelledSample], names: Sequence[str]) -> dict[str, Any]:
    lengths = sorted(len(sample.ids) for sample in samples)
    counts = collections.Counter(target for sample in samples for target in sample.targets)
    languages = collections.Counter(
        guess_script("".join((sample.item.text, sample.item.pair or "", *sample.item.words))) for sample in samples
    )
    return {
        "items": len(samples),
        "tokens": sum(lengths),
        "positions": sum(len(sample.positions) for sample in samples),
        "classes": {name: counts[index] for index, name in enumerate(names)},
        "lengths": [lengths[0], lengths[len(lengths) // 2], lengths[-1]],
        "languages": dict(sorted(languages.items())),
        "languages_from": "the script",
        "labels": count_labels(samples),
    }


def _to_json(sample: LabelledSample) -> dict[str, Any]:
    item = sample.item
    return {
        "ids": list(sample.encoded.ids),
        "types": list(sample.encoded.types),
        "positions": list(sample.positions),
        "targets": list(sample.targets),
        "text": item.text,
        "pair": item.pair,
        "words": list(item.words),
        "gold": list(item.gold),
        "labels": dict(item.labels),
    }


def _from_json(data: Mapping[str, Any]) -> LabelledSample:
    item = LabelledItem(tuple(data["gold"]), data["text"], data["pair"], tuple(data["words"]), data["labels"])
    encoded = Encoded(tuple(data["ids"]), tuple(data["types"]))
    return LabelledSample(encoded, tuple(data["positions"]), tuple(data["targets"]), item)


def _is_number(name: str) -> bool:
    return name.isascii() and name.isdigit()
