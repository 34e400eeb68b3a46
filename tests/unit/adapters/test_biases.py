"""`bias: all`, `bias: lora_only`, …: biases of the base that were trained, against PEFT's live model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from lora2edge.adapters import merge, read_adapter
from lora2edge.backends.hf.write import write_checkpoint
from lora2edge.checkpoint import open_checkpoint
from lora2edge.errors import AdapterError
from lora2edge.progress import SILENT
from tests.architectures import ARCHITECTURES, make_model
from tests.tiny import shake_adapter
from tests.unit.adapters.kinds.live import WEIGHTS, edit, edit_config

IDS = torch.tensor([[5, 30, 77, 40, 12, 9, 60, 33, 3, 41, 150, 7]])
SETTINGS: dict[str, dict[str, Any]] = {
    "Lora": {"r": 4},
    "AdaLora": {"init_r": 4, "total_step": 10},
    "OFT": {"r": 0, "oft_block_size": 4},
    "BOFT": {"boft_block_size": 4},
    "Vera": {"r": 8},
}
ONLY = {"Lora": "lora_only", "AdaLora": "lora_only", "OFT": "oft_only", "BOFT": "boft_only", "Vera": "vera_only"}


@pytest.fixture(autouse=True)
def no_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peft.tuners.boft.layer.get_fbd_cuda", lambda: None)


def make(folder: Path, name: str, kind: str, bias: str, **settings: Any) -> tuple[Any, Path, Path]:
    """The base model, its folder, and that of an adapter with every trained parameter moved away from its start."""
    architecture = ARCHITECTURES[name]
    model = make_model(architecture, folder / "base")
    settings = {"target_modules": [architecture.layers[0]], **SETTINGS[kind], **settings}
    config = getattr(peft, f"{kind}Config")(task_type=architecture.task, bias=bias, **settings)
    trained = get_peft_model(type(model).from_pretrained(folder / "base", dtype=torch.float32), config)
    shake_adapter(trained)
    trained.save_pretrained(folder / "adapter")
    return model, folder / "base", folder / "adapter"


@pytest.mark.parametrize("only", [False, True], ids=["all", "only"])
@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.parametrize("name", ["bert", "roberta", "qwen2"])
def test_same_as_live(name: str, kind: str, only: bool, tmp_path: Path) -> None:
    model, base, adapter = make(tmp_path, name, kind, ONLY[kind] if only else "all")
    view = merge(open_checkpoint(base), [read_adapter(adapter)])
    (tmp_path / "out").mkdir()
    write_checkpoint(view, tmp_path / "out", SILENT)
    merged = type(model).from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "out"))
    changed = {key for key in before if key.endswith(".bias") and not torch.equal(before[key], after[key])}
    layer = ARCHITECTURES[name].layers[0]
    head = {key for key in before if key.startswith("classifier")}
    assert changed - head == {key for key in before if key.endswith(f"{layer}.bias" if only else ".bias")} - head
    with torch.no_grad():
        plain, found = model(input_ids=IDS).logits, merged(input_ids=IDS).logits
        live = PeftModel.from_pretrained(model, adapter).eval()(input_ids=IDS).logits  # changes the model's biases
    assert (live - plain).abs().max() > 1e-3
    assert (live - found).abs().max() <= 1e-5 * live.abs().max()
    account = view.account()
    for side, tensors in (("base", before), ("adapter", load_file(adapter / WEIGHTS))):
        assert sorted(tensor for names in account[side].values() for tensor in names) == sorted(tensors)


def test_lora_bias_on_top_of_a_trained_bias(tmp_path: Path) -> None:
    targets = ["q_proj", "k_proj", "v_proj"]
    model, base, adapter = make(tmp_path, "qwen2", "Lora", "all", lora_bias=True, target_modules=targets)
    view = merge(open_checkpoint(base), [read_adapter(adapter)])
    live = PeftModel.from_pretrained(model, adapter).base_model.model.model.layers[1].self_attn.k_proj
    expected = live.base_layer.bias + live.scaling["default"] * live.lora_B["default"].bias
    found = view.rows("model.layers.1.self_attn.k_proj.bias", 0, 16)
    torch.testing.assert_close(torch.from_numpy(found), expected.detach(), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("bias", "lost"), [("all", "LayerNorm.bias"), ("lora_only", "query.base_layer.bias")])
def test_biases_that_are_missing(bias: str, lost: str, tmp_path: Path) -> None:
    _, base, adapter = make(tmp_path, "bert", "Lora", bias)
    edit(adapter, lambda tensors: [tensors.pop(name) for name in list(tensors) if name.endswith(lost)])
    with pytest.raises(AdapterError, match="of the base's biases") as error:
        merge(open_checkpoint(base), [read_adapter(adapter)])
    assert error.value.code == "adapter-incomplete"


def test_biases_that_the_configuration_does_not_speak_of(tmp_path: Path) -> None:
    """PEFT loads them all the same, and a merge without them would be another model."""
    _, _, adapter = make(tmp_path, "bert", "Lora", "all")
    with pytest.raises(AdapterError) as error:
        read_adapter(edit_config(adapter, bias="none"))
    assert error.value.code == "adapter-unused-tensor"


def test_kinds_without_biases(tmp_path: Path) -> None:
    model = make_model(ARCHITECTURES["qwen2"], tmp_path / "base")
    config = peft.LoHaConfig(r=3, target_modules=["q_proj"])
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    assert read_adapter(tmp_path / "adapter")
    with pytest.raises(AdapterError, match="bias: all is not supported"):
        read_adapter(edit_config(tmp_path / "adapter", bias="all"))
