"""The plan over the published configurations: header-only checkpoints of the bases that people tune."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora2edge.adapters import merge, read_adapter
from lora2edge.backends.hf import write_checkpoint
from lora2edge.checkpoint import open_checkpoint
from lora2edge.contracts import Machine
from lora2edge.errors import UnsupportedError
from lora2edge.progress import SILENT
from lora2edge.recipe import Recipe
from lora2edge.survey import Survey, check_code, survey_build
from lora2edge.target import load_target
from tests.public import (
    TRAP,
    is_linear,
    make_public_adapter,
    make_public_checkpoint,
    public_models,
    read_model,
    tensor_shapes,
)
from tests.public_table import MACHINE, PAGE, render, survey
from tests.tiny import make_data


@pytest.mark.parametrize("name", public_models())
def test_source_is_cited(name: str) -> None:
    model = read_model(name)
    assert model["source"] and model["id"].endswith(f"/{name}")
    for source in model["source"]:
        assert re.match(r"https://github\.com/[\w.-]+/[\w.-]+/(blob/[0-9a-f]{40}/\S+|issues/\d+)", source)


@pytest.mark.parametrize("name", public_models())
def test_size_is_that_of_the_name(name: str) -> None:
    found = re.search(r"(?:(\d+)x)?(\d+(?:\.\d+)?)[bB]\b", name)
    total = sum(math.prod(shape) for shape in tensor_shapes(name).values()) / 1e9
    if found is None:
        assert total == pytest.approx({"Phi": 3.82, "ber": 0.1095, "rob": 0.1247}[name[:3]], rel=0.02)
    elif found[1]:  # experts share the attention
        assert 0.8 * int(found[1]) * float(found[2]) < total < int(found[1]) * float(found[2])
    else:
        assert 0.85 * float(found[2]) < total < 1.35 * float(found[2])


def test_count_is_the_published_one() -> None:
    """The log that the configuration was read from counts the loaded model's parameters too: 494.03M."""
    total = sum(math.prod(shape) for shape in tensor_shapes("Qwen2.5-0.5B").values())
    assert round(total / 1e6, 2) == 494.03


@pytest.mark.parametrize("name", ["Qwen2.5-0.5B", "gemma-2-2b-it", "Phi-3-mini-4k-instruct"])
def test_adapter_is_what_peft_makes(name: str, tmp_path: Path) -> None:
    """Names and shapes against PEFT's own, on the meta device."""
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

    config = read_model(name)["config"]
    with torch.device("meta"):
        model = getattr(transformers, config["architectures"][0])(transformers.AutoConfig.for_model(**config))
        live = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    expected = {key: tuple(tensor.shape) for key, tensor in get_peft_model_state_dict(live).items()}
    base = make_public_checkpoint(tmp_path / "base", name)
    adapter = read_adapter(make_public_adapter(tmp_path / "adapter", base, name))
    assert {key: tensor.shape for key, tensor in adapter.reader.tensors.items()} == expected
    adapter.close()


def test_files_are_whole_and_take_no_room(tmp_path: Path) -> None:
    """safetensors' own reader accepts them."""
    from safetensors import safe_open

    name = "Qwen2.5-72B-Instruct"
    base = make_public_checkpoint(tmp_path / "base", name)
    shards = sorted(base.glob("*.safetensors"))
    assert len(shards) == 37 and sum(path.stat().st_size for path in shards) > 145e9
    assert sum(path.stat().st_blocks * 512 for path in base.iterdir()) < 4e6
    found = {}
    for shard in shards:
        with safe_open(shard, "np") as file:
            found.update({key: tuple(file.get_slice(key).get_shape()) for key in file.keys()})  # noqa: SIM118
    assert found == tensor_shapes(name)


