"""Adapters trained on a quantized base: the live model is bitsandbytes' own, the base of the merge is measured."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lora2edge.adapters import Adapter, read_adapter
from lora2edge.backends.hf import open_baseline, open_merged
from lora2edge.checkpoint import RequantizedCheckpoint, StoredCheckpoint, open_checkpoint
from lora2edge.contracts import CheckpointRef, SessionOptions
from lora2edge.errors import InputError
from lora2edge.merge_base import DEQUANTIZED, MEASURE, ORIGINAL, find_bases
from lora2edge.plan import Plan, plan_build
from lora2edge.recipe import Recipe, load_recipe
from lora2edge.report.schema import check_report
from lora2edge.target import load_target
from tests.cli.conftest import Outcome, lora2edge, own_cache  # noqa: F401
from tests.tiny import make_adapter, make_checkpoint, make_data

Run = Callable[..., Outcome]
IDS = [5, 9, 40, 100, 7, 220, 31]
SESSION = SessionOptions("cpu", threads=1, slots=1, max_length=64)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base in float32, an adapter for it, data, and the base as transformers saves it in 4 bits."""
    root = tmp_path_factory.mktemp("qlora")
    make_checkpoint(root / "base", arch="llama", dtype="float32", tied=False)
    make_adapter(root / "adapter", root / "base")
    make_data(root / "data.jsonl", 40)
    _load_in_4bit(root / "base", "nf4", double_quant=False).save_pretrained(root / "packed")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(root / "base" / name, root / "packed" / name)
    return root


def _load_in_4bit(base: Path, quant_type: str, *, double_quant: bool) -> Any:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, quantization_config=settings)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # else it computes in bfloat16, whatever was asked for
    return model


def _plan(root: Path, **options: Any) -> Plan:
    recipe = Recipe(base=str(root / "base"), adapter=str(root / "adapter"), **options)
    return plan_build(recipe, [load_target("hf/merged")])


def _logits(session: Any) -> torch.Tensor:
    try:
        return torch.from_numpy(next(iter(session.logits([IDS], [list(range(len(IDS)))]))))
    finally:
        session.close()


@pytest.mark.parametrize("trained_on", ["nf4", "nf4-double", "fp4", "fp4-double", "packed"])
def test_the_baseline_is_the_adapter_live_on_bitsandbytes(trained_on: str, root: Path) -> None:
    from peft import PeftModel

    quant_type, _, double = trained_on.partition("-")
    given: Any = {"quant_type": quant_type, "double_quant": bool(double), "kernel": "cpu"}
    if trained_on == "packed":
        given, quant_type = str(root / "packed"), "nf4"
    plan = _plan(root, trained_on=given)
    live = PeftModel.from_pretrained(
        _load_in_4bit(root / "base", quant_type, double_quant=bool(double)), str(root / "adapter")
    ).eval()
    with torch.inference_mode():
        expected = live(torch.tensor([IDS])).logits[0]
    ours = _logits(open_baseline(plan.baseline, SESSION, dtype="float32"))
    assert (ours - expected).norm() <= 1e-5 * expected.norm()
    original = _logits(open_baseline(CheckpointRef.of(root / "base", root / "adapter"), SESSION, dtype="float32"))
    assert (original - expected).norm() > 1e-2 * expected.norm()  # the two bases can be told apart
    for name, near in ((DEQUANTIZED, True), (ORIGINAL, False)):
        merged = _logits(open_merged(plan.on(name).merged, SESSION, dtype="float32", rounded=True))
        assert ((merged - expected).norm() <= 1e-5 * expected.norm()) == near


