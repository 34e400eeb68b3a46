"""Several adapters through the verbs: how they are named, planned, merged, built and reported."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM

from lora2edge.contracts import AdapterRef
from lora2edge.errors import TargetError
from lora2edge.recipe import dump_recipe, load_recipe
from tests.cli.conftest import Model, Outcome
from tests.tiny import make_adapter, make_checkpoint, make_data

Run = Callable[..., Outcome]
IDS = torch.tensor([[5, 300, 77, 401, 12, 9, 600, 333, 2, 41, 150, 700]])


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A float32 base, its first adapter, and data; `second` lies beside the first."""
    root = tmp_path_factory.mktemp("small")
    base = make_checkpoint(root / "base", dtype="float32")
    make_adapter(root / "second", base, targets=["q_proj", "up_proj"], seed=2)
    make_adapter(root / "dora", base, targets=["q_proj", "up_proj"], use_dora=True, seed=3)
    return Model(base, make_adapter(root / "first", base, seed=1), make_data(root / "data.jsonl", 40))


def second(small: Model) -> Path:
    return small.adapter.parent / "second"


def answers(folder: Path, adapters: list[Path] | None = None, weights: list[float] | None = None) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if adapters:
        model = PeftModel.from_pretrained(model, adapters[0], adapter_name="0")
        for index, path in enumerate(adapters[1:], 1):
            model.load_adapter(path, adapter_name=str(index))
        model.base_model.set_adapter([str(index) for index in range(len(adapters))])
        for module in model.modules():
            for index, weight in enumerate(weights or []):
                if isinstance(getattr(module, "scaling", None), dict) and str(index) in module.scaling:
                    module.scaling[str(index)] *= weight
    with torch.no_grad():
        return model.eval()(IDS).logits


def error(outcome: Outcome) -> dict[str, Any]:
    assert outcome.code == 2, outcome
    assert "Traceback" not in outcome.out + outcome.err
    found: dict[str, Any] = json.loads(outcome.out)["error"]
    return found