def test_every_linear_layer_is_reached(tmp_path: Path) -> None:
    name = "Qwen3-30B-A3B"
    found = survey(tmp_path / name, name)
    (adapter,) = found.describe_adapters()
    shapes = tensor_shapes(name)
    linear = {key: shape for key, shape in shapes.items() if is_linear(key, shape)}
    assert (adapter["kind"], adapter["rank"]) == ("LoRA", 16)
    assert adapter["coverage"]["modules"] == len(linear) == 48 * (4 + 3 * 128)
    assert adapter["coverage"]["missed"] == ()
    assert adapter["coverage"]["unadapted"] == {"model.layers.*.mlp.gate": 48}
    assert adapter["delta"]["parameters"] == sum(16 * sum(shape) for shape in linear.values())
    assert adapter["delta"]["bytes"] == 4 * adapter["delta"]["parameters"]
    assert adapter["delta"]["changed"] == sum(math.prod(shape) for shape in linear.values())
    stages = {stage.stage: stage for stage in found.stages if stage.target in (None, "hf/merged")}
    assert stages["lower"].disk_bytes == 2 * sum(math.prod(shape) for shape in shapes.values())
    dense = sum(math.prod(shape) for key, shape in shapes.items() if ".experts." not in key)
    active = dense + (sum(math.prod(shape) for shape in shapes.values()) - dense) * 8 / 128
    assert stages["calibrate"].seconds == pytest.approx(2 * active * 32768 / 1e12)
    _close(found)


def test_the_disk_that_gptq_takes_on_the_way_is_told_apart(tmp_path: Path) -> None:
    found = survey(tmp_path, "Qwen2.5-0.5B")
    stages = {stage.target: stage for stage in found.stages if stage.stage == "lower"}
    for name in ("gguf/q4_0", "gguf/q8_0"):
        estimate, stage = found.estimates[name], stages[name]
        assert stage.disk_bytes == estimate.disk_bytes + estimate.scratch_bytes
        assert (f"{estimate.scratch_bytes / 1e6:,.1f} MB of the disk only" in stage.note) is (name == "gguf/q4_0")
    _close(found)


@pytest.mark.parametrize("with_text", [True, False])
def test_disk_on_the_way_is_asked_for_where_there_is_text(with_text: bool, tmp_path: Path) -> None:
    base = make_public_checkpoint(tmp_path / "base", "Qwen2.5-0.5B")
    adapter = make_public_adapter(tmp_path / "adapter", base, "Qwen2.5-0.5B")
    data = str(make_data(tmp_path / "data.jsonl", 4)) if with_text else None
    recipe, targets = Recipe(base=str(base), adapter=str(adapter), data=data), [load_target("gguf/q4_0")]
    needed = survey_build(recipe, targets, machine=MACHINE).estimates["gguf/q4_0"].disk_bytes
    found = survey_build(recipe, targets, machine=dataclasses.replace(MACHINE, disk_bytes=needed))
    assert any(error.code == "disk-full" for error in found.errors) is with_text
    _close(found)


def test_what_hits_nothing_is_told(tmp_path: Path) -> None:
    """An entry that the model has no module for is passed over by PEFT where others hit something."""
    name = "Qwen2.5-0.5B"
    base = make_public_checkpoint(tmp_path / "Qwen2.5-0.5B-Instruct", name)
    folder = make_public_adapter(tmp_path / "adapter", base, name)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["target_modules"] += ["query_key_value", "mlp.up_proj"]
    config["base_model_name_or_path"], config["revision"] = "Qwen/Qwen2.5-0.5B", "abc"
    (folder / "adapter_config.json").write_text(json.dumps(config))
    found = survey_build(Recipe(base=str(base), adapter=str(folder)), [load_target("hf/merged")], machine=_machine())
    (adapter,) = found.describe_adapters()
    assert adapter["coverage"]["missed"] == ("query_key_value",)
    match = adapter["match"]
    assert (match["named"], match["named_revision"]) == ("Qwen/Qwen2.5-0.5B", "abc")
    assert match["same_name"] is False and match["output_head"] == "the embedding"
    assert match["tokenizer_ids"] < match["embedding_rows"] == 151936
    (tmp_path / "Qwen2.5-0.5B-Instruct").rename(tmp_path / "qwen2.5-0.5b")
    again = survey_build(Recipe(base=str(tmp_path / "qwen2.5-0.5b"), adapter=str(folder)), [], machine=_machine())
    assert again.describe_adapters()[0]["match"]["same_name"] is True
    _close(found), _close(again)


