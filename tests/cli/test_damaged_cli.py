"""Damaged inputs to `python -m lora2edge` itself, in a fresh interpreter; all of them: tests/unit/test_damaged.py."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import Model
from tests.damage import CASES, Folders
from tests.sandbox import LIMIT_BYTES, LIMIT_SECONDS
from tests.tiny import make_checkpoint

PEAK_BYTES = 600 << 20
SAMPLE = {
    "truncated-model.safetensors-h/2": "base",
    "header-length-model.safetensors-2^63": "base",
    "entry-model.safetensors-offsets-beyond": "base",
    "entry-adapter_model.safetensors-shape-huge-power": "adapter",
    "header-adapter_model.safetensors-tensor-twice": "adapter",
    "name-adapter_model.safetensors-escape-codes": "adapter",
    "json-config.json-deep": "base",
    "json-tokenizer.json-bomb": "base",
    "json-adapter_config.json-not-utf-8": "adapter",
    "node-config.json-pipe": "base",
    "node-model.safetensors-pipe": "base",
    "node-adapter_config.json-terabyte-of-zeros": "adapter",
    "index-passwd": "base",
    "index-surrogate": "base",
    "index-long-name": "base",
    "shards-twin": "base",
    "value-config.json-hidden_size-1000000000000": "base",
    "value-adapter_config.json-r-1000000000": "adapter",
    "value-adapter_config.json-lora_alpha-Infinity": "adapter",
    "regex-rank_pattern-0": "adapter",
    "tokenizer-id-10000000": "base",
    "folder-base-loop": "base",
}
"""Case → the folder that `inspect` is asked about."""
FOUND = {case.name: case for case in CASES}


def run(log: Path, *arguments: str | Path) -> tuple[int, str, str, int]:
    """Exit code (minus 14: too slow), standard output, standard error, and the largest resident memory in bytes."""

    log.mkdir()
    limited = [sys.executable, Path(__file__).with_name("limited.py"), log, LIMIT_BYTES, LIMIT_SECONDS]
    command = [*limited, sys.executable, "-m", "lora2edge", *arguments]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True)
    code, peak = json.loads(done.stdout)
    return code, (log / "out").read_text(), (log / "err").read_text(), peak


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("sharded") / "base", hidden=256, intermediate=256, shards=3)


@pytest.mark.parametrize("name", SAMPLE)
def test_damaged(name: str, model: Model, sharded: Path, tmp_path: Path) -> None:
    case = FOUND[name]
    folders = Folders(
        Path(shutil.copytree(sharded if case.sharded else model.base, tmp_path / "base")),
        Path(shutil.copytree(model.adapter, tmp_path / "adapter")),
    )
    case.damage(folders)
    out = tmp_path / "out"
    options = ["--base", folders.base, "--adapter", folders.adapter, "--out", out]
    code, shown, told, peak = run(tmp_path / "merge", "merge", *options)
    assert code == 2, told
    assert told.startswith("error[") and "Traceback" not in told and shown == ""
    assert peak < PEAK_BYTES
    assert not out.exists()
    code, shown, told, peak = run(tmp_path / "inspect", "inspect", "--json", getattr(folders, SAMPLE[name]))
    assert code == 2 and told == ""
    assert json.loads(shown)["error"]["code"]
    assert peak < PEAK_BYTES