def test_merge_of_a_weighted_sum(lora2edge: Run, small: Model, tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    outcome = lora2edge(
        "merge", "--base", small.base, "--adapter", f"{small.adapter}=0.5", "--adapter", f"{second(small)}=-1.5",
        "--out", merged, "--prove", "--data", small.data, "--json",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    proof = json.loads(outcome.out)["merge"]
    assert proof["reference"] == ""
    assert proof["steps"] == []
    assert proof["math_kl"] <= 1e-9
    live = answers(small.base, [small.adapter, second(small)], [0.5, -1.5])
    assert float((answers(merged) - live).abs().max() / live.abs().max()) <= 1e-5
    assert float((answers(small.base) - live).abs().max()) > 0.05
    manifest = json.loads((merged / "manifest.json").read_text())
    assert {"adapters/0/adapter_model.safetensors", "adapters/1/adapter_config.json"} <= set(
        manifest["inputs"]["model"]
    )
    assert any(name.startswith("1/") for name in manifest["account"]["adapter"]["merged"])


def test_a_sequence_is_proved_step_by_step(lora2edge: Run, small: Model, tmp_path: Path) -> None:
    dora = small.adapter.parent / "dora"
    outcome = lora2edge(
        "merge", "--base", small.base, "--adapter", small.adapter, "--adapter", dora, "--combine", "sequence",
        "--out", tmp_path / "merged", "--prove", "--data", small.data, "--json",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    proof = json.loads(outcome.out)["merge"]
    assert len(proof["steps"]) == 2
    assert max(step["math_kl"] for step in proof["steps"]) <= 1e-9
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(small.base, dtype=torch.float32), small.adapter
    ).merge_and_unload()
    with torch.no_grad():
        live = PeftModel.from_pretrained(model, dora).eval()(IDS).logits
    assert float((answers(tmp_path / "merged") - live).abs().max() / live.abs().max()) <= 1e-5


def test_dare_gives_the_same_bytes_again(lora2edge: Run, small: Model, tmp_path: Path) -> None:
    written = []
    for out, seed in (("one", "5"), ("two", "5"), ("three", "6")):
        outcome = lora2edge(
            "merge", "--base", small.base, "--adapter", small.adapter, "--adapter", second(small), "--out",
            tmp_path / out, "--combine", "dare_ties", "--density", "0.5", "--seed", seed,
        )  # fmt: skip
        assert outcome.code == 0, outcome.err
        written.append((tmp_path / out / "model.safetensors").read_bytes())
    assert written[0] == written[1]
    assert written[0] != written[2]


@pytest.mark.parametrize("weight", ["abc", "0", "nan", "inf", "-inf", "", "0.5x"])
def test_malformed_weights(weight: str, lora2edge: Run, small: Model) -> None:
    outcome = lora2edge("build", "--plan", "--base", small.base, "--adapter", f"{small.adapter}={weight}", "--json")
    assert error(outcome)["code"] == "adapter-weight"


def test_a_folder_with_an_equals_sign_in_its_name(lora2edge: Run, small: Model, tmp_path: Path) -> None:
    """The whole text names a folder: that is what it means; with a weight behind it, the last = counts."""
    folder = shutil.copytree(small.adapter, tmp_path / "lr=0.5")
    for text, weight in ((f"{folder}", 1), (f"{folder}=0.25", 0.25)):
        outcome = lora2edge("build", "--plan", "--base", small.base, "--adapter", text, "--json")
        assert outcome.code == 0, outcome.out
        (adapter,) = json.loads(outcome.out)["adapters"]
        assert (adapter["name"], adapter["weight"]) == ("lr=0.5", weight)


def test_plan_of_several(lora2edge: Run, small: Model) -> None:
    outcome = lora2edge(
        "build", "--plan", "--base", small.base, "--adapter", f"{small.adapter}=0.5", "--adapter", second(small),
        "--combine", "ties_svd", "--density", "0.3", "--json",
    )  # fmt: skip
    plan = json.loads(outcome.out)
    assert outcome.code == 0, outcome.out
    assert [adapter["weight"] for adapter in plan["adapters"]] == [0.5, 1]
    assert [adapter["coverage"]["modules"] for adapter in plan["adapters"]] == [14, 4]
    assert plan["adapters"][0]["coverage"]["unadapted"] == {}
    assert plan["adapters"][1]["coverage"]["unadapted"]["model.layers.*.mlp.down_proj"] == 2
    assert plan["inputs"]["combine"]["method"] == "ties_svd"
    stages = {stage["stage"]: stage for stage in plan["stages"]}
    assert "one tensor at a time" in stages["merge"]["note"]
    assert stages["merge"]["ram_bytes"] > 4 * 4 * 64 * 128
    text = lora2edge("build", "--plan", "--base", small.base, "--adapter", small.adapter, "--adapter", second(small))
    assert "second" in text.out
    assert "Combined by" in text.out


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (["--density", "0.5"], "combine-option"),
        (["--combine", "ties"], "combine-option"),
        (["--combine", "best"], "combine-method"),
        (["--combine", "svd", "--svd-rank", "0"], "combine-option"),
        (["--combine", "ties", "--density", "0.5", "--majority-sign", "none"], "combine-option"),
        (["--combine", "sum", "--svd-rank", "4"], "combine-option"),
    ],
)
def test_options_that_do_not_belong(options: list[str], code: str, lora2edge: Run, small: Model) -> None:
    both = ["--adapter", str(small.adapter), "--adapter", str(second(small))]
    assert error(lora2edge("build", "--plan", "--base", small.base, *both, *options, "--json"))["code"] == code


def test_a_method_needs_several(lora2edge: Run, small: Model) -> None:
    for adapter in ([], ["--adapter", small.adapter]):
        outcome = lora2edge("build", "--plan", "--base", small.base, *adapter, "--combine", "svd", "--json")
        assert error(outcome)["code"] == "combine-method"


