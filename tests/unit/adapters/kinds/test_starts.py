"""PiSSA and OLoRA: PEFT takes the start off the base's weight when it loads the adapter; so does the merge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers.pytorch_utils import Conv1D

from lora2edge.adapters import merge, read_adapter
from lora2edge.adapters.kinds.starts import OLORA, PISSA, UNCERTAIN, find_start
from lora2edge.backends.hf.write import write_checkpoint
from lora2edge.checkpoint import open_checkpoint
from lora2edge.errors import AdapterError
from lora2edge.progress import SILENT
from tests.tiny import bpe_tokenizer, make_checkpoint, shake_adapter
from tests.unit.adapters.kinds.live import (
    LARGEST_ERROR,
    LINEAR,
    difference,
    edit_config,
    live_model,
    load_base,
    logits,
    read_config,
)

STARTS = [PISSA, OLORA]


def widen_gaps(base: Path, names: tuple[str, ...]) -> Path:
    """Sets singular values 2 and 4 apart from the next: what is between is then determined in float32 too."""
    weights = load_file(base / "model.safetensors")
    for name, weight in weights.items():
        if name.endswith(names):
            left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
            values[:2] += 2 * float(values[0])
            values[2:4] += float(values[2])
            weights[name] = (left * values @ right).float().contiguous()
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    return base


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Qwen2, tied and untied."""
    root = tmp_path_factory.mktemp("starts")
    return {
        tied: widen_gaps(
            make_checkpoint(root / f"{tied}", "qwen2", dtype="float32", tied=tied),
            (*(f"{name}.weight" for name in LINEAR), "lm_head.weight"),
        )
        for tied in (True, False)
    }


@pytest.fixture
def conv1d(gpt2: Path, tmp_path: Path) -> Path:
    base = tmp_path / "gpt2"
    load_base(gpt2).save_pretrained(base)
    bpe_tokenizer().save_pretrained(base)
    return widen_gaps(base, ("c_attn.weight", "c_proj.weight", "c_fc.weight"))


def train(base: Path, folder: Path, start: Any, save: dict[str, Any] | None = None, **settings: Any) -> Any:
    """The trained model, live as it was in training; its adapter is saved in `folder`."""
    settings = {"r": 4, "lora_alpha": 6, "target_modules": LINEAR, **settings}
    peft = get_peft_model(load_base(base), LoraConfig(init_lora_weights=start, task_type="CAUSAL_LM", **settings))
    if save:  # before training, as PEFT asks for
        peft.save_pretrained(save["path_initial_model_for_weight_conversion"])
        peft.peft_config["default"].init_lora_weights = start  # save_pretrained() sets it to True
    shake_adapter(peft)
    peft.save_pretrained(folder, **(save or {}))
    return peft.eval()


def write_merged(base: Path, adapter: Path, out: Path) -> Any:
    view = merge(open_checkpoint(base), [read_adapter(adapter)])
    out.mkdir()
    write_checkpoint(view, out, SILENT)
    return view


