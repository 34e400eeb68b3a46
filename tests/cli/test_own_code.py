"""A base that comes with code of its own: run only where the user says so."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Outcome
from tests.tiny import make_adapter, make_checkpoint, make_data

CODE = """
import pathlib

from transformers import LlamaConfig, LlamaForCausalLM

pathlib.Path({mark!r}).touch()


class MineConfig(LlamaConfig):
    model_type = "mine"


class MineForCausalLM(LlamaForCausalLM):
    config_class = MineConfig
"""


@pytest.fixture
def given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str | Path]:
    """Options of a build whose base has its own architecture; its code leaves a mark when it is run."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    base = make_checkpoint(tmp_path / "base", arch="llama", tied=False)
    adapter = make_adapter(tmp_path / "adapter", base)
    (base / "modeling_mine.py").write_text(CODE.format(mark=str(tmp_path / "ran")))
    config = json.loads((base / "config.json").read_text())
    config |= {
        "model_type": "mine",
        "architectures": ["MineForCausalLM"],
        "auto_map": {"AutoConfig": "modeling_mine.MineConfig", "AutoModelForCausalLM": "modeling_mine.MineForCausalLM"},
    }
    (base / "config.json").write_text(json.dumps(config))
    data = make_data(tmp_path / "data.jsonl", 30)
    return ["--base", base, "--adapter", adapter, "--data", data]


def test_it_is_never_run_unasked(given: list[str | Path], tmp_path: Path, lora2edge: Callable[..., Outcome]) -> None:
    refused = lora2edge("build", *given, "--target", "hf/merged", "--out", tmp_path / "out", "--json")
    assert refused.code == 2 and json.loads(refused.out)["error"]["code"] == "custom-code"
    merged = lora2edge("merge", *given[:4], "--out", tmp_path / "merged")
    assert merged.code == 0, merged.err
    assert (tmp_path / "merged" / "modeling_mine.py").is_file()
    assert not (tmp_path / "ran").exists()


def test_it_is_run_where_the_user_trusts_it(
    given: list[str | Path], tmp_path: Path, lora2edge: Callable[..., Outcome]
) -> None:
    out = tmp_path / "out"
    built = lora2edge(
        "build", *given, "--target", "hf/merged", "--out", out, "--trust-remote-code", "--no-bench", "--json"
    )
    assert built.code == 0, built.err + built.out
    assert (tmp_path / "ran").exists()
    report = json.loads(built.out)
    assert report["merge"]["math_kl"] <= 1e-9
    quality = report["targets"]["hf/merged"]["quality"]
    assert quality["kl_mean"] < 3 * report["merge"]["floor_kl"]
    assert "trust_remote_code: true" in (out / "recipe.resolved.yaml").read_text()