def test_options_override_the_recipe(tmp_path: Path) -> None:
    """As they do for every field: the adapters as a list, the settings of the combination one by one."""
    (tmp_path / "near").mkdir()
    (tmp_path / "recipe.yaml").write_text("adapter: [near=0.5, org/far@v1=-2]\ncombine: {method: ties, density: 0.5}\n")
    recipe = load_recipe(tmp_path / "recipe.yaml", {})
    assert recipe.adapters == (AdapterRef(str(tmp_path / "near"), 0.5), AdapterRef("org/far@v1", -2.0))
    assert recipe.combination == {"method": "ties", "density": 0.5, "majority_sign": None, "svd_rank": None, "seed": 0}
    again = load_recipe(tmp_path / "recipe.yaml", {"density": 0.2, "adapter": ("org/one",), "seed": 4})
    assert again.adapters == (AdapterRef("org/one"),)
    assert (again.combination["method"], again.combination["density"], again.combination["seed"]) == ("ties", 0.2, 4)
    (tmp_path / "again.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(tmp_path / "again.yaml", {}) == recipe
    (tmp_path / "bad.yaml").write_text("adapter: [a]\ncombine: {method: ties, densty: 0.5}\n")
    with pytest.raises(TargetError, match="densty"):
        load_recipe(tmp_path / "bad.yaml", {})


def test_different_bases_must_be_named(lora2edge: Run, small: Model, tmp_path: Path) -> None:
    other = shutil.copytree(small.adapter, tmp_path / "other")
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "org/other"}))
    both = ["--adapter", small.adapter, "--adapter", other]
    assert error(lora2edge("build", "--plan", *both, "--json"))["code"] == "combine-bases"
    assert lora2edge("build", "--plan", *both, "--base", small.base, "--json").code == 0


def build(lora2edge: Run, small: Model, folder: Path, combine: Any) -> tuple[dict[str, Any], Path]:
    """A build by a recipe that lies beside the adapters, with paths relative to it."""
    recipe = small.adapter.parent / f"{folder.name}.yaml"
    settings = {"base": "base", "adapter": ["first=0.5", "second"], "data": "data.jsonl", "targets": ["hf/merged"]}
    recipe.write_text(yaml.safe_dump({**settings, **({"combine": combine} if combine else {})}))
    outcome = lora2edge("build", recipe, "--out", folder, "--no-bench", "--tokens", "300", "--json")
    assert outcome.code == 0, outcome.out + outcome.err
    return json.loads((folder / "report.json").read_text()), folder


def test_build_of_a_sum(lora2edge: Run, small: Model, tmp_path: Path) -> None:
    report, out = build(lora2edge, small, tmp_path / "sum", None)
    assert [(adapter["name"], adapter["weight"]) for adapter in report["inputs"]["adapters"]] == [
        ("first", 0.5), ("second", 1),
    ]  # fmt: skip
    assert report["inputs"]["combine"] == {"method": "sum"}
    assert report["merge"]["reference"] == ""
    assert report["baseline"]["facts"]["reference"] == ""
    assert report["merge"]["math_kl"] <= 1e-9
    assert "no live reference" not in (out / "report.md").read_text()
    measured = lora2edge("measure", out / report["targets"]["hf/merged"]["artifact"], "--json", "--tokens", "300")
    assert measured.code == 0, measured.err
    assert json.loads(measured.out)["reused"]
    other = lora2edge(
        "measure", out / report["targets"]["hf/merged"]["artifact"], "--json", "--adapter", small.adapter, "--adapter",
        second(small),
    )  # fmt: skip
    assert error(other)["code"] == "other-model", "the same files with other weights are another model"
    resolved = yaml.safe_load((out / "recipe.resolved.yaml").read_text())
    assert resolved["adapter"] == [f"{small.adapter}=0.5", str(second(small))]


def test_build_of_ties_says_that_there_is_no_live_reference(lora2edge: Run, small: Model, tmp_path: Path) -> None:
    report, out = build(lora2edge, small, tmp_path / "ties", {"method": "ties", "density": 0.5})
    assert report["inputs"]["combine"] == {"method": "ties", "density": 0.5, "majority_sign": "total"}
    assert "no live reference" in report["merge"]["reference"]
    assert len(report["merge"]["steps"]) == 2
    assert "no live reference" in report["baseline"]["facts"]["reference"]
    text = (out / "report.md").read_text()
    assert "There is no live reference, only the float32 formula of ties" in text
    assert "Not proved: what was made of them together" in text
    assert report["targets"]["hf/merged"]["quality"]["kl_mean"] < 1e-6