def test_machine_refuses(tmp_path: Path) -> None:
    name = "Qwen2.5-7B"
    base = make_public_checkpoint(tmp_path / "base", name)
    recipe = Recipe(base=str(base), data=str(make_data(tmp_path / "data.jsonl", 4)))
    target = [load_target("gguf/q4_k_m")]
    small = survey_build(recipe, target, machine=_machine(ram=30e9, disk=4e9))
    assert [error.code for error in small.errors] == ["memory", "disk-full"]
    assert "31.3 GB" in small.errors[0].what
    assert not survey_build(recipe, target, machine=_machine(ram=32e9, disk=15e9)).errors


def test_page_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == render(), "write it anew: python -m tests.public_table"


def test_plan_of_72_billion_is_fast_and_small(tmp_path: Path) -> None:
    """The command, with a tokenizer as large as the model's: under 5 s and 300 MB."""
    name = "Qwen2.5-72B-Instruct"
    base = make_public_checkpoint(tmp_path / "base", name)
    _enlarge_tokenizer(base / "tokenizer.json", 151_643)
    adapter = make_public_adapter(tmp_path / "adapter", base, name)
    assert (base / "tokenizer.json").stat().st_size > 5.5e6
    seconds, megabytes, plan = _run("build", "--plan", "--json", "--base", base, "--adapter", adapter)
    assert set(plan["targets"]) == {"hf/merged", "gguf/q4_k_m"}
    assert plan["inputs"]["base"]["parameters"] == 72_706_203_648
    assert seconds < 5 and megabytes < 300, (seconds, megabytes)


def test_own_code_is_not_run(tmp_path: Path) -> None:
    """Qwen-7B of 2023, with one small layer: merged by names, its code copied along and never run."""
    base, adapter = _small_qwen(tmp_path)
    view = merge(open_checkpoint(base), [read_adapter(adapter)])
    (tmp_path / "merged").mkdir()
    write_checkpoint(view, tmp_path / "merged", SILENT)
    assert (tmp_path / "merged" / "modeling_qwen.py").read_text() == TRAP
    assert (tmp_path / "merged" / "qwen.tiktoken").read_text() == TRAP
    name = "transformer.h.0.attn.c_attn"
    plain, merged = _tensor(base, f"{name}.weight"), _tensor(tmp_path / "merged", f"{name}.weight")
    a, b = (_tensor(adapter, f"base_model.model.{name}.lora_{side}.weight") for side in "AB")
    np.testing.assert_allclose(merged, plain + 2 * b @ a, rtol=1e-5, atol=1e-6)
    view.close()


def test_own_code_is_refused_by_name(tmp_path: Path) -> None:
    base, adapter = _small_qwen(tmp_path)
    recipe = Recipe(base=str(base), adapter=str(adapter), data=str(make_data(tmp_path / "data.jsonl", 4)))
    targets = [load_target("hf/merged"), load_target("gguf/q4_k_m")]
    found = survey_build(recipe, targets, machine=_machine())
    (error,) = found.errors
    assert error.code == "custom-code" and "modeling_qwen.QWenLMHeadModel" in error.what
    assert "--trust-remote-code" in error.hint and "merge" in error.hint
    trusted = survey_build(recipe.model_copy(update={"trust_remote_code": True}), targets, machine=_machine())
    assert not trusted.errors
    assert set(found.estimates) == {"hf/merged"} and found.refused["gguf/q4_k_m"][0].code == "gguf-architecture"
    assert all("own code" in stage.note for stage in found.stages if stage.stage in {"prove", "calibrate", "measure"})
    without = survey_build(recipe.model_copy(update={"data": None}), targets[:1], machine=_machine())
    assert not without.refusals
    _close(found), _close(without)


def test_known_model_with_code_is_none_of_it() -> None:
    """Phi-3's config.json names code as well; transformers has a class of its own for it."""
    check_code(read_model("Phi-3-mini-4k-instruct")["config"])
    with pytest.raises(UnsupportedError):
        check_code(read_model("Qwen-7B")["config"])


