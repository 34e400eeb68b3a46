from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peft import IA3Config

from lora2edge.adapters.kinds import ia3
from lora2edge.errors import AdapterError
from tests.unit.adapters.kinds.live import (
    LINEAR,
    assert_same_as_live,
    edit_config,
    read_parts,
    save_adapter,
)

SETTINGS: dict[str, dict[str, Any]] = {
    "outputs": {"feedforward_modules": []},
    "inputs": {"feedforward_modules": LINEAR},
    "both": {"feedforward_modules": ["down_proj", "o_proj"]},
    "by-model-type": {"target_modules": None, "feedforward_modules": None},
    "ends": {"target_modules": ["mlp.up_proj", "q_proj"], "feedforward_modules": ["mlp.up_proj"]},
    "regex": {"target_modules": r".*(q_proj|down_proj|up_proj)", "feedforward_modules": r".*layers\.1\.mlp\..*"},
    "training-only": {"feedforward_modules": ["down_proj"], "init_ia3_weights": False},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_same_as_live(setting: str, base: Path, tmp_path: Path) -> None:
    config = IA3Config(**{"target_modules": LINEAR, "task_type": "CAUSAL_LM", **SETTINGS[setting]})
    assert_same_as_live(ia3.read, base, save_adapter(tmp_path / "adapter", base, config))


@pytest.mark.parametrize("feedforward", [["mlp.c_proj"], r".*\.c_(attn|fc)"], ids=["names", "regex"])
def test_conv1d(feedforward: Any, gpt2: Path, tmp_path: Path) -> None:
    targets = r".*\.(c_attn|c_fc|mlp\.c_proj)" if isinstance(feedforward, str) else ["c_attn", "c_fc", "mlp.c_proj"]
    config = IA3Config(target_modules=targets, feedforward_modules=feedforward, fan_in_fan_out=True)
    assert_same_as_live(ia3.read, gpt2, save_adapter(tmp_path / "adapter", gpt2, config))


def test_biases_are_scaled_with_the_outputs(base: Path, tmp_path: Path) -> None:
    config = IA3Config(target_modules=["q_proj", "o_proj", "down_proj"], feedforward_modules=["down_proj"])
    parts = read_parts(ia3.read, save_adapter(tmp_path / "adapter", base, config))
    first = {(part.module.rpartition(".")[2], part.parameter) for part in parts if ".0." in part.module}
    assert first == {
        ("q_proj", "weight"), ("q_proj", "bias"), ("o_proj", "weight"), ("o_proj", "bias"), ("down_proj", "weight"),
    }  # fmt: skip
    bias = next(part for part in parts if part.parameter == "bias")
    assert bias.misfit((64,)) is None
    assert "64 factors, the base 32" in str(bias.misfit((32,)))


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    config = IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"])
    return save_adapter(tmp_path / "adapter", base, config)


@pytest.mark.parametrize("names", [[], ["q_proj"], "no.*", ".*"])
def test_other_feedforward_modules(names: Any, adapter: Path) -> None:
    with pytest.raises(AdapterError, match=r"which scales its (inputs|outputs)") as error:
        read_parts(ia3.read, edit_config(adapter, feedforward_modules=names))
    assert error.value.code == "adapter-shape"


def test_the_shape_tells_where_the_configuration_does_not(adapter: Path, base: Path) -> None:
    assert_same_as_live(ia3.read, base, edit_config(adapter, feedforward_modules=None))


def test_a_broken_regex(adapter: Path) -> None:
    with pytest.raises(AdapterError) as error:
        read_parts(ia3.read, edit_config(adapter, feedforward_modules="(q_proj"))
    assert error.value.code == "bad-adapter-config"
