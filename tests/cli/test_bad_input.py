"""Bad input: one clear error each, exit code 2, no traceback, nothing left behind."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.cli.conftest import Model, Outcome
from tests.tiny import make_checkpoint

Run = Callable[..., Outcome]
NAMESPACE = ["unshare", "--mount", "--user", "--map-root-user", "sh", "-c"]
"""A shell that may mount file systems of its own."""


def refused(outcome: Outcome, code: str, out: Path) -> str:
    """Asserts on the one error, and that nothing was written to `out`; returns its text."""
    assert outcome.code == 2, outcome
    assert outcome.err.count("error[") == 1, outcome.err
    assert f"error[{code}]" in outcome.err
    assert "Traceback" not in outcome.err
    assert "hint:" in outcome.err
    assert not out.exists() or not any(out.iterdir())
    return outcome.err


def build(
    run: Run,
    model: Model,
    out: Path,
    *more: str,
    base: Path | None = None,
    adapter: Path | None = None,
    target: str | Path = "gguf/q8_0",
    data: str | Path | None = None,
) -> Outcome:
    arguments = {"base": base or model.base, "adapter": adapter or model.adapter, "target": target,
                 "data": data or model.data, "out": out}  # fmt: skip
    return run("build", *(part for name, value in arguments.items() for part in (f"--{name}", value)), *more)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def adapter(model: Model, tmp_path: Path) -> Path:
    """A copy of the adapter that a test may break."""
    return Path(shutil.copytree(model.adapter, tmp_path / "adapter"))


@pytest.fixture
def base(model: Model, tmp_path: Path) -> Path:
    """A copy of the base that a test may break."""
    return Path(shutil.copytree(model.base, tmp_path / "base"))


def change_tensors(folder: Path, change: Callable[[str, np.ndarray], np.ndarray]) -> None:
    path = folder / "adapter_model.safetensors"
    save_file({name: change(name, tensor) for name, tensor in load_file(path).items()}, path)


def test_adapter_for_another_base(lora2edge: Run, model: Model, out: Path, tmp_path: Path) -> None:
    other = make_checkpoint(tmp_path / "other", hidden=128)
    refused(build(lora2edge, model, out, base=other), "adapter-other-base", out)


def test_missing_shard(lora2edge: Run, model: Model, out: Path, tmp_path: Path) -> None:
    sharded = make_checkpoint(tmp_path / "sharded", hidden=256, intermediate=256, shards=2)
    victim = sorted(sharded.glob("model-*.safetensors"))[-1]
    victim.unlink()
    assert victim.name in refused(build(lora2edge, model, out, base=sharded), "missing-shard", out)


def test_truncated_safetensors(lora2edge: Run, model: Model, out: Path, base: Path) -> None:
    path = base / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    refused(build(lora2edge, model, out, base=base), "bad-safetensors", out)


def test_wrong_shape(lora2edge: Run, model: Model, out: Path, adapter: Path) -> None:
    change_tensors(adapter, lambda name, x: x[:, :-8].copy() if "layers.1.self_attn.q_proj.lora_A" in name else x)
    text = refused(build(lora2edge, model, out, adapter=adapter), "adapter-shape", out)
    assert "248" in text and "256" in text


def test_nan(lora2edge: Run, model: Model, out: Path, adapter: Path) -> None:
    change_tensors(adapter, lambda name, x: np.full_like(x, np.nan) if "layers.0.mlp.up_proj.lora_B" in name else x)
    assert "layers.0.mlp.up_proj" in refused(build(lora2edge, model, out, adapter=adapter), "adapter-nan", out)


def test_pickle(lora2edge: Run, model: Model, out: Path, adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    assert "safetensors" in refused(build(lora2edge, model, out, adapter=adapter), "adapter-pickle", out)


def test_unknown_target(lora2edge: Run, model: Model, out: Path) -> None:
    outcome = build(lora2edge, model, out, target="gguf/q4km")
    assert "gguf/q4_k_m" in refused(outcome, "unknown-target", out)


def test_unknown_target_key(lora2edge: Run, model: Model, out: Path, tmp_path: Path) -> None:
    target = tmp_path / "mine.yaml"
    target.write_text("name: mine\nbackend: gguf\nprecision: q8_0\nquantisation: x\ngates: {kl: {max: 1}}\n")
    outcome = build(lora2edge, model, out, target=target)
    text = refused(outcome, "target-keys", out)
    assert "quantisation" in text and "gates.kl" in text


def test_unknown_option_key(lora2edge: Run, model: Model, out: Path, tmp_path: Path) -> None:
    target = tmp_path / "mine.yaml"
    target.write_text("name: mine\nbackend: gguf\nprecision: q8_0\noptions: {imatrx: true}\n")
    outcome = build(lora2edge, model, out, target=target)
    assert "imatrix" in refused(outcome, "gguf-option", out)


def test_unsupported_architecture(lora2edge: Run, model: Model, out: Path, base: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    config["architectures"], config["model_type"] = ["FalconForCausalLM"], "falcon"
    (base / "config.json").write_text(json.dumps(config))
    assert "FalconForCausalLM" in refused(build(lora2edge, model, out, base=base), "gguf-architecture", out)


def test_vocabulary_larger_than_embedding(lora2edge: Run, model: Model, out: Path, base: Path) -> None:
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][-1], "id": 99_999, "content": "<|more|>"})
    (base / "tokenizer.json").write_text(json.dumps(tokenizer))
    text = refused(build(lora2edge, model, out, base=base), "vocabulary-too-large", out)
    assert "100000" in text.replace(",", "").replace(" ", "")


def test_out_not_ours(lora2edge: Run, model: Model, out: Path) -> None:
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    outcome = build(lora2edge, model, out)
    assert outcome.code == 2 and "error[out-not-ours]" in outcome.err and "--force" in outcome.err
    assert [path.name for path in out.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("verb", ["merge", "lower", "build"])
def test_out_in_a_file(lora2edge: Run, model: Model, tmp_path: Path, verb: str) -> None:
    file = tmp_path / "file"
    file.write_text("text")
    outcome = run_verb(lora2edge, verb, model, file / "out")
    refused(outcome, "out-is-file", file / "out")
    assert f"{file} is a file" in outcome.err


@pytest.mark.parametrize("verb", ["merge", "lower", "build"])
def test_out_that_leads_to_itself(lora2edge: Run, model: Model, tmp_path: Path, verb: str) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    outcome = run_verb(lora2edge, verb, model, loop)
    assert outcome.code == 2 and "error[bad-out]" in outcome.err and "link" in outcome.err


@pytest.mark.parametrize(("verb", "length"), [("merge", 250), ("merge", 300), ("lower", 300), ("build", 300)])
def test_out_of_a_long_name(lora2edge: Run, model: Model, tmp_path: Path, verb: str, length: int) -> None:
    outcome = run_verb(lora2edge, verb, model, tmp_path / ("x" * length))
    assert outcome.code == 2 and "error[bad-out]" in outcome.err and "too long" in outcome.err
    assert list(tmp_path.iterdir()) == []


def run_verb(run: Run, verb: str, model: Model, out: Path) -> Outcome:
    more = {"merge": [], "lower": ["--target", "gguf/q8_0"], "build": ["--target", "gguf/q8_0", "--data", model.data]}
    return run(verb, "--base", model.base, "--adapter", model.adapter, "--out", out, *more[verb])


def test_merge_to_a_link(lora2edge: Run, model: Model, tmp_path: Path) -> None:
    """As of an --out that leads to a larger disk."""
    disk, link = tmp_path / "disk", tmp_path / "link"
    disk.mkdir()
    link.symlink_to(disk)
    for _ in range(2):
        assert run_verb(lora2edge, "merge", model, link).code == 0
    assert link.is_symlink() and (disk / "manifest.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "link"]


@pytest.mark.parametrize("verb", ["merge", "lower --target gguf/q8_0"])
def test_file_larger_than_allowed(model: Model, tmp_path: Path, verb: str) -> None:
    out = tmp_path / "out"
    script = (
        f"ulimit -f 256; {sys.executable} -m lora2edge {verb} --base {model.base} --adapter {model.adapter} --out {out}"
    )
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "error[file-too-large]" in done.stderr and "Traceback" not in done.stderr
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


def test_bad_data_line(lora2edge: Run, model: Model, out: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "a", "response": "b"}\n{"question": "c"}\n')
    outcome = build(lora2edge, model, out, target="gguf/q8_0", data=data)
    assert f"{data}:2" in refused(outcome, "bad-line", out)


def test_all_problems_at_once(lora2edge: Run, model: Model, out: Path, adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    outcome = build(lora2edge, model, out, adapter=adapter, target="gguf/q9", data="nowhere.jsonl")
    assert outcome.code == 2
    for code in ("adapter-pickle", "unknown-target", "no-data"):
        assert f"error[{code}]" in outcome.err


def test_error_as_json(lora2edge: Run, model: Model, out: Path) -> None:
    outcome = build(lora2edge, model, out, "--json", target="gguf/q9")
    assert outcome.code == 2
    assert json.loads(outcome.out)["error"]["code"] == "unknown-target"


def test_several_errors_as_json(lora2edge: Run, model: Model, out: Path) -> None:
    outcome = build(lora2edge, model, out, "--json", target="gguf/q9", data="nowhere.jsonl")
    assert outcome.code == 2
    errors = json.loads(outcome.out)["error"]["errors"]
    assert {error["code"] for error in errors} == {"unknown-target", "no-data"}
    assert all(error["what"] and error["why"] for error in errors)


def test_usage_error_as_json(lora2edge: Run) -> None:
    for arguments in (["build", "--frob", "--json"], ["frob", "--json"], ["measure", "--json"]):
        outcome = lora2edge(*arguments)
        assert outcome.code == 2
        assert json.loads(outcome.out)["error"]["code"] == "usage" and outcome.err == ""


@pytest.mark.parametrize("scenario", ["gone.yaml", "chatt"])
def test_missing_scenario_is_refused_in_the_plan(
    lora2edge: Run, model: Model, out: Path, tmp_path: Path, scenario: str
) -> None:
    target = tmp_path / "mine.yaml"
    target.write_text(f"name: mine\nbackend: gguf\nprecision: q8_0\nscenarios: [{scenario}]\n")
    outcome = build(lora2edge, model, out, "--plan", target=target)
    assert outcome.code == 2 and ("unknown-scenario" in outcome.err or "yaml-unreadable" in outcome.err)


def test_scenario_lies_beside_its_target(lora2edge: Run, model: Model, out: Path, tmp_path: Path) -> None:
    (tmp_path / "short.yaml").write_text("new_tokens: 4\n")
    target = tmp_path / "mine.yaml"
    target.write_text("name: mine\nbackend: gguf\nprecision: q8_0\nscenarios: [short.yaml]\n")
    assert build(lora2edge, model, out, "--plan", target=target).code == 0


def test_shared_refusal_is_told_once(lora2edge: Run, model: Model, out: Path, base: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    config["architectures"] = ["FalconForCausalLM"]
    (base / "config.json").write_text(json.dumps(config))
    refused(build(lora2edge, model, out, "--target", "gguf/q4_0", base=base), "gguf-architecture", out)


def test_no_test_prompt_leaves_nothing(lora2edge: Run, model: Model, out: Path, tmp_path: Path) -> None:
    data = tmp_path / "same.jsonl"
    data.write_text('{"prompt": "the same", "response": "b"}\n{"prompt": "the same", "response": "c"}\n')
    refused(build(lora2edge, model, out, data=data), "no-test-text", out)


def test_base_that_the_adapter_names_is_gone(lora2edge: Run, model: Model, out: Path, adapter: Path) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    config |= {"base_model_name_or_path": "/gone/base", "revision": "abc"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    options = ["--adapter", adapter, "--target", "gguf/q8_0", "--data", model.data, "--out", out]
    text = refused(lora2edge("build", *options), "no-checkpoint", out)
    assert "/gone/base@abc" in text and "--base" in text


def test_merge_never_takes_a_folder_away(lora2edge: Run, model: Model, base: Path, tmp_path: Path) -> None:
    foreign, built = tmp_path / "foreign", tmp_path / "built"
    for folder, name in ((foreign, "thesis.tex"), (built, "recipe.resolved.yaml")):
        folder.mkdir()
        (folder / name).write_text("x")
        outcome = lora2edge("merge", "--base", base, "--adapter", model.adapter, "--out", folder)
        assert outcome.code == 2 and "error[out-not-ours]" in outcome.err and (folder / name).exists()
    for folder in (base, base.parent):
        outcome = lora2edge("merge", "--base", base, "--adapter", model.adapter, "--out", folder, "--force")
        assert outcome.code == 2 and "error[out-is-input]" in outcome.err and (base / "config.json").exists()


def test_damaged_artifact_is_not_measured(lora2edge: Run, model: Model, out: Path) -> None:
    options = ["--base", model.base, "--adapter", model.adapter, "--target", "gguf/q8_0", "--out", out]
    assert lora2edge("lower", *options).code == 0
    assert json.loads(lora2edge("lower", "--json", *options).out)[0]["reused"]
    file = out / "artifacts" / "gguf-q8_0" / "model.gguf"
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)
    outcome = lora2edge("measure", file.parent, "--base", model.base, "--adapter", model.adapter, "--data", model.data)
    assert outcome.code == 2 and "error[artifact-changed]" in outcome.err
    assert not json.loads(lora2edge("lower", "--json", *options).out)[0]["reused"]


def test_stage_that_dies_stops_its_target_only(lora2edge: Run, model: Model, out: Path, tmp_path: Path) -> None:
    """An interpreter that kills itself, as the kernel does when memory runs out."""
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nkill -9 $$\n")
    python.chmod(0o755)
    target = tmp_path / "mine.yaml"
    target.write_text(f"name: mine\nbackend: gguf\nprecision: q8_0\npython: {python}\n")
    gone = tmp_path / "gone.yaml"
    gone.write_text("name: gone\nbackend: gguf\nprecision: q8_0\npython: /no/such/python\n")
    (out / "artifacts" / "mine").mkdir(parents=True)  # of an earlier build
    (out / "recipe.resolved.yaml").write_text("")
    outcome = build(lora2edge, model, out, "--json", "--no-bench", "--target", str(gone), target=target)
    assert outcome.code == 2, outcome.err
    targets = json.loads(outcome.out)["targets"]
    assert targets["mine"]["error"]["code"] == "stage-killed" and "SIGKILL" in targets["mine"]["error"]["what"]
    assert targets["gone"]["error"]["code"] == "stage-python"
    assert not (out / "artifacts" / "mine").exists()


def in_namespace(script: str) -> subprocess.CompletedProcess[str]:
    """Runs the shell script where it may mount; skips only where a mount that does nothing else is refused too."""
    probe = subprocess.run([*NAMESPACE, "mount -t tmpfs none /tmp"], capture_output=True, text=True)
    if probe.returncode:
        pytest.skip(f"no user namespaces here: {probe.stderr.strip()}")
    return subprocess.run([*NAMESPACE, script], capture_output=True, text=True)


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
def test_full_disk(model: Model, tmp_path: Path) -> None:
    """A file system of 64 KiB, in a namespace of its own so that no rights are needed."""
    disk = tmp_path / "disk"
    disk.mkdir()
    script = (
        f"mount -t tmpfs -o size=64k none {disk} || exit 77; "
        f"{sys.executable} -m lora2edge merge --base {model.base} --adapter {model.adapter} --out {disk}/out; "
        f"code=$?; ls -A {disk}; exit $code"
    )
    done = in_namespace(script)
    assert done.returncode == 2, done.stderr
    assert "error[disk-full]" in done.stderr
    assert done.stdout == ""


def test_read_only_folder(model: Model, tmp_path: Path) -> None:
    """A read-only file system, as root writes into a folder without the right to."""
    disk = tmp_path / "disk"
    disk.mkdir()
    script = (
        f"mount -t tmpfs -o ro none {disk} || exit 77; "
        f"{sys.executable} -m lora2edge merge --base {model.base} --adapter {model.adapter} --out {disk}/out"
    )
    done = in_namespace(script)
    assert done.returncode == 2, done.stderr
    assert "error[read-only]" in done.stderr
