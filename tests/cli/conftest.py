"""The command line in this process: exit code and output of `lora2edge ARGUMENTS`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from lora2edge.cli import main
from tests.tiny import make_adapter, make_checkpoint, make_data


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Model:
    """A tiny base, an adapter for it, and data."""

    base: Path
    adapter: Path
    data: Path


@pytest.fixture
def lora2edge(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    def run(*arguments: str | Path) -> Outcome:
        monkeypatch.setattr("sys.argv", ["lora2edge", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        captured = capsys.readouterr()
        code = stopped.value.code
        return Outcome(code if isinstance(code, int) else 0, captured.out, captured.err)

    return run


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("LORA2EDGE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    root = tmp_path_factory.mktemp("model")
    base = make_checkpoint(root / "base", hidden=256, intermediate=256)
    return Model(base, make_adapter(root / "adapter", base), make_data(root / "data.jsonl", 60))
