"""What holds for all kinds: settings that are accounted for, other precisions, and files that are wrong."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import peft.tuners.boft.layer
import pytest
import torch
from peft import AdaLoraConfig, BOFTConfig, IA3Config, LoHaConfig, LoKrConfig, OFTConfig, PeftConfig, VeraConfig
from safetensors.torch import load_file

from lora2edge.adapters.kinds import adalora, boft, ia3, loha, lokr, oft, vera
from lora2edge.errors import AdapterError
from tests.unit.adapters.kinds.live import (
    WEIGHTS,
    assert_same_as_live,
    edit,
    edit_config,
    load_base,
    read_config,
    read_parts,
    save_adapter,
)

TARGETS = ["q_proj", "down_proj"]
KINDS: dict[str, tuple[ModuleType, Callable[[], PeftConfig]]] = {
    "adalora": (adalora, lambda: AdaLoraConfig(init_r=3, lora_alpha=12, total_step=9, target_modules=TARGETS)),
    "boft": (boft, lambda: BOFTConfig(boft_block_size=4, target_modules=TARGETS)),
    "ia3": (ia3, lambda: IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"])),
    "loha": (loha, lambda: LoHaConfig(r=4, alpha=8, target_modules=TARGETS)),
    "lokr": (lokr, lambda: LoKrConfig(r=2, alpha=4, target_modules=TARGETS)),
    "oft": (oft, lambda: OFTConfig(oft_block_size=16, target_modules=TARGETS)),
    "vera": (vera, lambda: VeraConfig(r=8, target_modules=TARGETS)),
}
REQUIRED = {
    "adalora": ["init_r", "lora_alpha"],
    "boft": ["boft_block_size", "boft_block_num"],
    "ia3": [],
    "loha": ["r", "alpha"],
    "lokr": ["r", "alpha"],
    "oft": ["oft_block_size", "r"],
    "vera": ["r"],
}
WRONG = [None, True, "many", -1, 0, 2.5, float("nan"), 10**400, [], {}, [1], {"q_proj": "x"}, {"(": 4}, [[]]]


@pytest.fixture(scope="module")
def saved(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("saved")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peft.tuners.boft.layer, "get_fbd_cuda", lambda: None)
        return {kind: save_adapter(root / kind, base, config(), 0.3) for kind, (_, config) in KINDS.items()}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def adapter(kind: str, saved: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved[kind], tmp_path / "adapter"))


def test_every_setting_that_peft_writes_is_known(kind: str, adapter: Path) -> None:
    """`bias` is what the reader of all kinds looks after."""
    written = {key for key, value in read_config(adapter).items() if value not in (None, False, "", [], {})}
    assert written - KINDS[kind][0].KEYS <= {"bias"}


def test_half_precision(kind: str, adapter: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peft.tuners.boft.layer, "get_fbd_cuda", lambda: None)

    def halve(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({name: tensor.bfloat16() for name, tensor in tensors.items()})

    if kind == "oft":  # so large that the series would blow up rounding errors
        edit(adapter, lambda tensors: tensors.update({name: tensor / 5 for name, tensor in tensors.items()}))
    assert_same_as_live(KINDS[kind][0].read, base, edit(adapter, halve))


def test_foreign_tensors_are_left_alone(kind: str, adapter: Path) -> None:
    foreign = {
        "base_model.model.lm_head.weight": torch.ones(2, 2),
        "base_model.model.x.lora_magnitude": torch.ones(2),
    }
    before = len(read_parts(KINDS[kind][0].read, adapter))
    parts = read_parts(KINDS[kind][0].read, edit(adapter, lambda tensors: tensors.update(foreign)))
    assert len(parts) == before and not {name for part in parts for name in part.tensors} & set(foreign)


def test_no_tensors_no_parts(kind: str, adapter: Path) -> None:
    edit(adapter, lambda tensors: (tensors.clear(), tensors.update({"base_model.model.x.weight": torch.ones(2)})))
    assert read_parts(KINDS[kind][0].read, adapter) == []


def test_a_missing_tensor(kind: str, adapter: Path, tmp_path: Path) -> None:
    """Of the kinds that have several for a module; of the others a module less is adapted."""
    names = load_file(adapter / WEIGHTS)
    for index, name in enumerate(names):
        folder = Path(shutil.copytree(adapter, tmp_path / str(index)))
        edit(folder, lambda tensors, name=name: tensors.pop(name))
        if kind in ("ia3", "oft"):
            assert read_parts(KINDS[kind][0].read, folder)
            continue
        with pytest.raises(AdapterError) as error:
            read_parts(KINDS[kind][0].read, folder)
        assert error.value.code == "adapter-incomplete" and error.value.why and error.value.hint


RESHAPE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "flat": lambda tensor: tensor.reshape(-1),
    "one-axis-more": lambda tensor: tensor[None],
    "one-row-more": lambda tensor: torch.cat((tensor, tensor[:1])),
    "one-column-more": lambda tensor: torch.cat((tensor, tensor[..., :1]), -1),
    "empty": lambda tensor: tensor[:0],
    "scalar": lambda tensor: tensor.sum(),
}


@pytest.mark.parametrize("shape", RESHAPE)
def test_a_tensor_of_another_shape(kind: str, shape: str, adapter: Path, base: Path, tmp_path: Path) -> None:
    model = load_base(base)
    for index, (name, tensor) in enumerate(load_file(adapter / WEIGHTS).items()):
        changed = RESHAPE[shape](tensor)
        larger = kind == "vera" and name.endswith(("vera_A", "vera_B")) and shape.startswith("one-")
        if changed.shape == tensor.shape or (larger and changed.dim() == 2):
            continue  # larger random matrices: the corner that counts is there, or the rank is refused
        folder = Path(shutil.copytree(adapter, tmp_path / str(index)))
        edit(folder, lambda tensors, name=name, changed=changed: tensors.update({name: changed}))
        try:
            parts = read_parts(KINDS[kind][0].read, folder)
        except AdapterError as error:
            assert error.code in ("adapter-shape", "adapter-rank") and error.why
            continue
        concerned = [part for part in parts if name in part.tensors and part.parameter == "weight"]
        shapes = [tuple(model.get_submodule(part.module).weight.shape) for part in concerned]
        assert any(part.misfit(has) for part, has in zip(concerned, shapes, strict=True)), name


def test_another_base(kind: str, adapter: Path) -> None:
    for part in read_parts(KINDS[kind][0].read, adapter):
        wrong = [(64, 60), (60, 64), (64, 64, 3, 3), (64,), ()]
        problems = [part.misfit(shape) for shape in (wrong if part.parameter == "weight" else [(60,), (64, 64), ()])]
        assert sum(problem is None for problem in problems) <= (1 if kind in ("ia3", "vera", "oft") else 0), problems
        assert all(part.module in problem for problem in problems if problem)


def test_wrong_values(kind: str, adapter: Path) -> None:
    """Whatever a setting is: parts, or an error of ours that names it."""
    original = read_config(adapter)
    for key in KINDS[kind][0].KEYS:
        for value in WRONG:
            edit_config(adapter, **{**original, key: value})
            try:
                read_parts(KINDS[kind][0].read, adapter)
            except AdapterError as error:
                assert error.code in ("bad-adapter-config", "adapter-rank", "adapter-setting", "adapter-shape")
                assert error.why and error.hint


def test_missing_settings(kind: str, adapter: Path) -> None:
    for key in REQUIRED[kind]:
        config = read_config(adapter)
        with pytest.raises(AdapterError, match=rf"{key} is None, expected") as error:
            read_parts(KINDS[kind][0].read, edit_config(adapter, key))
        assert error.value.code == "bad-adapter-config"
        edit_config(adapter, **config)
