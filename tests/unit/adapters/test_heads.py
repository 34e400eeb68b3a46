"""Classifiers trained on a language model: the merged folder is the live model, its new head included."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from lora2edge.adapters import merge, read_adapter
from lora2edge.adapters.heads import LAYOUTS
from lora2edge.checkpoint import open_checkpoint
from lora2edge.errors import AdapterError
from tests.cli.conftest import Outcome, lora2edge, own_cache  # noqa: F401
from tests.tiny import VOCAB, bpe_tokenizer, make_adapter, randomize, shake_adapter

Run = Callable[..., Outcome]
TASKS = {"SEQ_CLS": "SequenceClassification", "TOKEN_CLS": "TokenClassification"}
ENCODERS = {"bert", "roberta", "xlm-roberta", "electra", "deberta-v2", "distilbert"}
IDS = torch.tensor([[5, 9, 40, 100, 7, 220, 31]])


def _config(kind: str) -> Any:
    sizes: dict[str, Any] = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
        "vocab_size": VOCAB, "pad_token_id": 0,
    }  # fmt: skip
    if kind == "distilbert":
        sizes = {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48, "vocab_size": VOCAB}
    if kind == "gpt2":
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": VOCAB, "pad_token_id": 0}
    if kind == "electra":
        sizes["embedding_size"] = 32
    if kind in ("mixtral", "qwen3_moe"):
        sizes |= {"num_local_experts": 2, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
    if kind in ("gemma", "gemma2", "gemma3_text", "qwen3", "qwen3_moe"):
        sizes |= {"head_dim": 16}
    if kind not in ENCODERS:
        sizes["num_key_value_heads"] = 2
    return transformers.CONFIG_MAPPING[kind](**sizes)


def _base(kind: str, folder: Path) -> Path:
    """A language model of the kind, with a pooler where published checkpoints of the kind have one."""
    auto = transformers.AutoModelForMaskedLM if kind in ENCODERS else transformers.AutoModelForCausalLM
    model = auto.from_config(_config(kind)).float().eval()
    randomize(model, 0)
    model.save_pretrained(folder)
    bpe_tokenizer(VOCAB - 8).save_pretrained(folder)
    return folder


def _classifier(base: Path, kind: str, task: str) -> Any:
    torch.manual_seed(0)
    model = getattr(transformers, f"AutoModelFor{TASKS[task]}").from_pretrained(base, num_labels=3, dtype=torch.float32)
    return model.eval()


def _adapter(base: Path, kind: str, task: str, folder: Path, save: list[str] | None = None) -> torch.Tensor:
    """Saves an adapter with its head; returns the live model's logits."""
    from peft import LoraConfig, get_peft_model

    modules = {module.split(".")[0] for module in LAYOUTS[kind].heads[_task(task)]} - {"bert"}
    if "bert.pooler.dense" in LAYOUTS[kind].heads[_task(task)]:
        modules.add("pooler")
    targets = {"distilbert": ["q_lin"], "gpt2": ["c_attn"], "gpt_neox": ["query_key_value"], "phi3": ["qkv_proj"]}
    default = ["query"] if kind in ENCODERS else ["q_proj"]
    if kind == "deberta-v2":
        default = ["query_proj"]
    live = get_peft_model(
        _classifier(base, kind, task),
        LoraConfig(
            r=4, lora_alpha=6, task_type=task, target_modules=targets.get(kind, default),
            modules_to_save=sorted(modules) if save is None else save,
        ),
    ).eval()  # fmt: skip
    shake_adapter(live)
    live.save_pretrained(folder)
    with torch.inference_mode():
        logits: torch.Tensor = live(IDS).logits
    return logits


def _task(task: str) -> Any:
    return {"SEQ_CLS": "sequence-classification", "TOKEN_CLS": "token-classification"}[task]


CASES = [(kind, task) for kind in LAYOUTS for task in TASKS if _task(task) in LAYOUTS[kind].heads]


@pytest.mark.parametrize(("kind", "task"), CASES)
def test_the_layouts_are_those_of_transformers(kind: str, task: str) -> None:
    config, layout = _config(kind), LAYOUTS[kind]
    auto = transformers.AutoModelForMaskedLM if kind in ENCODERS else transformers.AutoModelForCausalLM
    with torch.device("meta"):
        before = set(auto.from_config(config).state_dict())
        after = set(getattr(transformers, f"AutoModelFor{TASKS[task]}").from_config(config).state_dict())
    heads = {name.rpartition(".")[0] for name in after - before}
    assert heads == set(layout.heads[_task(task)])
    assert all(name.startswith(layout.layers) for name in after & before)
    assert not any(name.startswith(layout.layers) for name in before - after)


