"""Adapters that must be refused, each by name, and the scales against PEFT's own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lora2edge.adapters import read_adapter
from lora2edge.adapters.kinds.lora import LowRank
from lora2edge.errors import AdapterError, Refusals
from tests.tiny import make_adapter, make_checkpoint

Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("read")
    base = make_checkpoint(root / "base", "qwen2")
    return base, make_adapter(root / "adapter", base)


@pytest.fixture
def adapter(made: tuple[Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(made[1], tmp_path / "adapter"))


def edit_config(adapter: Path, **changes: Any) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(adapter: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = adapter / "adapter_model.safetensors"
    weights = load_file(path)
    edit(weights)
    save_file(weights, path)


def refused(adapter: Path) -> AdapterError:
    with pytest.raises(AdapterError) as error:
        read_adapter(adapter)
    assert error.value.what
    assert error.value.why
    return error.value


def test_scales_are_those_of_peft(made: tuple[Path, Path], tmp_path: Path) -> None:
    patterns = {
        "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.down_proj": 6, "proj": 9},
        "alpha_pattern": {"^model.layers.0.self_attn.k_proj": 32, "o_proj": 1, r".*\.0\..*up_proj": 3, "_proj": 7},
    }
    for rslora in (False, True):
        folder = make_adapter(tmp_path / f"{rslora}", made[0], r=4, alpha=10, use_rslora=rslora, **patterns)
        read = read_adapter(folder)
        live = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(made[0]), folder)
        modules = dict(live.base_model.model.named_modules())
        assert len(read.parts) == 14
        pairs = [part for part in read.parts.values() if isinstance(part, LowRank)]
        for pair in pairs:
            assert pair.scale == pytest.approx(modules[pair.module].scaling["default"]), pair.module
            assert pair.rank == modules[pair.module].r["default"]
        assert len({pair.scale for pair in pairs}) >= 4


def test_what_the_adapter_names(adapter: Path, made: tuple[Path, Path]) -> None:
    edit_config(adapter, revision="v1.5")
    read = read_adapter(adapter)
    assert (read.base_model_name_or_path, read.revision) == (str(made[0]), "v1.5")
    assert read.path == adapter
    assert set(read.file_hashes()) == {"adapter_config.json", "adapter_model.safetensors"}


@pytest.mark.parametrize(
    ("setting", "word"),
    [
        ({"bias": "of_next_year"}, "bias"),
        ({"bias": "oft_only"}, "bias"),
        ({"layer_replication": [[0, 1], [0, 2]]}, "layer_replication"),
        ({"use_qalora": True}, "use_qalora"),
        ({"alora_invocation_tokens": [5, 6]}, "alora_invocation_tokens"),
        ({"arrow_config": {"top_k": 3}}, "arrow_config"),
        ({"megatron_config": {"a": 1}}, "megatron_config"),
        ({"velora_config": {"a": 1}}, "velora_config"),
        ({"kasa_config": {"beta": 1}}, "kasa_config"),
        ({"a_setting_of_next_year": 0.5}, "a_setting_of_next_year"),
        ({"init_lora_weights": "of_next_year"}, "init_lora_weights"),
        ({"init_lora_weights": "PiSSA"}, "init_lora_weights"),  # PEFT does not know it either
        ({"init_lora_weights": "pissa", "target_parameters": ["experts.down_proj"]}, "init_lora_weights"),
        ({"init_lora_weights": "olora", "lora_alpha": 0}, "olora"),
    ],
)
def test_settings_that_change_the_result_are_refused_by_name(adapter: Path, setting: dict[str, Any], word: str) -> None:
    edit_config(adapter, **setting)
    error = refused(adapter)
    assert error.code == "adapter-setting"
    assert word in error.what
    assert error.hint


@pytest.mark.parametrize("start", ["pissa_niter_16", "corda", "loftq", "lora_ga"])
def test_residual_bases_are_demanded(adapter: Path, start: str) -> None:
    edit_config(adapter, init_lora_weights=start)
    error = refused(adapter)
    assert error.code == "adapter-residual-base"
    assert start in error.what
    assert "path_initial_model_for_weight_conversion" in error.hint


def test_harmless_settings_are_accepted(adapter: Path) -> None:
    edit_config(
        adapter, init_lora_weights="gaussian", lora_dropout=0.1, layers_to_transform=[0], unknown_but_unset=None
    )
    assert len(read_adapter(adapter).parts) == 14


def test_every_field_of_the_installed_peft_is_known_at_its_default(adapter: Path) -> None:
    edit_config(adapter, **{**LoraConfig(task_type="CAUSAL_LM").to_dict(), "r": 4, "peft_type": "LORA"})
    assert len(read_adapter(adapter).parts) == 14


def test_several_refusals_come_together(adapter: Path) -> None:
    edit_config(adapter, use_qalora=True, bias="some")
    with pytest.raises(Refusals) as error:
        read_adapter(adapter)
    assert [item.code for item in error.value.errors] == ["adapter-setting", "adapter-setting"]


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "PREFIX_TUNING", "LN_TUNING", "VBLORA", None])
def test_other_kinds_are_refused_by_name(adapter: Path, kind: str | None) -> None:
    edit_config(adapter, peft_type=kind)
    error = refused(adapter)
    assert error.code == "adapter-kind"
    assert str(kind or "nameless") in error.what


@pytest.mark.parametrize(
    "setting",
    [
        {"r": "8"}, {"r": 0}, {"r": 2.5}, {"lora_alpha": None}, {"rank_pattern": {"q": "x"}}, {"alpha_pattern": [1]},
        {"modules_to_save": "lm_head"}, {"rank_pattern": {"q(": 4}},
    ],
)  # fmt: skip
def test_malformed_settings(adapter: Path, setting: dict[str, Any]) -> None:
    edit_config(adapter, **setting)
    assert refused(adapter).code == "bad-adapter-config"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_are_refused(adapter: Path, value: float) -> None:
    edit_weights(adapter, lambda weights: weights[f"{Q}.lora_B.weight"].view(-1)[17].fill_(value).sum())
    with pytest.raises(AdapterError) as caught:
        read_adapter(adapter).check_finite()
    error = caught.value
    assert error.code == "adapter-nan"
    assert f"{Q}.lora_B.weight" in error.what


def test_missing_counterpart(adapter: Path) -> None:
    edit_weights(adapter, lambda weights: weights.pop(f"{Q}.lora_B.weight").sum())
    error = refused(adapter)
    assert error.code == "adapter-incomplete"
    assert "q_proj has no lora_B" in error.what


def test_rank_that_differs_from_the_config(adapter: Path) -> None:
    edit_config(adapter, r=8)
    error = refused(adapter)
    assert error.code == "adapter-rank"
    assert "rank 4" in error.what
    assert "says 8" in error.what


def test_empty_shards_of_a_distributed_save(adapter: Path) -> None:
    edit_weights(adapter, lambda weights: weights.update({f"{Q}.lora_A.weight": torch.zeros(0)}))
    assert refused(adapter).code == "adapter-shape"


@pytest.mark.parametrize(
    "name",
    [f"{Q}.hada_w1_a", "model.layers.0.lora_A.weight", f"{Q}.lora_A.default.weight"],
)
def test_unused_tensors_are_an_error(adapter: Path, name: str) -> None:
    edit_weights(adapter, lambda weights: weights.update({name: torch.ones(4)}))
    error = refused(adapter)
    assert error.code == "adapter-unused-tensor"
    assert name in error.what


def test_dora_needs_its_lengths(adapter: Path) -> None:
    edit_config(adapter, use_dora=True)
    assert refused(adapter).code == "adapter-incomplete"
    edit_config(adapter, use_dora=False)
    edit_weights(adapter, lambda weights: weights.update({f"{Q}.lora_magnitude_vector": torch.ones(4)}))
    assert refused(adapter).code == "adapter-incomplete"


@pytest.mark.parametrize("indices", [None, [1, 2], [1, 1, 2], [1, 2, -3], [1, 2, "3"], {"lm_head": [1, 2, 3]}, 7])
def test_token_rows_need_their_indices(adapter: Path, indices: Any) -> None:
    name = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    edit_config(adapter, trainable_token_indices=indices)
    edit_weights(adapter, lambda weights: weights.update({name: torch.ones(3, 64)}))
    assert refused(adapter).code == "bad-adapter-config"


def test_module_adapted_in_two_ways(adapter: Path) -> None:
    edit_config(adapter, modules_to_save=["q_proj"])
    edit_weights(adapter, lambda weights: weights.update({f"{Q}.weight": torch.ones(64, 64)}))
    assert refused(adapter).code == "adapter-ambiguous"


def test_pickles_are_refused_with_a_way_out(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    error = refused(adapter)
    assert error.code == "adapter-pickle"
    assert "save_pretrained" in error.hint


def test_missing_files(adapter: Path, made: tuple[Path, Path]) -> None:
    (adapter / "adapter_model.safetensors").unlink()
    assert refused(adapter).code == "no-adapter"
    assert refused(made[0]).code == "no-adapter"
    assert refused(adapter / "nowhere").code == "no-adapter"


def test_truncated_weights(adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert refused(adapter).code == "bad-safetensors"


def test_hub_id_in_offline_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(AdapterError) as error:
        read_adapter("some-org/some-adapter-that-is-not-cached@v1")
    assert error.value.code == "no-adapter"
    assert "hub" in error.value.why
