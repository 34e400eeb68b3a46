"""Damaged and hostile inputs through the command line: one clear error each, and nothing else happens."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.damage import ADAPTER_WEIGHTS, CASES, WEIGHTS, Case, Folders, split_header
from tests.sandbox import Outcome, Sandbox
from tests.tiny import make_adapter, make_checkpoint

PEAK_BYTES = 600 << 20
LONGEST_SECONDS = 10
LONGEST_TEXT = 4000
"""Characters of an error: it is read on a terminal."""


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sound")
    base = make_checkpoint(root / "base", "qwen2")
    make_checkpoint(root / "sharded", "qwen2", shards=3)
    make_adapter(root / "adapter", base, targets=["q_proj", "down_proj"])
    return root


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    with Sandbox(tmp_path_factory.mktemp("cache")) as running:
        yield running


def run(sandbox: Sandbox, folders: Folders, verb: str, out: Path) -> Outcome:
    target = ["--target", "gguf/q8_0"] if verb == "lower" else []
    return sandbox.run(verb, *target, "--base", folders.base, "--adapter", folders.adapter, "--out", out)


def copies(sound: Path, root: Path, sharded: bool) -> Folders:
    return Folders(
        Path(shutil.copytree(sound / ("sharded" if sharded else "base"), root / "base")),
        Path(shutil.copytree(sound / "adapter", root / "adapter")),
    )


def check_bounds(outcome: Outcome) -> None:
    assert outcome.code in {0, 2}, (outcome.code, outcome.err[-3000:])
    assert "Traceback" not in outcome.err
    assert outcome.seconds < LONGEST_SECONDS
    assert outcome.peak_bytes < PEAK_BYTES


def check_refused(outcome: Outcome, case: Case, out: Path) -> None:
    """One error, or several that were found in one look, readable; nothing written."""
    text = outcome.err
    assert outcome.code == 2, f"it passed: {outcome.out}"
    codes = re.findall(r"^error\[([a-z0-9-]+)\]: \S", text, re.MULTILINE)
    assert codes and len(codes) <= 3, text
    assert len(re.findall(r"^  why:  \S", text, re.MULTILINE)) == len(codes), text
    assert outcome.out == ""
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f\u202a-\u202e]", text), "control characters reach the terminal"
    assert len(text) < LONGEST_TEXT, len(text)
    assert case.says in text
    assert not case.code or codes == [case.code], text
    assert not any(path.is_file() for path in out.rglob("*"))


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("verb", ["merge", "lower"])
def test_sound_pair_passes(sound: Path, sandbox: Sandbox, tmp_path: Path, verb: str, sharded: bool) -> None:
    """What every case starts from is not refused."""
    outcome = run(sandbox, copies(sound, tmp_path, sharded), verb, tmp_path / "out")
    check_bounds(outcome)
    assert outcome.code == 0, outcome.err


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_damaged(case: Case, sound: Path, sandbox: Sandbox, tmp_path: Path) -> None:
    folders = copies(sound, tmp_path, case.sharded)
    case.damage(folders)
    for verb in case.verbs:
        out = tmp_path / verb
        outcome = run(sandbox, folders, verb, out)
        check_bounds(outcome)
        if case.may_pass and outcome.code == 0:
            for name in (WEIGHTS, ADAPTER_WEIGHTS):
                now, before = (
                    split_header(Folders(root / "base", root / "adapter").file(name)) for root in (tmp_path, sound)
                )
                assert {**now[0], "__metadata__": 0} == {**before[0], "__metadata__": 0} and now[1] == before[1]
        else:
            check_refused(outcome, case, out)


def test_there_are_enough() -> None:
    assert len(CASES) >= 200
    assert len({case.name for case in CASES}) == len(CASES)