def assert_same_as_live(base: Path, adapter: Path, out: Path) -> None:
    write_merged(base, adapter, out)
    live, merged = logits(live_model(base, adapter)), logits(load_base(out))
    assert difference(live, logits(load_base(base))) > 0.01, "the adapter does nothing"
    assert difference(live, merged) <= LARGEST_ERROR


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True, "lora_alpha": 3},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 11}},
    "dora": {"use_dora": True},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "head": {"target_modules": ["lm_head", "q_proj"]},
    "saved-head": {"modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("start", STARTS)
def test_same_as_live(start: str, setting: str, tied: bool, bases: dict[bool, Path], tmp_path: Path) -> None:
    trained = train(bases[tied], tmp_path / "adapter", start, **SETTINGS[setting])
    assert_same_as_live(bases[tied], tmp_path / "adapter", tmp_path / "out")
    assert difference(logits(trained), logits(load_base(tmp_path / "out"))) <= LARGEST_ERROR, "not what was trained"


@pytest.mark.parametrize("use_dora", [False, True])
def test_conv1d(use_dora: bool, conv1d: Path, tmp_path: Path) -> None:
    targets = ["c_attn", "c_proj", "c_fc"]
    train(conv1d, tmp_path / "adapter", PISSA, target_modules=targets, fan_in_fan_out=True, use_dora=use_dora)
    assert_same_as_live(conv1d, tmp_path / "adapter", tmp_path / "out")


def test_olora_on_conv1d_is_refused(conv1d: Path, tmp_path: Path) -> None:
    """PEFT factors the weight as it is stored: A and B have each other's widths, and the layer does not run."""
    peft = get_peft_model(load_base(conv1d), LoraConfig(init_lora_weights=OLORA, r=4, target_modules=["c_attn"]))
    layer = next(module.base_layer for module in peft.modules() if hasattr(module, "base_layer"))
    assert isinstance(layer, Conv1D)
    with pytest.raises(RuntimeError, match="shape"):
        logits(peft)
    train(conv1d, tmp_path / "adapter", True, target_modules=["c_attn"])
    edit_config(tmp_path / "adapter", init_lora_weights=OLORA)
    with pytest.raises(AdapterError, match="Conv1D") as error:
        merge(open_checkpoint(conv1d), [read_adapter(tmp_path / "adapter")])
    assert error.value.code == "adapter-residual-base"


def test_the_delta_is_the_difference(bases: dict[bool, Path], tmp_path: Path) -> None:
    train(bases[True], tmp_path / "adapter", PISSA)
    base = open_checkpoint(bases[True])
    view = merge(base, [read_adapter(tmp_path / "adapter")])
    name = "model.layers.1.mlp.down_proj.weight"
    delta = view.delta(name, 3, 9)
    assert delta is not None
    np.testing.assert_allclose(view.rows(name, 3, 9), base.rows(name, 3, 9) + delta, atol=1e-5)
    assert max(view.checks.values()) < 1e-6


@pytest.mark.parametrize("start", [PISSA, OLORA, "pissa_niter_4"])
def test_converted_adapters_are_plain(start: str, bases: dict[bool, Path], tmp_path: Path) -> None:
    initial = {"path_initial_model_for_weight_conversion": str(tmp_path / "initial")}
    trained = train(bases[True], tmp_path / "adapter", start, save=initial)
    assert read_config(tmp_path / "adapter")["init_lora_weights"] is True
    assert_same_as_live(bases[True], tmp_path / "adapter", tmp_path / "out")
    assert difference(logits(trained), logits(load_base(tmp_path / "out"))) <= LARGEST_ERROR


def test_a_residual_base_that_was_saved(bases: dict[bool, Path], tmp_path: Path) -> None:
    """PEFT's recipe for PiSSA: the residual base and the start are saved apart, and training goes on from those."""
    peft = get_peft_model(
        load_base(bases[True]), LoraConfig(init_lora_weights="pissa_niter_4", r=4, target_modules=LINEAR)
    )
    peft.peft_config["default"].init_lora_weights = True
    peft.save_pretrained(tmp_path / "start")
    peft.unload().save_pretrained(tmp_path / "residual")
    bpe_tokenizer().save_pretrained(tmp_path / "residual")
    training = PeftModel.from_pretrained(load_base(tmp_path / "residual"), tmp_path / "start", is_trainable=True)
    shake_adapter(training)
    training.save_pretrained(tmp_path / "adapter")
    assert read_config(tmp_path / "adapter")["init_lora_weights"] is True
    assert_same_as_live(tmp_path / "residual", tmp_path / "adapter", tmp_path / "out")
    assert difference(logits(training.eval()), logits(load_base(tmp_path / "out"))) <= LARGEST_ERROR


def test_a_tied_head_without_its_residual(bases: dict[bool, Path], tmp_path: Path) -> None:
    """PEFT takes the start off the embedding as well, which is the same tensor."""
    train(bases[True], tmp_path / "adapter", PISSA, target_modules=["lm_head"])
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    weights = {name: tensor for name, tensor in weights.items() if "base_layer" not in name}
    save_file(weights, tmp_path / "adapter" / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="tied") as error:
        merge(open_checkpoint(bases[True]), [read_adapter(tmp_path / "adapter")])
    assert error.value.code == "adapter-tie-ambiguous"


def test_a_start_that_is_not_determined(bases: dict[bool, Path], tmp_path: Path) -> None:
    """Two equal singular values at the rank: refused while it is computed, and nothing is written."""
    train(bases[True], tmp_path / "adapter", PISSA, target_modules=["q_proj"])
    base = tmp_path / "base"
    base.mkdir()
    for file in bases[True].iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    weights = load_file(base / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    left, values, right = torch.linalg.svd(weights[name].double(), full_matrices=False)
    values[4] = values[3]
    weights[name] = (left * values @ right).float().contiguous()
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    view = merge(open_checkpoint(base), [read_adapter(tmp_path / "adapter")])
    with pytest.raises(AdapterError, match=r"layers\.0\.self_attn\.q_proj") as error:
        view.rows(name, 0, 4)
    assert error.value.code == "adapter-start-ambiguous"
    assert "path_initial_model_for_weight_conversion" in error.value.hint
    assert view.rows(name.replace("layers.0", "layers.1"), 0, 4).any()


def _with_values(values: list[float], shape: tuple[int, int]) -> np.ndarray:
    generator = np.random.default_rng(0)
    left, _ = np.linalg.qr(generator.standard_normal((shape[0], len(values))))
    right, _ = np.linalg.qr(generator.standard_normal((shape[1], len(values))))
    return np.asarray(left * values @ right.T, np.float32)


@pytest.mark.parametrize("shape", [(24, 10), (10, 24), (600, 12)])
def test_pissa_is_the_truncated_decomposition(shape: tuple[int, int]) -> None:
    weight = _with_values([9, 7, 4, 3, 2, 1], shape)
    left, values, right = np.linalg.svd(weight.astype(np.float64), full_matrices=False)
    for rank in (1, 3, 6):
        b, a = find_start(PISSA, weight, rank, 1.7, "m")
        np.testing.assert_allclose(b @ a, (left[:, :rank] * values[:rank]) @ right[:rank], atol=2e-5)
    full = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    b, a = find_start(PISSA, full, min(shape), 1.7, "m")
    np.testing.assert_allclose(b @ a, full, atol=2e-5)


@pytest.mark.parametrize(
    "weight",
    [
        _with_values([9, 7, 5, 5, 1], (16, 12)),
        _with_values([9, 7, 5, 5 * (1 - UNCERTAIN / 2), 1], (16, 12)),
        _with_values([9, 7], (16, 12)),
        np.zeros((16, 12), np.float32),
    ],
)
def test_no_gap_at_the_rank(weight: np.ndarray) -> None:
    with pytest.raises(AdapterError) as error:
        find_start(PISSA, weight, 3, 1.0, "m")
    assert error.value.code == "adapter-start-ambiguous"


def test_columns_that_depend_on_each_other() -> None:
    weight = np.random.default_rng(0).standard_normal((16, 12)).astype(np.float32)
    weight[:, 2] = 2 * weight[:, 0] - weight[:, 1]
    assert find_start(OLORA, weight, 2, 1.0, "m")
    with pytest.raises(AdapterError) as error:
        find_start(OLORA, weight, 3, 1.0, "m")
    assert error.value.code == "adapter-start-ambiguous"


def test_more_ranks_than_the_weight_has(bases: dict[bool, Path], tmp_path: Path) -> None:
    train(bases[True], tmp_path / "adapter", True, target_modules=["k_proj"], r=40)
    edit_config(tmp_path / "adapter", init_lora_weights=PISSA)
    with pytest.raises(AdapterError, match="do not fit this base") as error:
        merge(open_checkpoint(bases[True]), [read_adapter(tmp_path / "adapter")])
    assert "no start of rank 40" in str(error.value.why)
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == 40