def test_inspect_tells_the_plan(tmp_path: Path) -> None:
    name = "Llama-3.2-1B-Instruct"
    base = make_public_checkpoint(tmp_path / "base", name)
    adapter = make_public_adapter(tmp_path / "adapter", base, name)
    _, _, facts = _run("inspect", adapter, "--json")
    assert facts["kind"] == "adapter" and facts["plan"]["adapters"][0]["coverage"]["modules"] == 16 * 7
    assert {stage["stage"] for stage in facts["plan"]["stages"]} == {
        "merge", "prove", "calibrate", "baseline", "lower", "measure", "bench"
    }  # fmt: skip
    base.rename(tmp_path / "elsewhere")
    assert _run("inspect", adapter, "--json")[2]["plan"] is None
    assert _run("inspect", adapter, "--json", "--base", tmp_path / "elsewhere")[2]["plan"]["refused"]["build"] == []


def _machine(ram: float = 64e9, disk: float = 4e12) -> Machine:
    return Machine(16, int(ram), int(disk), None, 1e12)


def _close(found: Survey) -> None:
    for opened in (found.base, *found.adapters):
        if opened is not None:
            opened.close()


_MEASURED = """
import sys
from lora2edge.cli import main
try:
    main()
finally:
    sys.stderr.write(open("/proc/self/status").read())
"""
"""The command line, with the memory that it took at the end; a child's ru_maxrss would hold its parent's too."""


def _run(*arguments: Any) -> tuple[float, float, Any]:
    """Processor seconds (the wall time of an idle machine), peak memory in MB, and the JSON that the command prints."""
    started = _processor_seconds()
    command = [sys.executable, "-c", _MEASURED, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    peak = re.search(r"VmHWM:\s+(\d+) kB", done.stderr)
    assert peak, done.stderr
    return _processor_seconds() - started, int(peak[1]) * 1024 / 1e6, json.loads(done.stdout)


def _processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _enlarge_tokenizer(path: Path, size: int) -> None:
    data = json.loads(path.read_text(encoding="utf-8"))
    data["model"]["merges"] = merges = [" ".join(pair) for pair in data["model"]["merges"]]
    vocab = data["model"]["vocab"]
    singles = [token for token in vocab if len(token) == 1]
    known = list(vocab)
    taken = max(max(vocab.values()), *(item["id"] for item in data["added_tokens"])) + 1
    pairs = ((left, right) for left in known for right in singles if left + right not in vocab)
    while taken < size:
        left, right = next(pairs)
        vocab[left + right] = taken
        merges.append(f"{left} {right}")
        taken += 1
    path.write_text(json.dumps(data, ensure_ascii=False, indent=2), encoding="utf-8")


def _small_qwen(folder: Path) -> tuple[Path, Path]:
    """Random weights under Qwen-7B's names, one layer of width 8, and a LoRA of rank 2 on c_attn."""
    from safetensors.numpy import save_file

    model = read_model("Qwen-7B")
    rng = np.random.default_rng(0)
    sizes = {"vocab_size": 16, "hidden_size": 8, 12288: 24, 4096: 8, 11008: 12}
    tensors = {
        name.replace("*", "0"): rng.standard_normal([sizes[word] for word in words]).astype(np.float32)
        for name, words in model["tensors"].items()
    }
    base, adapter = folder / "qwen", folder / "adapter"
    base.mkdir(), adapter.mkdir()
    config = {**model["config"], "vocab_size": 16, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    (base / "config.json").write_text(json.dumps(config))
    for file in model["files"]:
        (base / file).write_text(TRAP)
    save_file(tensors, base / "model.safetensors")
    module = "base_model.model.transformer.h.0.attn.c_attn"
    pair = {"lora_A": rng.standard_normal((2, 8)), "lora_B": rng.standard_normal((24, 2))}
    save_file({f"{module}.{side}.weight": value.astype(np.float32) for side, value in pair.items()},
              adapter / "adapter_model.safetensors")  # fmt: skip
    lora = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["c_attn"], "task_type": "CAUSAL_LM"}
    (adapter / "adapter_config.json").write_text(json.dumps(lora))
    return base, adapter


def _tensor(folder: Path, name: str) -> Any:
    from safetensors.numpy import load_file

    (file,) = folder.glob("*.safetensors")
    return load_file(file)[name]