def test_a_build_measures_both_bases(root: Path, tmp_path: Path, lora2edge: Run) -> None:  # noqa: F811
    out = tmp_path / "out"
    outcome = lora2edge(
        "build", "--base", root / "base", "--adapter", root / "adapter", "--trained-on", root / "packed",
        "--target", "hf/merged", "--data", root / "data.jsonl", "--out", out, "--no-bench",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err + outcome.out
    report = json.loads((out / "report.json").read_text())
    check_report(report)
    found = report["merge_base"]
    kls = {name: each["kl_mean"]["value"] for name, each in found["measured"]["candidates"].items()}
    assert found["chosen"] == DEQUANTIZED and found["measured"]["decided"]
    assert kls[DEQUANTIZED] < 1e-6 < 1e-4 < kls[ORIGINAL]
    assert "original" in outcome.out and "dequantized" in outcome.out
    assert "Base of the merge" in (out / "report.html").read_text()
    # the artifact is measured against the live model on the quantized base, and so is what the adapter gained
    assert report["targets"]["hf/merged"]["quality"]["kl_mean"] < 1e-6
    artifact = out / "artifacts" / "hf-merged"
    manifest = json.loads((artifact / "manifest.json").read_text())
    recorded = manifest["inputs"]["merge_base"]
    assert recorded["chosen"] == DEQUANTIZED and recorded["method"] == MEASURE
    assert set(recorded["trained_on"]["files"]) >= {"config.json", "model.safetensors"}
    again = lora2edge("measure", artifact, "--json")
    assert again.code == 0, again.err
    assert json.loads(again.out)["quality"] == report["targets"]["hf/merged"]["quality"]
    other = lora2edge("measure", artifact, "--trained-on", "fp4", "--json")
    assert other.code == 2 and json.loads(other.out)["error"]["code"] == "other-model"


def test_an_artifact_remembers_the_settings(root: Path, tmp_path: Path, lora2edge: Run) -> None:  # noqa: F811
    """Without its build's recipe, `measure` takes them from the manifest."""
    out = tmp_path / "merged"
    given = ["--base", root / "base", "--adapter", root / "adapter"]
    made = lora2edge("merge", *given, "--trained-on", "FP4-double", "--merge-base", "dequantized", "--out", out)
    assert made.code == 0, made.err
    found = lora2edge("measure", out, *given, "--data", root / "data.jsonl", "--json")
    assert found.code == 0, found.err
    assert json.loads(found.out)["quality"]["kl_mean"] < 1e-6


def test_asking_for_the_original(root: Path, tmp_path: Path, lora2edge: Run) -> None:  # noqa: F811
    """It is merged exactly, and measured against what was trained."""
    out = tmp_path / "out"
    outcome = lora2edge(
        "build", "--base", root / "base", "--adapter", root / "adapter", "--trained-on", "nf4",
        "--merge-base", "original", "--target", "hf/merged", "--data", root / "data.jsonl", "--out", out,
        "--no-bench",
    )  # fmt: skip
    report = json.loads((out / "report.json").read_text())
    assert outcome.code == report["exit_code"]
    assert report["merge_base"]["measured"] is None and report["merge_base"]["chosen"] == ORIGINAL
    assert report["merge"]["math_kl"] < 1e-9
    assert report["targets"]["hf/merged"]["quality"]["kl_mean"] > 1e-4
    plain = _nll(open_baseline(CheckpointRef.of(root / "base"), SESSION, dtype="float32"), out)
    assert report["baseline"]["base"]["nll"] != pytest.approx(plain, rel=1e-4)  # that of the quantized base


def _nll(session: Any, out: Path) -> float:
    """Of the responses of the build's test text."""
    from lora2edge.plan import load_all_texts
    from lora2edge.quality.divergence import sample_nll

    plan = plan_build(load_recipe(out / "recipe.resolved.yaml", {"out": None}))
    samples = load_all_texts(plan).test
    logits = session.logits([sample.ids[:-1] for sample in samples], [list(sample.positions) for sample in samples])
    return float(sample_nll(logits, samples).sum() / sum(len(sample.positions) for sample in samples))


def test_merge_without_text_does_not_guess(root: Path, tmp_path: Path, lora2edge: Run) -> None:  # noqa: F811
    given = ["merge", "--base", root / "base", "--adapter", root / "adapter", "--trained-on", "nf4"]
    refused = lora2edge(*given, "--out", tmp_path / "a", "--json")
    assert refused.code == 2 and json.loads(refused.out)["error"]["code"] == "merge-base-unmeasured"
    assert not (tmp_path / "a").exists()
    told = lora2edge(*given, "--out", tmp_path / "a", "--merge-base", "dequantized")
    assert told.code == 0, told.err
    measured = lora2edge(*given, "--out", tmp_path / "b", "--data", root / "data.jsonl")
    assert measured.code == 0 and "KL against the live adapter" in measured.out
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in "ab")
    assert one == other
    recorded = json.loads((tmp_path / "b" / "manifest.json").read_text())["inputs"]["merge_base"]
    assert recorded["trained_on"]["settings"]["quant_type"] == "nf4"


def test_the_plan_says_what_will_be_measured(root: Path, lora2edge: Run) -> None:  # noqa: F811
    given = ["build", "--plan", "--base", root / "base", "--adapter", root / "adapter"]
    outcome = lora2edge(*given, "--trained-on", "nf4", "--json")
    plan = json.loads(outcome.out)
    assert plan["merge_base"]["method"] == MEASURE and "merge-base" in [stage["stage"] for stage in plan["stages"]]
    assert "both are measured" in lora2edge(*given, "--trained-on", "nf4").out
    assert json.loads(lora2edge(*given, "--json").out)["merge_base"] is None


# ---------------------------------------------------------------- what the adapter was trained on


def _find(root: Path, base: str = "base", adapters: list[Adapter] | None = None, **options: Any) -> Any:
    recipe = Recipe(base=str(root / base), adapter=str(root / "adapter"), **options)
    return find_bases(recipe, open_checkpoint(root / base), adapters or [read_adapter(root / "adapter")])


