"""The merged view against PEFT's live adapter, for every kind of adapter and both kinds of tying."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen2Config,
    Qwen2ForSequenceClassification,
)

from lora2edge.adapters import merge, open_view, read_adapter, written_config
from lora2edge.adapters.kinds.lora import PairUpdate
from lora2edge.backends.hf.write import write_checkpoint
from lora2edge.checkpoint import open_checkpoint
from lora2edge.contracts import CheckpointRef
from lora2edge.errors import AdapterError, CheckpointError, ProofError
from lora2edge.progress import SILENT
from tests.architectures import ARCHITECTURES, make_model
from tests.tiny import CHATML, bpe_tokenizer, make_adapter, make_checkpoint, randomize, shake_adapter

IDS = torch.tensor([[5, 300, 77, 401, 12, 9, 600, 333, 2, 41, 150, 700]])
FLOAT32_NOISE = 2e-4
"""Largest difference of logits of size 8 that float32 arithmetic in another order gives; a lost part gives > 0.05."""


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {tied: make_checkpoint(root / f"tied-{tied}", "qwen2", dtype="float32", tied=tied) for tied in (True, False)}


def write_merged(base: Path, adapter: Path, out: Path) -> Any:
    view = merge(open_checkpoint(base), [read_adapter(adapter)])
    out.mkdir()
    write_checkpoint(view, out, SILENT)
    return view


def logits(folder: Path, adapter: Path | None = None) -> torch.Tensor:
    """In float32, whatever the stored dtype."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        return model.eval()(IDS).logits


def assert_same_as_live(base: Path, adapter: Path, out: Path, noise: float = FLOAT32_NOISE) -> Any:
    view = write_merged(base, adapter, out)
    live = logits(base, adapter)
    assert (live - logits(base)).abs().max() > 0.05, "the adapter does nothing"
    assert (live - logits(out)).abs().max() < noise
    return view


KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "patterns": {
        "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.down_proj": 6},
        "alpha_pattern": {"^model.layers.0.self_attn.k_proj": 32, "o_proj": 1, "v": 99},
    },
    "regex-targets": {"targets": r".*layers\.1\..*(q_proj|up_proj)"},
    "saved-norm": {"modules_to_save": ["norm", "input_layernorm"]},
    "saved-linear-with-bias": {"targets": ["up_proj"], "modules_to_save": ["q_proj"]},
    "lora-embedding": {"targets": ["embed_tokens", "q_proj"]},
    "lora-head": {"targets": ["lm_head", "q_proj"]},
    "lora-both": {"targets": ["lm_head", "embed_tokens"]},
    "lora-embedding-saved-head": {"targets": ["embed_tokens"], "modules_to_save": ["lm_head"]},
    "saved-embedding": {"modules_to_save": ["embed_tokens"]},
    "saved-head": {"modules_to_save": ["lm_head"]},
    "saved-both": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "tying-lora-embedding": {"targets": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
    "tying-lora-head": {"targets": ["lm_head", "q_proj"], "ensure_weight_tying": True},
    "tying-lora-both": {"targets": ["lm_head", "embed_tokens"], "ensure_weight_tying": True},
    "tying-saved-embedding": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "tying-saved-both": {"modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
    "dora": {"use_dora": True},
    "dora-rslora": {"use_dora": True, "use_rslora": True},
    "dora-embedding": {"use_dora": True, "targets": ["embed_tokens", "q_proj"]},
    "dora-head": {"use_dora": True, "targets": ["lm_head", "q_proj"]},
    "biases": {"lora_bias": True, "targets": ["q_proj", "k_proj", "v_proj"]},
    "tokens": {"trainable_token_indices": [5, 300, 77]},
    "tokens-by-name": {"trainable_token_indices": {"embed_tokens": [5, 300]}},
    "tokens-of-both": {"trainable_token_indices": {"embed_tokens": [5, 300], "lm_head": [5, 12]}},
    "tying-tokens": {"trainable_token_indices": [5, 300, 77], "ensure_weight_tying": True},
}
UNTIES = {
    "lora-embedding", "lora-head", "lora-both", "lora-embedding-saved-head", "saved-embedding", "saved-head",
    "saved-both", "dora-embedding", "dora-head", "tokens-of-both",
}  # fmt: skip


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", KINDS)
def test_merged_answers_like_the_live_adapter(kind: str, tied: bool, bases: dict[bool, Path], tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", bases[tied], **KINDS[kind])
    view = assert_same_as_live(bases[tied], adapter, tmp_path / "out")
    account = view.account()
    sums = {side: sorted(name for names in roles.values() for name in names) for side, roles in account.items()}
    assert sums["base"] == sorted(load_file(bases[tied] / "model.safetensors"))
    assert sums["adapter"] == sorted(load_file(adapter / "adapter_model.safetensors"))
    assert sorted(sums["base"] + sums["added"]) == sorted(load_file(tmp_path / "out" / "model.safetensors"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is (tied and kind not in UNTIES)
    assert ("lm_head.weight" in view.tensors) is (kind in UNTIES or not tied)


@pytest.mark.parametrize("arch", ["llama", "mistral", "qwen3", "gemma2", "gemma3", "phi3"])
def test_architectures(arch: str, tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base", arch, dtype="float32", shards=2, tied=arch != "mistral")
    adapter = make_adapter(tmp_path / "adapter", base)
    assert_same_as_live(base, adapter, tmp_path / "out", noise=1e-3 if arch.startswith("gemma") else FLOAT32_NOISE)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_rounded_once(dtype: str, tmp_path: Path) -> None:
    """Every stored value is the nearest to the float64 sum, but for near-ties that float32 (24 bits) cannot tell."""
    base = make_checkpoint(tmp_path / "base", "qwen2", dtype=dtype)
    adapter = make_adapter(tmp_path / "adapter", base, r=4, alpha=6)
    view = write_merged(base, adapter, tmp_path / "out")
    stored, merged = load_file(base / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    low_rank = load_file(adapter / "adapter_model.safetensors")
    differ = total = 0
    for name, weight in stored.items():
        key = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{key}.lora_A.weight" in low_rank:
            a, b = low_rank[f"{key}.lora_A.weight"].double(), low_rank[f"{key}.lora_B.weight"].double()
            exact = weight.double() + 1.5 * (b @ a)
            differ += int((exact.to(weight.dtype) != merged[name]).sum())
            total += exact.numel()
        else:
            assert torch.equal(weight, merged[name])
    assert total > 50_000
    assert differ <= total * (1e-4 if dtype == "bfloat16" else 1e-3)
    assert view.adapted == {name for name in stored if name.endswith("proj.weight")}


def make_gpt2(base: Path) -> Any:
    config = GPT2Config(vocab_size=768, n_embd=64, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config).eval()
    randomize(model, 0)
    model.save_pretrained(base)
    bpe_tokenizer().save_pretrained(base)
    return AutoModelForCausalLM.from_pretrained(base)


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"lora_bias": True}, {"trainable_token_indices": [5, 9]}])
def test_conv1d_with_variants(settings: dict[str, Any], tmp_path: Path) -> None:
    targets = ["c_attn", "c_proj", "c_fc"]
    peft = get_peft_model(
        make_gpt2(tmp_path / "base"), LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM", **settings)
    )
    shake_adapter(peft)
    peft.save_pretrained(tmp_path / "adapter")
    assert_same_as_live(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")


@pytest.mark.parametrize("arch", ["llama", "qwen3", "gemma2"])
def test_biases_that_the_base_lacks(arch: str, tmp_path: Path) -> None:
    """Zeros beside the added ones, and config.json says that the layers have a bias."""
    base = make_checkpoint(tmp_path / "base", arch, dtype="float32")
    adapter = make_adapter(tmp_path / "adapter", base, targets=["q_proj", "o_proj"], lora_bias=True)
    view = assert_same_as_live(base, adapter, tmp_path / "out", noise=1e-3 if arch == "gemma2" else FLOAT32_NOISE)
    assert view.config["attention_bias"] is True
    assert "model.layers.1.self_attn.v_proj.bias" in view.tensors
    assert not view.rows("model.layers.1.self_attn.v_proj.bias", 0, 3).any()
    assert view.stored("model.layers.1.self_attn.v_proj.bias") is None


def test_biases_that_the_architecture_cannot_hold(bases: dict[bool, Path], tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", bases[True], targets=["q_proj", "o_proj"], lora_bias=True)
    with pytest.raises(AdapterError, match="no place for it") as error:
        merge(open_checkpoint(bases[True]), [read_adapter(adapter)])
    assert error.value.code == "adapter-bias"


def test_conv1d_stores_the_weight_the_other_way(tmp_path: Path) -> None:
    """GPT-2's attention c_proj is square: only the layer's class tells how it is stored."""
    base = tmp_path / "base"
    model = make_gpt2(base)
    targets = ["c_attn", "c_proj", "c_fc"]
    peft = get_peft_model(model, LoraConfig(r=4, target_modules=targets, fan_in_fan_out=True, task_type="CAUSAL_LM"))
    shake_adapter(peft)
    peft.save_pretrained(tmp_path / "adapter")
    assert_same_as_live(base, tmp_path / "adapter", tmp_path / "out")
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({**settings, "fan_in_fan_out": False}))
    assert_same_as_live(base, tmp_path / "adapter", tmp_path / "again")


@pytest.mark.parametrize("arch", ["bert", "qwen2"])
def test_classifiers(arch: str, tmp_path: Path) -> None:
    """PEFT saves the classification head whole, under one of the two names that it lists."""
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    if arch == "bert":
        model = BertForSequenceClassification(BertConfig(vocab_size=768, num_labels=3, **shape))
    else:
        config = Qwen2Config(vocab_size=768, num_labels=3, num_key_value_heads=2, pad_token_id=0, **shape)
        model = Qwen2ForSequenceClassification(config)
    randomize(model, 0)
    model.save_pretrained(tmp_path / "base")
    bpe_tokenizer().save_pretrained(tmp_path / "base")
    targets = ["query", "value", "dense"] if arch == "bert" else ["q_proj", "up_proj"]
    peft = get_peft_model(model, LoraConfig(r=4, target_modules=targets, task_type="SEQ_CLS"))
    shake_adapter(peft)
    peft.save_pretrained(tmp_path / "adapter")
    view = write_merged(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert view.task == "sequence-classification"
    reload = AutoModelForSequenceClassification.from_pretrained
    with torch.no_grad():
        live = PeftModel.from_pretrained(reload(tmp_path / "base"), tmp_path / "adapter").eval()(IDS).logits
        merged = reload(tmp_path / "out").eval()(IDS).logits
        plain = reload(tmp_path / "base").eval()(IDS).logits
    assert (live - plain).abs().max() > 0.05
    assert (live - merged).abs().max() < FLOAT32_NOISE


def test_experts_that_were_adapted_one_by_one(tmp_path: Path) -> None:
    """As transformers 4 had them, a module each; 5 has no such modules, so the reference is the formula."""
    make_model(ARCHITECTURES["qwen3_moe"], tmp_path / "base")
    module = "model.layers.1.mlp.experts.2.up_proj"
    a, b = torch.randn(4, 32), torch.randn(24, 4)
    (tmp_path / "adapter").mkdir()
    prefix = f"base_model.model.{module}"
    save_file(
        {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}, tmp_path / "adapter/adapter_model.safetensors"
    )
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["up_proj"], task_type="CAUSAL_LM")
    config.save_pretrained(tmp_path / "adapter")
    view = merge(open_checkpoint(tmp_path / "base"), [read_adapter(tmp_path / "adapter")])
    weight = load_file(tmp_path / "base" / "model.safetensors")[f"{module}.weight"].double()
    expected = weight + 1.5 * (b.double() @ a.double())
    assert view.adapted == {f"{module}.weight"}
    np.testing.assert_allclose(view.rows(f"{module}.weight", 0, 24), expected, atol=1e-5)


def test_a_stack_of_experts_for_another_base(tmp_path: Path) -> None:
    for name in ("qwen3_moe", "mixtral"):
        model = make_model(ARCHITECTURES[name], tmp_path / name)
        targets = {"target_modules": [], "target_parameters": ["mlp.experts.down_proj"]}
        get_peft_model(model, LoraConfig(r=4, **targets)).save_pretrained(tmp_path / f"{name}-adapter")
    with pytest.raises(AdapterError, match="do not fit this base") as error:
        merge(open_checkpoint(tmp_path / "mixtral"), [read_adapter(tmp_path / "qwen3_moe-adapter")])
    assert "not for experts of shape [4, 32, 48]" in error.value.why


def test_fan_in_fan_out_on_linear_layers_is_overridden_as_in_peft(bases: dict[bool, Path], tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", bases[True], fan_in_fan_out=True)
    assert_same_as_live(bases[True], adapter, tmp_path / "out")


@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_copy_of_the_base_weight_replaces_it(tied: bool, bases: dict[bool, Path], tmp_path: Path) -> None:
    """PEFT saves the embedding along when it is a target, and loads it over the base's, which may differ."""
    adapter = make_adapter(tmp_path / "adapter", bases[tied], targets=["embed_tokens"])
    weights = load_file(adapter / "adapter_model.safetensors")
    weights["base_model.model.model.embed_tokens.base_layer.weight"] *= 1.5
    save_file(weights, adapter / "adapter_model.safetensors")
    assert_same_as_live(bases[tied], adapter, tmp_path / "out")


@pytest.mark.parametrize("tied", [True, False])
def test_a_plain_embedding_in_the_adapter_replaces_the_base_weight(
    tied: bool, bases: dict[bool, Path], tmp_path: Path
) -> None:
    """What save_embedding_layers=True writes; not in modules_to_save, so that a tied head goes with it."""
    adapter = make_adapter(tmp_path / "adapter", bases[tied])
    weights = load_file(adapter / "adapter_model.safetensors")
    name = next(key for key in load_file(bases[tied] / "model.safetensors") if "embed_tokens" in key)
    weights[f"base_model.model.{name}"] = load_file(bases[tied] / "model.safetensors")[name] * 1.5
    save_file(weights, adapter / "adapter_model.safetensors")
    view = assert_same_as_live(bases[tied], adapter, tmp_path / "out")
    assert ("lm_head.weight" in view.tensors) is not tied


@pytest.mark.parametrize("equal", [True, False])
def test_two_stored_copies_of_tied_weights(equal: bool, bases: dict[bool, Path], tmp_path: Path) -> None:
    """config.json says tied and both are stored: transformers 5 ties them where they are equal."""
    base = tmp_path / "base"
    base.mkdir()
    for file in bases[True].iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    weights = load_file(base / "model.safetensors")
    head = weights["model.embed_tokens.weight"].clone()
    weights["lm_head.weight"] = head if equal else head * 1.1
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    for kind in ("lora", "lora-embedding", "tying-saved-both"):
        adapter = make_adapter(tmp_path / f"adapter-{kind}", base, **KINDS[kind])
        view = assert_same_as_live(base, adapter, tmp_path / kind)
        assert view.config["tie_word_embeddings"] is (equal and kind != "lora-embedding")


def test_rows_delta_and_stored_agree(bases: dict[bool, Path], tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", bases[True], targets=["embed_tokens", "q_proj"])
    base = open_checkpoint(bases[True])
    view = merge(base, [read_adapter(adapter)])
    assert list(view.tensors) == [*base.tensors, "lm_head.weight"]
    for name in ("model.embed_tokens.weight", "model.layers.1.self_attn.q_proj.weight"):
        whole = view.rows(name, 0, view.tensors[name].shape[0])
        delta = view.delta(name, 3, 9)
        assert delta is not None
        assert np.abs(delta).max() > 0.01
        np.testing.assert_allclose(view.rows(name, 3, 9), base.rows(name, 3, 9) + delta, atol=1e-6)
        np.testing.assert_allclose(whole[3:9], view.rows(name, 3, 9), atol=1e-6)
        assert view.stored(name) is None
    assert view.delta("lm_head.weight", 0, 2) is None
    assert view.stored("lm_head.weight") == base.stored("model.embed_tokens.weight")
    assert np.array_equal(view.rows("lm_head.weight", 5, 7), base.rows("model.embed_tokens.weight", 5, 7))
    assert view.delta("model.norm.weight", 0, 4) is None
    assert set(view.checks) == {"model.embed_tokens.weight", "model.layers.1.self_attn.q_proj.weight"}
    assert max(view.checks.values()) < 1e-6


def test_delta_of_a_saved_module_is_the_difference(bases: dict[bool, Path], tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", bases[False], modules_to_save=["lm_head"])
    base = open_checkpoint(bases[False])
    view = merge(base, [read_adapter(adapter)])
    saved = load_file(adapter / "adapter_model.safetensors")["base_model.model.lm_head.weight"].numpy()
    delta = view.delta("lm_head.weight", 10, 20)
    np.testing.assert_array_equal(delta, saved[10:20] - base.rows("lm_head.weight", 10, 20))


def test_reference_opens_the_same_view(bases: dict[bool, Path], tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", bases[True])
    view = merge(open_checkpoint(bases[True]), [read_adapter(adapter)])
    again = open_view(CheckpointRef.from_json(json.loads(json.dumps(view.ref.to_json()))))
    name = "model.layers.0.mlp.up_proj.weight"
    assert np.array_equal(view.rows(name, 0, 50), again.rows(name, 0, 50))
    assert view.fingerprint() == again.fingerprint()
    hashes = view.file_hashes()
    assert {"base/model.safetensors", "base/tokenizer.json", "adapter/adapter_model.safetensors"} <= set(hashes)


def test_retraining_changes_the_fingerprint(bases: dict[bool, Path], tmp_path: Path) -> None:
    prints = []
    for seed in (1, 2):
        adapter = make_adapter(tmp_path / "adapter", bases[True], seed=seed)
        prints.append(merge(open_checkpoint(bases[True]), [read_adapter(adapter)]).fingerprint())
    assert prints[0] != prints[1]
    assert prints[0]["base"] == prints[1]["base"]


def test_no_adapter_passes_through(bases: dict[bool, Path]) -> None:
    base = open_checkpoint(bases[True])
    view = merge(base, [])
    assert view.tensors == base.tensors
    assert view.stored("model.norm.weight") == base.stored("model.norm.weight")
    assert view.config == base.config
    assert not view.adapted


def test_adapter_tokenizer_and_template_win(bases: dict[bool, Path], tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", bases[True], template=CHATML.replace("user", "patient"))
    (adapter / "generation_config.json").write_text('{"temperature": 0.1}')
    view = merge(open_checkpoint(bases[True]), [read_adapter(adapter)])
    assert {path.parent for path in view.tokenizer.files.values()} == {adapter}
    plain = make_adapter(tmp_path / "plain", bases[True])
    view = merge(open_checkpoint(bases[True]), [read_adapter(plain)])
    assert {path.parent for path in view.tokenizer.files.values()} == {bases[True]}


def test_template_inside_the_adapter_tokenizer_config_beats_the_base_file(
    bases: dict[bool, Path], tmp_path: Path
) -> None:
    adapter = make_adapter(tmp_path / "adapter", bases[True], template="{{ messages }}")
    (adapter / "chat_template.jinja").unlink()
    settings = json.loads((adapter / "tokenizer_config.json").read_text())
    (adapter / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": "{{ messages }}"}))
    view = merge(open_checkpoint(bases[True]), [read_adapter(adapter)])
    assert "chat_template.jinja" not in view.tokenizer.files
    assert view.tokenizer.files["tokenizer_config.json"].parent == adapter


def test_larger_adapter_vocabulary_is_refused(bases: dict[bool, Path], tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", bases[True], template=CHATML)
    data = json.loads((adapter / "tokenizer.json").read_text())
    data["added_tokens"].append({**data["added_tokens"][-1], "id": 801, "content": "<|new|>"})
    (adapter / "tokenizer.json").write_text(json.dumps(data, ensure_ascii=False))
    with pytest.raises(CheckpointError, match="802 ids, the embedding 768 rows") as error:
        merge(open_checkpoint(bases[True]), [read_adapter(adapter)])
    assert error.value.code == "vocabulary-too-large"


def test_another_base_is_refused_with_shapes_and_name(bases: dict[bool, Path], tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", bases[True])
    other = make_checkpoint(tmp_path / "other", "qwen2", hidden=96)
    with pytest.raises(AdapterError) as error:
        merge(open_checkpoint(other), [read_adapter(adapter)])
    assert error.value.code == "adapter-other-base"
    assert "[64, 128]" in error.value.why
    assert "[96, 192]" in error.value.why
    assert str(bases[True]) in error.value.hint
    phi = make_checkpoint(tmp_path / "phi", "phi3")
    with pytest.raises(AdapterError, match="10 of the adapter's 14 parts") as error:
        merge(open_checkpoint(phi), [read_adapter(adapter)])
    assert "no linear layer model.layers.0" in error.value.why


def test_no_hint_names_the_base_that_was_given(bases: dict[bool, Path], tmp_path: Path) -> None:
    """As a folder, with a link in its path, and as what the hub's cache calls it."""
    adapter = make_adapter(tmp_path / "adapter", bases[True])
    other = make_checkpoint(tmp_path / "models--org--name" / "snapshots" / "1f", "qwen2", hidden=96)
    (tmp_path / "link").symlink_to(other)
    settings = json.loads((adapter / "adapter_config.json").read_text())
    for name, given in ((str(other), True), (str(tmp_path / "link"), True), ("org/name", True), ("org/names", False)):
        for task, code in (("CAUSAL_LM", "adapter-other-base"), ("SEQ_2_SEQ_LM", "adapter-other-task")):
            changed = {**settings, "base_model_name_or_path": name, "task_type": task}
            (adapter / "adapter_config.json").write_text(json.dumps(changed))
            with pytest.raises(AdapterError) as error:
                merge(open_checkpoint(other), [read_adapter(adapter)])
            assert error.value.code == code
            assert (f"--base {name}" in error.value.hint) is not given


@pytest.mark.parametrize("how", ["saved", "along", "along-tied", "lora-along-tied"])
def test_resized_vocabulary(how: str, bases: dict[bool, Path], tmp_path: Path) -> None:
    """Tokens were added before training: the adapter holds both ends whole, in modules_to_save or saved along."""
    base = bases["tied" in how]
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.resize_token_embeddings(774, mean_resizing=False)
    randomize(model.get_input_embeddings(), 5)
    settings: dict[str, Any] = {"modules_to_save": ["embed_tokens", "lm_head"]} if how == "saved" else {}
    targets = ["q_proj", "embed_tokens"] if "lora" in how else ["q_proj"]
    peft = get_peft_model(
        model, LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM", ensure_weight_tying="lora" in how,
                          **settings)
    )  # fmt: skip
    shake_adapter(peft)
    peft.save_pretrained(tmp_path / "adapter", save_embedding_layers=how != "saved")
    view = write_merged(base, tmp_path / "adapter", tmp_path / "out")
    assert view.config["vocab_size"] == 774
    assert view.tensors["model.embed_tokens.weight"].shape == (774, 64)
    ids = torch.tensor([[5, 770, 77, 773, 12]])
    with torch.no_grad():
        live = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        live.resize_token_embeddings(774, mean_resizing=False)
        expected = PeftModel.from_pretrained(live, tmp_path / "adapter").eval()(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()(ids).logits
    assert (expected - merged).abs().max() < FLOAT32_NOISE
    delta = view.delta("model.embed_tokens.weight", 766, 774)
    assert delta is not None
    np.testing.assert_array_equal(delta[2:], view.rows("model.embed_tokens.weight", 768, 774))


def test_half_a_resized_vocabulary_is_refused_with_both_numbers(bases: dict[bool, Path], tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", bases[True], modules_to_save=["embed_tokens"])
    smaller = make_checkpoint(tmp_path / "smaller", "qwen2", vocab=704)
    with pytest.raises(AdapterError, match="vocabulary of 768 rows, the base of 704") as error:
        merge(open_checkpoint(smaller), [read_adapter(adapter)])
    assert error.value.code == "adapter-resized-vocabulary"


def test_saved_module_without_weights(bases: dict[bool, Path], tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", bases[True])
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, "modules_to_save": ["lm_head"]}))
    with pytest.raises(AdapterError, match=r"'lm_head', and the file lacks lm_head\.weight") as error:
        merge(open_checkpoint(bases[True]), [read_adapter(adapter)])
    assert error.value.code == "adapter-incomplete"


def test_tying_that_contradicts_itself_is_refused(bases: dict[bool, Path], tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", bases[True], **KINDS["tying-lora-embedding"])
    weights = load_file(adapter / "adapter_model.safetensors")
    weights["base_model.model.lm_head.lora_B.weight"] *= 2
    save_file(weights, adapter / "adapter_model.safetensors")
    with pytest.raises(AdapterError) as error:
        merge(open_checkpoint(bases[True]), [read_adapter(adapter)])
    assert error.value.code == "adapter-tie-ambiguous"


def test_other_task_is_refused(bases: dict[bool, Path], tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", bases[True])
    settings = json.loads((adapter / "adapter_config.json").read_text())
    for task, code in (("SEQ_2_SEQ_LM", "adapter-other-task"), ("SEQ_CLS", "adapter-random-head")):
        (adapter / "adapter_config.json").write_text(json.dumps({**settings, "task_type": task}))
        with pytest.raises(AdapterError) as error:
            merge(open_checkpoint(bases[True]), [read_adapter(adapter)])
        assert error.value.code == code


def test_formula_check_catches_a_wrong_product(
    bases: dict[bool, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault in one entry of a slab, as a bad memory cell or a broken BLAS would make."""
    adapter = make_adapter(tmp_path / "adapter", bases[True])
    view = merge(open_checkpoint(bases[True]), [read_adapter(adapter)])
    name = "model.layers.0.mlp.up_proj.weight"
    view.rows(name, 0, 8)
    update = view._updates[name]
    assert isinstance(update, PairUpdate)
    update.right[1, 3] += 0.01
    with pytest.raises(ProofError) as error:
        view.rows(name, 0, 8)
    assert error.value.code == "merge-formula"


def test_formula_check_of_a_row_at_right_angles_to_the_probe(
    bases: dict[bool, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its product with the probe is near zero, its rounding is not: no error. A wrong entry still is one."""
    view = merge(open_checkpoint(bases[True]), [read_adapter(make_adapter(tmp_path / "adapter", bases[True]))])
    name = "model.layers.0.mlp.up_proj.weight"
    view.rows(name, 0, 1)
    update = view._updates[name]
    assert isinstance(update, PairUpdate)
    row = (1000.0 * update.probe * np.where(np.arange(len(update.probe)) % 2, -1, 1)).astype(np.float32)[None]
    monkeypatch.setattr(view.base, "rows", lambda *_: row.copy())
    np.testing.assert_array_equal(view.rows(name, 0, 1), row + update.product(0, 1))
    monkeypatch.setattr(PairUpdate, "product", lambda self, start, stop: np.full((1, row.shape[1]), 1.0, np.float32))
    with pytest.raises(ProofError):
        view.rows(name, 0, 1)


def test_nan_in_the_base_is_named(bases: dict[bool, Path], tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", bases[True])
    base = tmp_path / "base"
    base.mkdir()
    for file in bases[True].iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    weights = load_file(base / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][3, 3] = float("nan")
    save_file(weights, base / "model.safetensors")
    view = merge(open_checkpoint(base), [read_adapter(adapter)])
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.mlp\.up_proj\.weight") as error:
        view.rows("model.layers.0.mlp.up_proj.weight", 0, 8)
    assert error.value.code == "base-nan"


ROPES: dict[str, dict[str, Any]] = {
    "llama": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    "mistral": {"rope_parameters": {"rope_type": "linear", "rope_theta": 2e4, "factor": 4.0}},
    "qwen3": {
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 128,
        }
    },
    "gemma3": {},
}  # fmt: skip


@pytest.mark.parametrize("arch", ROPES)
def test_config_names_rotary_settings_for_both_transformers(arch: str, tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base", arch, **ROPES[arch])
    checkpoint = open_checkpoint(base)
    config = written_config(checkpoint)
    parameters = config["rope_parameters"]
    assert config["rope_theta"] == parameters.get("full_attention", parameters)["rope_theta"]
    if parameters.get("rope_type", "default") != "default":
        assert config["rope_scaling"]["rope_type"] == parameters["rope_type"]
        assert "rope_theta" not in config["rope_scaling"]
    if arch == "gemma3":
        assert config["rope_local_base_freq"] == parameters["sliding_attention"]["rope_theta"] == 1e4
        assert config["rope_theta"] == 1e6
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "config.json").write_text(json.dumps(config))
    old, new = AutoConfig.from_pretrained(base), AutoConfig.from_pretrained(tmp_path / "again")
    assert new.rope_parameters == old.rope_parameters


def test_config_of_transformers_4_gets_the_new_names(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base", "llama")
    config = json.loads((base / "config.json").read_text())
    del config["rope_parameters"]
    config.update(rope_theta=5e5, rope_scaling={"type": "linear", "factor": 2.0}, _name_or_path="/home/someone/llama")
    (base / "config.json").write_text(json.dumps(config))
    written = written_config(open_checkpoint(base))
    assert written["rope_parameters"] == {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}
    assert "_name_or_path" not in written
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "config.json").write_text(json.dumps(written))
    read = AutoConfig.from_pretrained(tmp_path / "again").rope_parameters
    assert (read["rope_type"], read["factor"], read["rope_theta"]) == ("linear", 2.0, 5e5)