@pytest.mark.parametrize(("kind", "task"), CASES)
def test_merged_answers_like_the_live_classifier(
    kind: str,
    task: str,
    tmp_path: Path,
    lora2edge: Run,  # noqa: F811
) -> None:
    base = _base(kind, tmp_path / "base")
    expected = _adapter(base, kind, task, tmp_path / "adapter")
    done = lora2edge("merge", "--base", base, "--adapter", tmp_path / "adapter", "--out", tmp_path / "merged")
    assert done.code == 0, done.err
    merged, report = getattr(transformers, f"AutoModelFor{TASKS[task]}").from_pretrained(
        tmp_path / "merged", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"] and merged.config.num_labels == 3
    with torch.inference_mode():
        logits = merged.eval()(IDS).logits
    assert logits.shape == expected.shape
    assert (logits - expected).norm() <= 1e-5 * expected.norm()
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["architectures"] == [type(merged).__name__]
    view = merge(open_checkpoint(base), [read_adapter(tmp_path / "adapter")])
    account = view.account()
    assert view.task == _task(task)
    assert sorted(name for names in account["base"].values() for name in names) == sorted(view.base.tensors)
    assert sorted(name for names in account["adapter"].values() for name in names) == sorted(
        view.adapters[0].reader.tensors
    )
    own_head = {name for name in view.base.tensors if not name.startswith(LAYOUTS[kind].layers)}
    assert set(account["base"]["dropped"]) == own_head and account["added"]["head"] and account["adapter"]["head"]


@pytest.mark.parametrize("kind", ["bert", "deberta-v2"])
def test_a_head_that_was_never_saved(kind: str, tmp_path: Path) -> None:
    """PEFT's default saves `classifier`; the pooler stays random, another one each time it is loaded."""
    base = _base(kind, tmp_path / "base")
    _adapter(base, kind, "SEQ_CLS", tmp_path / "adapter", save=[])
    with pytest.raises(AdapterError) as caught:
        merge(open_checkpoint(base), [read_adapter(tmp_path / "adapter")])
    assert caught.value.code == "adapter-random-head" and "pooler.dense" in caught.value.what
    assert "modules_to_save=['pooler', 'classifier']" in str(caught.value.hint)


def test_a_pooler_that_the_base_has(tmp_path: Path) -> None:
    """BERT's published checkpoints bring it along; a token classifier has none."""
    from safetensors.torch import load_file, save_file

    base = _base("bert", tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    torch.manual_seed(3)
    tensors |= {"bert.pooler.dense.weight": torch.randn(32, 32) / 6, "bert.pooler.dense.bias": torch.randn(32)}
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    for task, dropped in (("SEQ_CLS", False), ("TOKEN_CLS", True)):
        _adapter(base, "bert", task, tmp_path / task, save=["classifier"])
        view = merge(open_checkpoint(base), [read_adapter(tmp_path / task)])
        assert ("bert.pooler.dense.weight" in view.account()["base"]["dropped"]) == dropped


def test_a_classifier_on_a_tuned_language_model(tmp_path: Path, lora2edge: Run) -> None:  # noqa: F811
    from peft import PeftModel

    base = _base("qwen2", tmp_path / "base")
    first = make_adapter(tmp_path / "first", base, targets=["q_proj", "up_proj"])
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tuned = PeftModel.from_pretrained(model, str(first)).merge_and_unload()
    tuned.save_pretrained(tmp_path / "tuned")
    expected = _adapter(tmp_path / "tuned", "qwen2", "SEQ_CLS", tmp_path / "adapter")
    given = ["merge", "--base", base, "--adapter", first, "--adapter", tmp_path / "adapter"]
    summed = lora2edge(*given, "--out", tmp_path / "out", "--json")
    assert summed.code == 2 and json.loads(summed.out)["error"]["code"] in ("combine-whole", "adapter-other-task")
    done = lora2edge(*given, "--combine", "sequence", "--out", tmp_path / "out")
    assert done.code == 0, done.err
    merged = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    with torch.inference_mode():
        assert (merged(IDS).logits - expected).norm() <= 1e-5 * expected.norm()
    account = json.loads((tmp_path / "out" / "manifest.json").read_text())["account"]
    assert account["added"]["head"] == ["score.weight"] and account["adapter"]["head"]


def test_a_language_model_is_not_a_classifier_of_its_own(tmp_path: Path, lora2edge: Run) -> None:  # noqa: F811
    """What cannot be measured yet says so."""
    base = _base("bert", tmp_path / "base")
    refused = lora2edge("lower", "--base", base, "--target", "gguf/q8_0", "--out", tmp_path / "out", "--json")
    assert refused.code == 2 and not (tmp_path / "out").exists()