def test_a_plain_base_is_its_own(root: Path) -> None:
    for trained_on in (None, "16bit"):
        bases = _find(root, trained_on=trained_on)
        assert list(bases.candidates) == [ORIGINAL] and not bases.quantized and bases.record(ORIGINAL) is None


def test_a_packed_base_alone(root: Path) -> None:
    bases = _find(root, base="packed")
    assert list(bases.candidates) == [DEQUANTIZED] and bases.quantized
    assert bases.record(DEQUANTIZED)["trained_on"]["folder"] == "packed"


def test_a_packed_base_that_the_adapter_names(root: Path, tmp_path: Path) -> None:
    adapter = _naming(root, tmp_path, str(root / "packed"))
    bases = _find(root, adapters=[adapter])
    assert isinstance(bases.trained, StoredCheckpoint) and bases.trained.path == root / "packed"
    assert bases.method == MEASURE


def test_settings_in_a_recipe(root: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"base: {root / 'base'}\ntrained_on: {{quant_type: fp4, double_quant: true, dtype: bfloat16}}\n")
    bases = find_bases(load_recipe(recipe, {}), open_checkpoint(root / "base"), [])
    assert isinstance(bases.trained, RequantizedCheckpoint)
    assert (bases.trained.settings.quant_type, bases.trained.settings.dtype) == ("fp4", "BF16")


def test_the_dtype_is_the_base_s(root: Path) -> None:
    assert _find(root, trained_on="nf4").trained.settings.dtype == "F32"


def test_the_hub_name_of_a_quantized_base(root: Path, tmp_path: Path) -> None:
    """Nothing is at hand under that name: guessing either way could be a silently wrong baseline."""
    adapter = _naming(root, tmp_path, "unsloth/llama-3-8b-bnb-4bit")
    with pytest.raises(InputError) as caught:
        _find(root, adapters=[adapter])
    assert caught.value.code == "trained-on-unknown"
    assert "--trained-on unsloth/llama-3-8b-bnb-4bit or nf4-double" in caught.value.hint
    assert not _find(root, adapters=[adapter], trained_on="16bit").quantized


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("TheBloke/Llama-2-7B-AWQ", "--trained-on TheBloke/Llama-2-7B-AWQ; or 16bit"),
        ("/not/here/base-gptq", "--trained-on FOLDER; or 16bit"),
        ("/ckpt/mint8", None),
        ("org/waypoint4-8b", None),
    ],
)
def test_names_of_bases_that_are_not_here(name: str, hint: str | None, root: Path, tmp_path: Path) -> None:
    adapter = _naming(root, tmp_path, name)
    if hint is None:
        assert not _find(root, adapters=[adapter]).quantized
        return
    with pytest.raises(InputError) as caught:
        _find(root, adapters=[adapter])
    assert hint in caught.value.hint


def test_a_folder_named_like_a_preset(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nf4").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load_recipe(None, {"trained_on": "nf4"}).trained_on == "nf4"


@pytest.mark.parametrize(
    ("base", "options", "code"),
    [
        ("base", {"merge_base": "measure"}, "merge-base"),
        ("packed", {"merge_base": "original"}, "merge-base"),
        ("packed", {"merge_base": "measure"}, "merge-base"),
        ("packed", {"trained_on": "nf4"}, "trained-on"),
        ("packed", {"trained_on": "16bit"}, "trained-on"),
        ("base", {"trained_on": "int8"}, "trained-on"),
        ("base", {"trained_on": "no/such-checkpoint-here"}, "no-checkpoint"),
        ("base", {"trained_on": "nf5"}, "trained-on"),
        ("base", {"trained_on": "BASE"}, "trained-on"),
        ("base", {"trained_on": "OTHER"}, "other-base"),
    ],
)
def test_contradictions(
    base: str, options: dict[str, Any], code: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if options.get("trained_on") == "BASE":
        options = {"trained_on": str(root / "base")}
    if options.get("trained_on") == "OTHER":
        make_checkpoint(tmp_path / "wide", arch="llama", dtype="float32", tied=False, layers=1)
        _load_in_4bit(tmp_path / "wide", "nf4", double_quant=False).save_pretrained(tmp_path / "other")
        shutil.copyfile(root / "base" / "tokenizer.json", tmp_path / "other" / "tokenizer.json")
        options = {"trained_on": str(tmp_path / "other")}
    with pytest.raises(InputError) as caught:
        _find(root, base=base, **options)
    assert caught.value.code == code


def _naming(root: Path, folder: Path, base: str) -> Adapter:
    """The adapter with another name of its base."""
    shutil.copytree(root / "adapter", folder / "adapter")
    path = folder / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": base}))
    return read_adapter(folder / "adapter")
