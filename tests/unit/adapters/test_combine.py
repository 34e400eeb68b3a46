"""Several adapters at once against PEFT 0.21.2: live where it has a live form, its own arithmetic where it has none,
and the float64 formula where PEFT is silently wrong."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoHaConfig, LoraConfig, PeftModel, get_peft_model
from peft.utils import merge_utils
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from lora2edge.adapters import Combination, MergedCheckpoint, merge, open_view, read_adapter
from lora2edge.adapters.arithmetic import random_mask
from lora2edge.backends.hf.load import load_live
from lora2edge.calibration.model import build_model
from lora2edge.checkpoint import open_checkpoint
from lora2edge.contracts import AdapterRef, CheckpointRef
from lora2edge.errors import AdapterError, CheckpointError, Refusals
from tests.tiny import CHATML, bpe_tokenizer, make_adapter, make_checkpoint, randomize, shake_adapter

IDS = torch.tensor([[5, 300, 77, 401, 12, 9, 600, 333, 2, 41, 150, 700]])
NAME = "model.layers.1.self_attn.q_proj.weight"
RELATIVE = 1e-5
"""Of the largest logit: what the issue asks for. Float32 gives 3e-7 to 2e-6 on these models."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("combine")


@pytest.fixture(scope="module")
def base(root: Path) -> Path:
    return make_checkpoint(root / "base", "qwen2", dtype="float32", tied=True)


