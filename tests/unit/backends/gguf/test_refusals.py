"""What GGUF cannot hold is refused in the plan, by name, and all of it at once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora2edge.backends.gguf import GgufBackend
from lora2edge.checkpoint import open_checkpoint
from lora2edge.contracts import Machine
from lora2edge.errors import InputError, Refusals
from tests.damage import join_header, split_header
from tests.tiny import make_checkpoint
from tests.unit.backends.gguf.lowering import lower, target

MACHINE = Machine(cores=2, ram_bytes=8 << 30, disk_bytes=8 << 30, cuda=None)


@pytest.fixture(scope="module", params=["qwen2"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("base") / "hf", request.param, tied=False)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {arch: make_checkpoint(root / arch, arch) for arch in ("llama", "qwen3", "gemma2", "gemma3", "phi3")}


def changed(folder: Path, into: Path, name: str = "config.json", **values: Any) -> Path:
    """A copy of the checkpoint with values of a JSON file replaced; None removes one."""
    shutil.copytree(folder, into)
    data = json.loads((into / name).read_text())
    data.update(values)
    (into / name).write_text(json.dumps({key: value for key, value in data.items() if value is not None}))
    return into


def refusals(folder: Path, precision: str = "q4_k_m", **options: Any) -> dict[str, str]:
    """code → what was refused."""
    with pytest.raises(InputError) as caught:
        GgufBackend().check(open_checkpoint(folder), target(precision, **options), MACHINE)
    errors = caught.value.errors if isinstance(caught.value, Refusals) else (caught.value,)
    return {error.code: f"{error.what}; {error.why}; {error.hint}" for error in errors}


def test_an_unknown_architecture_is_named(base: Path, tmp_path: Path) -> None:
    found = refusals(changed(base, tmp_path / "x", architectures=["FalconForCausalLM"]))
    assert "FalconForCausalLM" in found["gguf-architecture"]
    assert "Qwen2ForCausalLM" in found["gguf-architecture"]


def test_a_config_that_names_two_models(base: Path, tmp_path: Path) -> None:
    """transformers would read the weights of one as the other."""
    found = refusals(changed(base, tmp_path / "hf", architectures=["LlamaForCausalLM"]))
    assert "LlamaForCausalLM" in found["config-key"] and "qwen2" in found["config-key"]


def test_several_problems_come_together(base: Path, tmp_path: Path) -> None:
    folder = changed(base, tmp_path / "x", architectures=["NothingForCausalLM"])
    found = refusals(folder, precision="q9_z", imatrx=True, library="mine", context_length=0)
    assert set(found) == {"gguf-architecture", "gguf-precision", "gguf-option"}


@pytest.mark.parametrize(
    ("option", "value"), [("imatrx", True), ("imatrix", 1), ("tokenizer", "lax"), ("context_length", True)]
)
def test_options_are_checked(base: Path, option: str, value: Any) -> None:
    assert option in refusals(base, **{option: value})["gguf-option"]


@pytest.mark.parametrize(
    ("arch", "values", "words"),
    [
        ("qwen3", {"attention_bias": True}, "attention_bias"),
        ("llama", {"hidden_act": "gelu"}, "activation is gelu"),
        ("gemma2", {"query_pre_attn_scalar": 99}, "query_pre_attn_scalar is 99"),
        ("gemma2", {"attn_logit_softcapping": 0}, "attn_logit_softcapping is off"),
        ("gemma2", {"layer_types": ["full_attention", "full_attention"]}, "pattern of sliding-window"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "attention logits are capped"),
        ("gemma3", {"use_bidirectional_attention": True}, "bidirectional"),
        ("phi3", {"head_dim": 32}, "head_dim is 32"),
    ],
)
def test_what_the_graph_takes_for_granted(
    bases: dict[str, Path], arch: str, values: dict[str, Any], words: str, tmp_path: Path
) -> None:
    assert words in refusals(changed(bases[arch], tmp_path / "x", **values))["gguf-config"]


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
        {"rope_type": "llama3", "factor": 2.0, "rope_theta": 1e4},
        {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16, "original_max_position_embeddings": 64},
        {"rope_type": "yarn", "factor": 4.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 64},
        {"rope_type": "linear", "factor": 2.0, "mrope_section": [16, 24, 24]},
    ],
)
def test_a_rope_that_would_be_ignored(base: Path, rope: dict[str, Any], tmp_path: Path) -> None:
    assert "gguf-rope" in refusals(changed(base, tmp_path / "x", rope_parameters=rope))


def test_a_tensor_without_a_place_and_a_place_without_a_tensor(base: Path, tmp_path: Path) -> None:
    found = refusals(changed(base, tmp_path / "x", num_hidden_layers=1))
    assert "model.layers.1." in found["gguf-tensor"]
    found = refusals(changed(base, tmp_path / "y", num_hidden_layers=3))
    assert "model.layers.2" in found["missing-tensors"]
    renamed = changed(base, tmp_path / "z")
    for path in renamed.glob("*.safetensors"):
        header, data = split_header(path)
        join_header(path, {key.replace("model.norm.", "model.other."): value for key, value in header.items()}, data)
    for path in renamed.glob("*.index.json"):
        path.write_text(path.read_text().replace("model.norm.", "model.other."))
    found = refusals(renamed)
    assert "model.other.weight" in found["gguf-tensor"]
    assert "model.norm.weight" in found["gguf-tensor-missing"]


def test_shapes_give_both_numbers(base: Path, tmp_path: Path) -> None:
    found = refusals(changed(base, tmp_path / "x", intermediate_size=100))
    assert "[128, 64]" in found["gguf-shape"]
    assert "[100, 64]" in found["gguf-shape"]


@pytest.mark.parametrize(("value", "code"), [("two", "bad-config"), (-1, "bad-config"), (True, "bad-config"),
                                             (10**9, "missing-tensors")])  # fmt: skip
def test_absurd_configs_are_no_traceback(base: Path, value: Any, code: str, tmp_path: Path) -> None:
    assert set(refusals(changed(base, tmp_path / "x", num_hidden_layers=value))) == {code}


def test_a_classifier_is_refused(base: Path) -> None:
    class Classifier:
        def __init__(self) -> None:
            self._base = open_checkpoint(base)
            self.task = "sequence-classification"

        def __getattr__(self, name: str) -> Any:
            return getattr(self._base, name)

    with pytest.raises(InputError, match="sequence-classification"):
        GgufBackend().check(Classifier(), target("q8_0"), MACHINE)  # type: ignore[arg-type]


def test_a_tied_head_that_differs_is_refused(base: Path, tmp_path: Path) -> None:
    folder = changed(base, tmp_path / "x", tie_word_embeddings=True)
    with pytest.raises(InputError) as caught:
        lower(open_checkpoint(folder), tmp_path / "out", "q8_0")
    assert caught.value.code == "tied-head"
    assert not (tmp_path / "out" / "model.gguf").exists()


@pytest.mark.parametrize(("value", "precision"), [(np.nan, "q8_0"), (np.inf, "f32"), (1e6, "q4_0"), (3.4e38, "bf16")])
def test_a_weight_that_cannot_be_held_is_named(base: Path, value: float, precision: str, tmp_path: Path) -> None:
    class Damaged:
        def __init__(self) -> None:
            self._base = open_checkpoint(base)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._base, name)

        def rows(self, name: str, start: int, stop: int) -> Any:
            rows = self._base.rows(name, start, stop)
            if name.endswith("1.mlp.down_proj.weight"):
                rows[-1, -1] = value
            return rows

    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.down_proj\.weight") as caught:
        lower(Damaged(), tmp_path / "out", precision)  # type: ignore[arg-type]
    assert caught.value.code == ("weight-range" if np.isfinite(value) else "weight-not-finite")
