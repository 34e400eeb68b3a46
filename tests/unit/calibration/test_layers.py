"""The layered pass against the whole model in memory: same batches, plainly run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora2edge.calibration import StoredCalibration, calibrate
from lora2edge.checkpoint import open_checkpoint
from lora2edge.contracts import Checkpoint, Sample
from lora2edge.progress import SILENT
from tests.architectures import ARCHITECTURES, Architecture, make_model
from tests.unit.calibration.whole import run_whole, samples


def run(view: Checkpoint, texts: list[Sample], out: Path, **more: Any) -> StoredCalibration:
    out.mkdir()
    return calibrate(view, texts, out, SILENT, device="cpu", threads=1, **more)


def is_shared(name: str) -> bool:
    """DeBERTa's layers see relative positions too, not tokens alone."""
    return name.startswith("deberta.") and ("query_proj" in name or "key_proj" in name)


@pytest.mark.parametrize("shared", [0, 20])
@pytest.mark.parametrize(
    "name",
    ["llama", "qwen2", "qwen3", "qwen3_moe", "mixtral", "gemma2", "gemma3", "phi3", "gpt2", "gpt_neox",
     "bert", "roberta", "deberta-v2"],
)  # fmt: skip
def test_statistics_equal_those_of_the_whole_model(name: str, shared: int, tmp_path: Path) -> None:
    """Windows shorter than the text, two ropes, experts, scaled embeddings, classifiers' heads."""
    make_model(ARCHITECTURES[name], tmp_path)
    view, texts = open_checkpoint(tmp_path), samples(shared, vocab=370)
    expected = run_whole(view, texts)
    found = run(view, texts, tmp_path / "out", layer_inputs=True)
    assert found.layers == 2
    assert found.prefix == (shared if view.task == "causal-lm" else 0)
    covered = 0
    for tensor in found.names:
        values = next((expected[home] for home in view.module_names(tensor) if home in expected), None)
        if values is None or is_shared(tensor):
            continue
        covered += 1
        stats = found.vectors(tensor)
        assert stats.count == len(values)
        np.testing.assert_allclose(stats.mean_square, np.square(values, dtype=np.float64).mean(0), rtol=1e-6)
        if stats.output_maxima is not None:
            np.testing.assert_allclose(stats.input_maxima, np.abs(values).max(0), rtol=1e-5)
    assert covered == sum("expert" not in tensor and not is_shared(tensor) for tensor in found.names) - (
        f"{ARCHITECTURES[name].embedding}.weight" in " ".join(found.names)
    )
    for layer in range(2):
        inputs = list(found.layer_inputs(layer))
        assert [len(rows) for rows in inputs] == [len(sample.ids) for sample in texts]
        np.testing.assert_allclose(np.concatenate(inputs), expected[f"layer {layer}"], rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral"])
def test_experts_are_told_apart(name: str, tmp_path: Path) -> None:
    """Against routing by hand: the router's own weights on what the layer's experts are given."""
    import torch

    model = make_model(ARCHITECTURES[name], tmp_path)
    view, texts = open_checkpoint(tmp_path), samples(7, vocab=370)
    found = run(view, texts, tmp_path / "out")
    experts = model.model.layers[0].mlp.experts
    seen: list[Any] = []
    experts.register_forward_pre_hook(lambda _, given: seen.append((given[0].clone(), given[1].clone())))
    model.requires_grad_(False)
    for sample in texts:
        model(torch.tensor([sample.ids]))
    tokens, chosen = (torch.cat(parts) for parts in zip(*seen, strict=True))
    for expert in range(4):
        mine = tokens[(chosen == expert).any(1)]
        gate, up = torch.nn.functional.linear(mine, experts.gate_up_proj[expert]).chunk(2, -1)
        inner = experts.act_fn(gate) * up
        for suffixes, inputs, outputs in (
            (("gate_proj", "w1"), mine, gate), (("up_proj", "w3"), mine, up),
            (("down_proj", "w2"), inner, inner @ experts.down_proj[expert].T),
        ):  # fmt: skip
            own = [n for n in found.names if n.startswith("model.layers.0.") and f".experts.{expert}." in n]
            (tensor,) = (n for n in own if n.split(".")[-2] in suffixes)
            stats = found.vectors(tensor)
            assert stats.count == len(inputs)
            assert stats.output_maxima is not None
            np.testing.assert_allclose(stats.mean_square, inputs.square().mean(0), rtol=1e-4)
            np.testing.assert_allclose(stats.output_maxima, outputs.abs().amax(0), rtol=1e-4)
    told = found.experts()
    assert told is not None
    assert (told["stacks"], told["experts"]) == (2, 8)


def test_an_expert_that_no_token_is_sent_to(tmp_path: Path) -> None:
    make_model(ARCHITECTURES["qwen3_moe"], tmp_path)
    view = open_checkpoint(tmp_path)

    class Undecided:
        """A router that knows no difference: the same two of four experts get all tokens."""

        def __getattr__(self, name: str) -> Any:
            return getattr(view, name)

        def rows(self, name: str, start: int, stop: int) -> Any:
            rows = view.rows(name, start, stop)
            if name.endswith("layers.1.mlp.gate.weight"):
                rows[:] = 0
            return rows

    found = run(Undecided(), samples(vocab=370), tmp_path / "out")  # type: ignore[arg-type]
    told = found.experts()
    assert told is not None
    for layer, experts in told["unseen"].items():
        for expert in experts:
            stats = found.vectors(f"{layer}.{expert}.up_proj.weight")
            assert stats.count == 0
            assert not stats.mean_square.any()
    assert [len(experts) for experts in told["unseen"].values()] == [2]
    assert told["fewest"] == 0
    assert told["warning"].startswith("2 of 8 experts saw no token")


def test_quantiles_are_those_of_the_sampled_tokens(tmp_path: Path) -> None:
    """Samples of eight times one token: every eighth token of a batch is like every other."""
    make_model(ARCHITECTURES["llama"], tmp_path)
    view = open_checkpoint(tmp_path)
    texts = samples(vocab=370, lengths=(64,))
    expected = run_whole(view, texts, prefix=False)
    found = run(view, texts, tmp_path / "out")
    for tensor in found.names:
        stats = found.vectors(tensor)
        assert stats.input_quantiles is not None
        assert stats.input_maxima is not None
        values = np.abs(expected[tensor])
        assert (np.diff(stats.input_quantiles) >= 0).all()
        assert stats.input_quantiles[-1] <= stats.input_maxima.max()
        sampled = np.sort(np.concatenate([values[:63:8], values[63:]]).ravel())
        exact = sampled[np.ceil(np.array([0.99, 0.999, 0.9999]) * len(sampled)).astype(int) - 1]
        np.testing.assert_array_less(exact * (1 - 1e-5), stats.input_quantiles)
        np.testing.assert_array_less(stats.input_quantiles, exact * (1 + 2**-7 + 1e-5))


def test_only_what_is_needed_is_read(tmp_path: Path) -> None:
    """Each layer once, of the embedding what occurs, and of the output layer nothing."""
    make_model(ARCHITECTURES["llama"], tmp_path)
    view = open_checkpoint(tmp_path)
    read: dict[str, int] = {}

    class Counting:
        def __getattr__(self, name: str) -> Any:
            return getattr(view, name)

        def rows(self, name: str, start: int, stop: int) -> Any:
            read[name] = read.get(name, 0) + stop - start
            return view.rows(name, start, stop)

    run(Counting(), samples(vocab=20, lengths=(30,)), tmp_path / "out")  # type: ignore[arg-type]
    assert "lm_head.weight" not in read
    assert read.pop("model.embed_tokens.weight") <= 20
    assert read == {name: view.tensors[name].shape[0] for name in read}
    assert set(read) == set(view.tensors) - {"lm_head.weight", "model.embed_tokens.weight"}


def test_a_model_without_a_plain_list_of_layers_runs_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where layers share weights, keys or values, all of them are one."""
    monkeypatch.setattr("lora2edge.calibration.layers._find_layers", lambda model: ("", None))
    for name in ("gemma3", "qwen3_moe", "bert"):
        make_model(ARCHITECTURES[name], tmp_path / name)
        view, texts = open_checkpoint(tmp_path / name), samples(20, vocab=370)
        expected = run_whole(view, texts)
        found = run(view, texts, tmp_path / f"{name}.out")
        assert found.layers == 1
        for tensor in found.names:
            values = next((expected[home] for home in view.module_names(tensor) if home in expected), None)
            if values is not None:
                mean = np.square(values, dtype=np.float64).mean(0)
                np.testing.assert_allclose(found.vectors(tensor).mean_square, mean, rtol=1e-6)


def test_distilbert(tmp_path: Path) -> None:
    settings = {"vocab_size": 384, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "num_labels": 3,
                "max_position_embeddings": 64, "pad_token_id": 0}  # fmt: skip
    architecture = Architecture(
        "DistilBertForSequenceClassification", "DistilBertConfig", settings, (), (), "word_embeddings", "classifier"
    )
    make_model(architecture, tmp_path)
    view, texts = open_checkpoint(tmp_path), samples(vocab=370)
    expected = run_whole(view, texts)
    found = run(view, texts, tmp_path / "out")
    assert found.layers == 2
    assert set(found.names) == set(expected) - {"layer 0", "layer 1"}
    for tensor in found.names:
        mean = np.square(expected[tensor], dtype=np.float64).mean(0)
        np.testing.assert_allclose(found.vectors(tensor).mean_square, mean, rtol=1e-6)