@pytest.fixture(scope="module")
def made(root: Path, base: Path) -> dict[str, Path]:
    """Adapters by name; `a` and `b` are plain, of one rank, on different modules that overlap."""
    settings: dict[str, dict[str, Any]] = {
        "a": {"targets": ["q_proj", "v_proj", "down_proj"], "seed": 1},
        "b": {"targets": ["q_proj", "up_proj", "down_proj"], "alpha": 16, "seed": 2},
        "wide": {"r": 8, "targets": ["q_proj", "o_proj"], "seed": 3},
        "rs": {"use_rslora": True, "targets": ["q_proj", "v_proj"], "seed": 4},
        "rs2": {"use_rslora": True, "targets": ["q_proj", "v_proj"], "seed": 14},
        "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 32}, "targets": ["q_proj", "v_proj"]},
        "bias": {"lora_bias": True, "targets": ["q_proj", "k_proj", "v_proj"], "seed": 5},
        "bias2": {"lora_bias": True, "targets": ["q_proj", "v_proj"], "seed": 15},
        "dora": {"use_dora": True, "targets": ["q_proj", "o_proj"], "seed": 6},
        "dora2": {"use_dora": True, "targets": ["q_proj", "up_proj"], "seed": 7},
        "saved": {"targets": ["k_proj"], "modules_to_save": ["lm_head"], "seed": 8},
        "tokens": {"targets": ["k_proj"], "trainable_token_indices": [5, 300], "seed": 9},
        "embedding": {"targets": ["embed_tokens", "v_proj"], "seed": 10},
        "head": {"targets": ["lm_head", "q_proj"], "seed": 11},
        "embedding2": {"targets": ["embed_tokens", "q_proj"], "seed": 12},
        "tokens-head": {"targets": ["lm_head", "k_proj"], "trainable_token_indices": [5, 300], "seed": 13},
    }
    folders = {name: make_adapter(root / name, base, **setting) for name, setting in settings.items()}
    model = get_peft_model(load(base), LoHaConfig(r=4, alpha=8, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    shake_adapter(model, 0.3, 20)
    model.save_pretrained(root / "loha")
    return {**folders, "loha": root / "loha"}


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def combined(base: Path, adapters: Sequence[Path], weights: Sequence[float] = (), **settings: Any) -> MergedCheckpoint:
    read = [
        replace(read_adapter(path), weight=weight) for path, weight in zip(adapters, weights or [1.0] * 9, strict=False)
    ]
    return merge(open_checkpoint(base), read, Combination.from_json(settings))


def answers(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def merged_answers(view: Any) -> torch.Tensor:
    return answers(build_model(view, dtype="float32", device="cpu", rounded=False))


def error_between(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


def assert_equal_answers(view: Any, live: torch.Tensor, base: Path) -> None:
    assert error_between(answers(load(base)), live) > 1e-2, "the adapters do nothing"
    assert error_between(merged_answers(view), live) <= RELATIVE


def live_together(base: Path, adapters: Sequence[Path], weights: Sequence[float] = ()) -> Any:
    """PEFT's model with the adapters loaded as "0", "1", … and all of them active, their scaling times the weight."""
    model = PeftModel.from_pretrained(load(base), adapters[0], adapter_name="0")
    for index, path in enumerate(adapters[1:], 1):
        model.load_adapter(path, adapter_name=str(index))
    model.base_model.set_adapter([str(index) for index in range(len(adapters))])
    for module in model.modules():
        for index, weight in enumerate(weights):
            if isinstance(getattr(module, "scaling", None), dict) and str(index) in module.scaling:
                module.scaling[str(index)] *= weight
    return model.eval()


def weighted_adapter(base: Path, adapters: Sequence[Path], weights: Sequence[float], kind: str, **settings: Any) -> Any:
    """PEFT's model with what add_weighted_adapter makes of the adapters, in float64.

    In float32 its own decompositions are 2e-6 to 1e-5 away from that, ours less than 1e-6.
    """
    model = live_together(base, adapters).double()
    names = [str(index) for index in range(len(adapters))]
    model.base_model.set_adapter(names[0])
    model.add_weighted_adapter(names, list(weights), "new", combination_type=kind, **settings)
    model.set_adapter("new")
    return model.eval()


def change_of(base: Path, adapter: Path, name: str) -> np.ndarray[Any, Any]:
    """dW of one adapter alone, float64, from PEFT's own merge in float64."""
    model = load(base).double()
    before = dict(model.named_parameters())[name].detach().clone()
    merged = PeftModel.from_pretrained(model, adapter).double().merge_and_unload()
    after = dict(merged.named_parameters(remove_duplicate=False))[name]
    return (after - before).detach().numpy()


def change_in(view: Any, name: str) -> np.ndarray[Any, Any]:
    """dW of the view, float64."""
    rows = view.tensors[name].shape[0]
    return view.rows(name, 0, rows).astype(np.float64) - view.root.rows(name, 0, rows)


def distance(one: Any, other: Any) -> float:
    return float(np.linalg.norm(one - other) / np.linalg.norm(other))


# ---------------------------------------------------------------- the weighted sum


SUMS: dict[str, tuple[list[str], list[float]]] = {
    "plain": (["a", "b"], [1.0, 1.0]),
    "weights": (["a", "b"], [0.7, -0.4]),
    "other-ranks": (["a", "wide"], [1.0, 0.5]),
    "three": (["a", "b", "wide"], [0.5, 0.3, 0.9]),
    "rslora": (["rs", "a"], [0.6, 1.0]),
    "patterns": (["patterns", "a"], [1.0, 2.0]),
    "biases": (["bias", "bias2"], [0.5, 1.5]),
    "one": (["b"], [0.5]),
    "one-with-biases": (["bias"], [0.5]),
}


@pytest.mark.parametrize("case", SUMS)
def test_sum_is_what_peft_computes_with_all_of_them_active(case: str, base: Path, made: dict[str, Path]) -> None:
    names, weights = SUMS[case]
    adapters = [made[name] for name in names]
    view = combined(base, adapters, weights)
    assert view.reference == ""
    assert_equal_answers(view, answers(live_together(base, adapters, weights)), base)


def test_sum_is_pefts_cat(base: Path, made: dict[str, Path]) -> None:
    adapters, weights = [made["a"], made["wide"]], [0.7, -0.4]
    live = answers(weighted_adapter(base, adapters, weights, "cat"))
    assert_equal_answers(combined(base, adapters, weights), live, base)


@pytest.mark.parametrize("names", [["rs", "rs2"], ["bias", "bias2"], ["dora", "dora2"]], ids=["rslora", "bias", "dora"])
def test_sum_where_pefts_cat_is_silently_wrong(names: list[str], base: Path, made: dict[str, Path]) -> None:
    """It rescales rsLoRA by the root of the new rank, and drops biases and DoRA's magnitudes."""
    adapters, weights = [made[name] for name in names], [0.6, 0.8]
    view = combined(base, adapters, weights)
    wanted = sum(w * change_of(base, path, NAME) for w, path in zip(weights, adapters, strict=True))
    assert distance(change_in(view, NAME), wanted) < 1e-5
    if "bias" in names:
        bias = NAME.replace("weight", "bias")
        sums = [
            w * load_file(path / "adapter_model.safetensors")[f"base_model.model.{NAME[:-7]}.lora_B.bias"].numpy() * 2
            for w, path in zip(weights, adapters, strict=True)
        ]
        assert distance(change_in(view, bias), sums[0] + sums[1]) < 1e-5
    peft_answers = answers(weighted_adapter(base, adapters, weights, "cat"))
    assert error_between(peft_answers, merged_answers(view)) > 1e-3, "PEFT is right here now: say so in the docs"


@pytest.mark.parametrize("names", [["dora", "b"], ["dora", "dora2"], ["loha", "a"], ["loha", "dora"]])
def test_sum_of_other_kinds_is_the_formula(names: list[str], base: Path, made: dict[str, Path]) -> None:
    adapters, weights = [made[name] for name in names], [0.5, -1.5]
    view = combined(base, adapters, weights)
    assert "no live reference" in view.reference
    wanted = sum(w * change_of(base, path, NAME) for w, path in zip(weights, adapters, strict=True))
    assert distance(change_in(view, NAME), wanted) < 1e-5
    assert [len(step.adapters) for step in view.steps] == [1, 1]


@pytest.mark.parametrize("name", ["a", "dora", "embedding", "saved", "bias", "loha", "tokens-head"])
def test_one_adapter_of_weight_1_is_itself_bit_for_bit(name: str, base: Path, made: dict[str, Path]) -> None:
    alone, listed = merge(open_checkpoint(base), [read_adapter(made[name])]), combined(base, [made[name]], [1.0])
    for tensor, info in alone.tensors.items():
        assert np.array_equal(alone.rows(tensor, 0, info.shape[0]), listed.rows(tensor, 0, info.shape[0]))
    assert alone.fingerprint() == listed.fingerprint()
    assert alone.ref == listed.ref


@pytest.mark.parametrize("names", [["embedding", "a"], ["head", "a"], ["embedding", "embedding2"], ["saved", "a"],
                                   ["tokens", "a"], ["head", "embedding"], ["tokens-head", "a"]])  # fmt: skip
def test_sum_with_ends_of_the_model(names: list[str], base: Path, made: dict[str, Path]) -> None:
    """Against the sum of what each adapter alone does to each tensor. Where one unties the head, it is untied."""
    adapters = [made[name] for name in names]
    view = combined(base, adapters)
    singles = [merge(open_checkpoint(base), [read_adapter(path)]) for path in adapters]
    for tensor, info in view.tensors.items():
        source = tensor if tensor in view.base.tensors else "model.embed_tokens.weight"
        before = view.base.rows(source, 0, info.shape[0]).astype(np.float64)
        alone = [single.rows(tensor if tensor in single.tensors else source, 0, info.shape[0]) for single in singles]
        wanted = before + sum(each - before for each in alone)
        np.testing.assert_allclose(view.rows(tensor, 0, info.shape[0]), wanted, atol=2e-6)
    assert view.config["tie_word_embeddings"] is all(single.config["tie_word_embeddings"] for single in singles)
    if names == ["head", "a"]:
        assert_equal_answers(view, answers(live_together(base, adapters)), base)


def test_a_head_over_trained_tokens_is_added_to_nothing(base: Path, made: dict[str, Path]) -> None:
    """Its pair is not all of what it does to the head: methods that prune pairs cannot take it, nor another change."""
    adapters = [made["tokens-head"], made["a"]]
    for settings, weights, names, code in (
        ({"method": "ties", "density": 0.4}, [1.0, 1.0], adapters, "combine-kind"),
        ({}, [0.5, 1.0], adapters, "combine-whole"),
        ({}, [1.0, 1.0], [made["tokens-head"], made["head"]], "combine-whole"),
    ):
        with pytest.raises((AdapterError, Refusals)) as error:
            combined(base, names, weights, **settings)
        assert code in [each.code for each in getattr(error.value, "errors", [error.value])]


@pytest.mark.parametrize("names", [["dora", "a"], ["a", "dora"]])
def test_one_dora_in_a_sum_is_live_where_it_is_the_first_that_is_active(
    names: list[str], base: Path, made: dict[str, Path]
) -> None:
    """PEFT's forward gives a DoRA what the adapters before it added, as if the base had computed it."""
    adapters, weights = [made[name] for name in names], [1.0 if name == "dora" else 0.5 for name in names]
    view = combined(base, adapters, weights)
    assert view.reference == ""
    assert_equal_answers(view, answers(load_live(view.ref, dtype="float32", device="cpu")), base)
    in_order = answers(live_together(base, adapters, weights))
    assert (error_between(in_order, merged_answers(view)) > 1e-2) is (names[0] == "a")


# ---------------------------------------------------------------- PEFT's own combinations


METHODS: dict[str, dict[str, Any]] = {
    "linear": {},
    "ties": {"density": 0.4},
    "ties-frequency": {"density": 0.4, "majority_sign": "frequency"},
    "magnitude_prune": {"density": 0.3},
    "svd": {},
    "svd-rank-3": {"svd_rank": 3},
    "ties_svd": {"density": 0.4},
    "magnitude_prune_svd": {"density": 0.3},
}


@pytest.mark.parametrize("weights", [[0.7, 0.5], [1.0, -0.6]], ids=["positive", "negative"])
@pytest.mark.parametrize("case", METHODS)
def test_plain_lora_is_what_peft_makes_of_it(
    case: str, weights: list[float], base: Path, made: dict[str, Path]
) -> None:
    method, adapters = case.partition("-")[0], [made["a"], made["b"]]
    settings = dict(METHODS[case])
    view = combined(base, adapters, weights, method=method, **settings)
    if "majority_sign" in settings:
        settings["majority_sign_method"] = settings.pop("majority_sign")
    assert_equal_answers(view, answers(weighted_adapter(base, adapters, weights, method, **settings)), base)
    assert "no live reference" in view.reference


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd"])
def test_dare_is_pefts_arithmetic_with_the_same_masks(
    method: str, base: Path, made: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The masks are ours, drawn in the order in which PEFT asks for them; all else is add_weighted_adapter."""
    adapters, weights, density = [made["a"], made["b"]], [0.7, -0.5], 0.5
    view = combined(base, adapters, weights, method=method, density=density, seed=3)
    queue = []
    model = live_together(base, adapters)
    for path, module in model.base_model.model.named_modules():
        if not hasattr(module, "lora_A"):
            continue
        held = [index for index in range(2) if str(index) in module.lora_A]
        ends = [""] if method.endswith("svd") else [".lora_A", ".lora_B"]
        for end in ends:
            for index in held:
                side = module if not end else getattr(module, end[1:])[str(index)]
                queue.append(random_mask(tuple(side.weight.shape), density, 3, f"{path}.weight{end}", index))

    def prune(tensor: Any, density: float, rescale: bool) -> Any:
        mask = torch.from_numpy(queue.pop(0))
        assert mask.shape == tensor.shape
        return tensor * mask / density

    monkeypatch.setattr(merge_utils, "random_pruning", prune)
    live = weighted_adapter(base, adapters, weights, method, density=density)
    assert not queue
    assert_equal_answers(view, answers(live), base)


@pytest.mark.parametrize(
    ("names", "method"),
    [
        (["rs", "rs2"], "linear"),
        (["rs", "rs2"], "ties"),
        (["rs", "rs2"], "svd"),
        (["bias", "bias2"], "linear"),
        (["bias", "bias2"], "ties"),
        (["bias", "bias2"], "ties_svd"),
        (["dora", "dora2"], "svd"),
        (["dora", "dora2"], "ties_svd"),
    ],
)
def test_formula_where_peft_is_silently_wrong(names: list[str], method: str, base: Path, made: dict[str, Path]) -> None:
    """rsLoRA, biases and DoRA, against the formula in float64, with torch's and PEFT's functions as far as they go."""
    adapters, weights = [made[name] for name in names], [0.7, 0.5]
    density = {"density": 0.5} if "ties" in method else {}
    view = combined(base, adapters, weights, method=method, **density)
    files = [load_file(path / "adapter_model.safetensors") for path in adapters]
    key = f"base_model.model.{NAME[:-7]}"
    scale = 4.0 if names[0] == "rs" else 2.0

    def mix(tensors: list[torch.Tensor], factors: list[float]) -> torch.Tensor:
        if "ties" in method:
            return merge_utils.ties(tensors, torch.tensor(factors, dtype=torch.float64), 0.5)
        return merge_utils.task_arithmetic(tensors, torch.tensor(factors, dtype=torch.float64))

    if method in {"linear", "ties"}:
        roots = [(weight * scale) ** 0.5 for weight in weights]
        a, b = (mix([file[f"{key}.lora_{side}.weight"].double() for file in files], roots) for side in "AB")
        wanted = (b @ a).numpy()
    else:
        total = mix([torch.from_numpy(change_of(base, path, NAME)) for path in adapters], weights)
        u, sizes, v = torch.linalg.svd(total, full_matrices=False)
        wanted = (u[:, :4] @ torch.diag(sizes[:4]) @ v[:4]).numpy()
    assert distance(change_in(view, NAME), wanted) < 2e-5
    if names[0] == "bias":
        bias = mix([file[f"{key}.lora_B.bias"].double() * scale for file in files], weights)
        assert distance(change_in(view, NAME.replace("weight", "bias")), bias.numpy()) < 1e-5
    live = answers(weighted_adapter(base, adapters, weights, method, **density))
    assert error_between(live, merged_answers(view)) > 1e-3, "PEFT is right here now: say so in the docs"


def test_conv1d_and_embeddings_combine_in_pefts_orientation(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=768, n_embd=32, n_layer=2, n_head=2, n_positions=64)
    model = GPT2LMHeadModel(config).float().eval()
    randomize(model, 0)
    model.save_pretrained(tmp_path / "gpt2")
    bpe_tokenizer().save_pretrained(tmp_path / "gpt2")
    adapters = []
    for seed in (1, 2):
        settings = LoraConfig(r=4, lora_alpha=8, target_modules=["c_attn", "wte"], task_type="CAUSAL_LM")
        live = get_peft_model(load(tmp_path / "gpt2"), settings)
        shake_adapter(live, 0.15, seed)
        live.save_pretrained(tmp_path / str(seed), save_embedding_layers=False)
        adapters.append(tmp_path / str(seed))
    for method, settings in {"linear": {}, "ties": {"density": 0.5}, "svd": {}, "ties_svd": {"density": 0.5}}.items():
        live = weighted_adapter(tmp_path / "gpt2", adapters, [0.7, 0.5], method, **settings)
        view = combined(tmp_path / "gpt2", adapters, [0.7, 0.5], method=method, **settings)
        assert error_between(merged_answers(view), answers(live)) <= RELATIVE, method
    together = live_together(tmp_path / "gpt2", adapters, [0.7, 0.5])
    assert_equal_answers(combined(tmp_path / "gpt2", adapters, [0.7, 0.5]), answers(together), tmp_path / "gpt2")


# ---------------------------------------------------------------- sequences


@pytest.mark.parametrize("names", [["a", "b"], ["a", "dora"], ["dora", "a"], ["saved", "a"], ["a", "saved"],
                                   ["a", "b", "dora"], ["bias", "loha"]])  # fmt: skip
def test_sequence_is_the_last_one_live_on_the_merge_of_the_others(
    names: list[str], base: Path, made: dict[str, Path]
) -> None:
    adapters = [made[name] for name in names]
    view = combined(base, adapters, method="sequence")
    model = load(base)
    for path in adapters[:-1]:
        model = PeftModel.from_pretrained(model, path).merge_and_unload()
    live = PeftModel.from_pretrained(model, adapters[-1]).eval()
    assert_equal_answers(view, answers(live), base)
    assert len(view.steps) == len(names)
    assert view.reference == ""


def test_the_order_of_a_sequence_matters(base: Path, made: dict[str, Path]) -> None:
    one, other = (combined(base, [made[a], made[b]], method="sequence") for a, b in (("a", "dora"), ("dora", "a")))
    assert error_between(merged_answers(one), merged_answers(other)) > 1e-3


# ---------------------------------------------------------------- what every view promises


VIEWS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "sum": (["a", "dora", "saved"], {}),
    "sequence": (["saved", "a", "head"], {"method": "sequence"}),
    "sequence-of-dora": (["dora", "a", "bias"], {"method": "sequence"}),
    "ties": (["a", "b"], {"method": "ties", "density": 0.5}),
    "dare": (["a", "b"], {"method": "dare_ties_svd", "density": 0.5, "seed": 1}),
}


@pytest.mark.parametrize("case", VIEWS)
def test_rows_deltas_accounts_and_references_agree(case: str, base: Path, made: dict[str, Path]) -> None:
    names, settings = VIEWS[case]
    adapters = [made[name] for name in names]
    view = combined(
        base, adapters, method=settings.get("method"), density=settings.get("density"), seed=settings.get("seed")
    )
    again = open_view(CheckpointRef.from_json(view.ref.to_json()))
    original = open_checkpoint(base)
    assert view.ref.base == str(base)
    assert [ref.path for ref in view.ref.adapters] == [str(path) for path in adapters]
    for name, info in view.tensors.items():
        whole = view.rows(name, 0, info.shape[0])
        halves = np.concatenate([again.rows(name, at, min(at + 7, info.shape[0])) for at in range(0, info.shape[0], 7)])
        np.testing.assert_allclose(whole, halves, rtol=0, atol=1e-6)
        assert np.array_equal(whole, again.rows(name, 0, info.shape[0])), "from run to run"
        source = name if name in original.tensors else "model.embed_tokens.weight"
        before = original.rows(source, 0, info.shape[0])
        delta = view.delta(name, 0, info.shape[0])
        assert (delta is not None) == (name in view.adapted)
        np.testing.assert_allclose(whole - before, 0 if delta is None else delta, atol=2e-6)
        if delta is None and name in original.tensors:
            assert view.stored(name) == original.stored(name)
    account = view.account()
    sums = {side: sorted(name for found in roles.values() for name in found) for side, roles in account.items()}
    assert sums["base"] == sorted(original.tensors)
    tensors = [load_file(path / "adapter_model.safetensors") for path in adapters]
    assert sums["adapter"] == sorted(f"{index}/{name}" for index, each in enumerate(tensors) for name in each)
    assert sorted(sums["base"] + sums["added"]) == sorted(view.tensors)
    hashes = view.file_hashes()
    assert {f"adapters/{index}/adapter_model.safetensors" for index in range(len(names))} <= set(hashes)
    assert view.fingerprint() == again.fingerprint()


def test_settings_and_weights_change_the_fingerprint(base: Path, made: dict[str, Path]) -> None:
    pair = [made["a"], made["b"]]
    views = [
        combined(base, pair),
        combined(base, pair, [1.0, 0.5]),
        combined(base, pair[::-1]),
        combined(base, pair, method="sequence"),
        combined(base, pair, method="dare_linear", density=0.5, seed=0),
        combined(base, pair, method="dare_linear", density=0.5, seed=1),
    ]
    assert len({str(view.fingerprint()) for view in views}) == len(views)
    rows = [view.rows(NAME, 0, 8) for view in views[-2:]]
    assert not np.array_equal(rows[0], rows[1]), "the seed does nothing"


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("names", "weights", "settings", "code"),
    [
        (["a", "a"], [], {}, "adapter-twice"),
        (["a", "b"], [1.0, 0.0], {}, "adapter-weight"),
        (["a", "b"], [1.0, float("nan")], {}, "adapter-weight"),
        (["a", "b"], [1.0, float("inf")], {}, "adapter-weight"),
        (["a", "b"], [1.0, 0.5], {"method": "sequence"}, "adapter-weight"),
        (["a"], [], {"method": "ties", "density": 0.5}, "combine-method"),
        (["a", "b"], [], {"method": "average"}, "combine-method"),
        (["a", "b"], [], {"method": "ties"}, "combine-option"),
        (["a", "b"], [], {"method": "ties", "density": 1.5}, "combine-option"),
        (["a", "b"], [], {"density": 0.5}, "combine-option"),
        (["a", "b"], [], {"method": "linear", "svd_rank": 4}, "combine-option"),
        (["a", "loha"], [], {"method": "svd"}, "combine-option"),
        (["a", "wide"], [], {"method": "linear"}, "combine-rank"),
        (["a", "dora"], [], {"method": "ties", "density": 0.5}, "combine-kind"),
        (["a", "loha"], [], {"method": "linear"}, "combine-kind"),
        (["saved", "a"], [0.5, 1.0], {}, "combine-whole"),
        (["saved", "head"], [], {}, "combine-whole"),
        (["tokens", "embedding"], [], {}, "combine-whole"),
    ],
)
def test_refusals(
    names: list[str], weights: list[float], settings: dict[str, Any], code: str, base: Path, made: dict[str, Path]
) -> None:
    with pytest.raises(AdapterError) as error:
        combined(base, [made[name] for name in names], weights, **settings)
    assert error.value.code == code
    assert error.value.why


def test_different_templates_are_refused_and_equal_ones_are_not(
    base: Path, made: dict[str, Path], tmp_path: Path
) -> None:
    changed = CHATML.replace("assistant", "nurse")
    own = [
        make_adapter(tmp_path / str(i), base, seed=i, template=text) for i, text in enumerate((CHATML, CHATML, changed))
    ]
    assert combined(base, own[:2]).tokenizer.files["tokenizer.json"].parent == own[1]
    with pytest.raises((AdapterError, Refusals)) as error:
        combined(base, own[1:])
    assert "combine-tokenizer" in str(error.value)
    last = combined(base, own[1:], method="sequence")
    assert last.tokenizer.files["chat_template.jinja"].read_text() == changed


def test_a_weighted_reference_opens(base: Path, made: dict[str, Path]) -> None:
    view = open_view(CheckpointRef(str(base), (AdapterRef(str(made["a"]), 0.5),)))
    assert distance(change_in(view, NAME), 0.5 * change_of(base, made["a"], NAME)) < 1e-5


def test_nan_in_the_base_is_named(base: Path, made: dict[str, Path], tmp_path: Path) -> None:
    """A decomposition of it would not end, or end in a traceback."""
    shutil.copytree(base, tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    weights[NAME][3, 5] = float("nan")
    save_file(weights, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    view = combined(tmp_path / "base", [made["dora"], made["dora2"]], method="svd")
    with pytest.raises(CheckpointError) as error:
        view.rows(NAME, 0, 4)
    assert error.value.code == "base-nan"


@pytest.mark.parametrize("names", [["resized", "a"], ["a", "resized"], ["resized", "embedding"], ["resized", "head"]])
@pytest.mark.parametrize("method", ["sum", "sequence"])
def test_a_resized_vocabulary_among_several(
    method: str, names: list[str], base: Path, made: dict[str, Path], tmp_path: Path
) -> None:
    model = load(base)
    model.resize_token_embeddings(780, mean_resizing=False)
    settings = LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"], task_type="CAUSAL_LM"
    )
    live = get_peft_model(model, settings)
    shake_adapter(live, 0.1, 5)
    live.save_pretrained(tmp_path / "resized", save_embedding_layers=False)
    adapters = [made.get(name, tmp_path / "resized") for name in names]
    if "a" not in names:
        with pytest.raises(AdapterError) as error:
            combined(base, adapters, method=method)
        assert error.value.code in ({"combine-whole"} if method == "sum" else {"adapter-resized-vocabulary"})
        return
    view = combined(base, adapters, method=method)
    assert view.config["vocab_size"] == view.tensors["model.embed_tokens.weight"].shape[0] == 780
    assert merged_answers(view).shape[-1] == 780
    alone = merge(open_checkpoint(base), [read_adapter(tmp_path / "resized")])
    for end in ("model.embed_tokens.weight", "lm_head.weight"):
        assert np.array_equal(view.rows(end, 0, 780), alone.rows(end, 0, 780))
        delta = view.delta(end, 700, 780)
        assert delta is not None
        np.testing.assert_allclose(delta, alone.delta(end, 700, 780), atol=1e-6)
    wanted = change_of(base, made["a"], NAME) + change_in(alone, NAME)
    assert distance(change_in(view, NAME), wanted) < 1e-5


@pytest.mark.parametrize("start", ["olora", "pissa"])
def test_a_start_that_was_taken_off_the_base(start: str, base: Path, made: dict[str, Path], tmp_path: Path) -> None:
    """It belongs to its own adapter's change, and is weighted with it; live, each adapter would take one off."""
    started = make_adapter(tmp_path / "started", base, targets=["q_proj"], init_lora_weights=start)
    alone = change_in(merge(open_checkpoint(base), [read_adapter(started)]), NAME)
    view = combined(base, [started, made["a"]], [0.5, 1.0])
    assert "no live reference" in view.reference
    assert distance(change_in(view, NAME), 0.5 * alone + change_of(base, made["a"], NAME)) < 1e-5
    with pytest.raises(AdapterError) as error:
        combined(base, [started, made["a"]], method="linear")
    assert error.value.code == "combine-kind"
