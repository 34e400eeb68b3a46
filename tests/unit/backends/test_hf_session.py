"""PyTorch sessions against transformers and PEFT used directly."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lora2edge.adapters import merge, read_adapter
from lora2edge.backends.hf import HfBackend, HfSession, open_baseline, open_merged
from lora2edge.calibration.model import build_model
from lora2edge.checkpoint import open_checkpoint
from lora2edge.contracts import CheckpointRef, Machine, SessionOptions
from lora2edge.errors import AdapterError, CheckpointError, DataError, Refusals
from lora2edge.progress import SILENT
from lora2edge.target import Target
from tests.tiny import ARCHES, make_adapter, make_checkpoint

RUN = SessionOptions("cpu", threads=1, slots=4, max_length=200)
PROMPTS = [[5, 9, 300, 41], [7], list(range(20, 60)), [700, 3, 3, 3, 12, 90, 77], [11, 12]]
TARGET = Target(name="hf/merged", backend="hf", precision="stored")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("hf") / "base", "qwen2")


@pytest.fixture(scope="module")
def adapter(base: Path) -> Path:
    return make_adapter(base.parent / "adapter", base)


@pytest.fixture(scope="module")
def live(base: Path, adapter: Path) -> Iterator[HfSession]:
    session = open_baseline(CheckpointRef.of(base, adapter), RUN, dtype="float32")
    yield session
    session.close()


@pytest.fixture(scope="module")
def theirs(base: Path, adapter: Path) -> Any:
    from peft import PeftModel

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return PeftModel.from_pretrained(model, str(adapter)).eval()


def direct(model: Any, ids: list[int]) -> Any:
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0].float().numpy()


# ---------------------------------------------------------------- models from views


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("tied", [True, False])
def test_a_view_becomes_the_model_that_transformers_loads(tmp_path: Path, arch: str, tied: bool) -> None:
    folder = make_checkpoint(tmp_path / "base", arch, tied=tied)
    view = open_checkpoint(str(folder))
    for dtype in ("float32", "bfloat16"):
        expected = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
        model = build_model(view, dtype=dtype, device="cpu", rounded=False)
        assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
        assert np.array_equal(direct(model, PROMPTS[2]), direct(expected, PROMPTS[2]))


def test_rounding_goes_through_the_stored_dtype(base: Path, adapter: Path) -> None:
    view = merge(open_checkpoint(str(base)), (read_adapter(str(adapter)),))
    name = "model.layers.1.mlp.down_proj.weight"
    exact = build_model(view, dtype="float32", device="cpu", rounded=False).get_parameter(name)
    written = build_model(view, dtype="float32", device="cpu", rounded=True).get_parameter(name)
    assert not torch.equal(exact, written)
    assert torch.equal(exact.bfloat16().float(), written)


def altered(base: Path, folder: Path, change: Any, **config: Any) -> Path:
    """The checkpoint with `change` applied to its tensors and `config` over its config."""
    folder.mkdir()
    for file in base.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return folder


def test_a_view_that_does_not_fit_the_model_is_refused(base: Path, tmp_path: Path) -> None:
    def drop(tensors: Any) -> None:
        del tensors["model.layers.0.self_attn.q_proj.bias"]

    def add(tensors: Any) -> None:
        tensors["model.layers.0.self_attn.q_proj.weird"] = torch.ones(3)

    for name, change, config, code in (
        ("drop", drop, {}, "missing-tensors"),
        ("add", add, {}, "unknown-tensors"),
        ("shape", lambda tensors: None, {"intermediate_size": 96}, "tensor-shape"),
    ):
        view = open_checkpoint(str(altered(base, tmp_path / name, change, **config)))
        with pytest.raises(CheckpointError) as caught:
            build_model(view, dtype="float32", device="cpu", rounded=False)
        assert caught.value.code == code
    with pytest.raises(CheckpointError, match="lacks 1 of"):
        open_baseline(CheckpointRef.of(tmp_path / "drop"), RUN, dtype="float32")


def test_a_head_of_its_own_under_a_config_that_says_tied(base: Path, tmp_path: Path) -> None:
    def untie(tensors: Any) -> None:
        tensors["lm_head.weight"] = -tensors["model.embed_tokens.weight"]

    folder = altered(base, tmp_path / "untied", untie)
    model = build_model(open_checkpoint(str(folder)), dtype="float32", device="cpu", rounded=False)
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert np.array_equal(direct(model, PROMPTS[0]), direct(expected, PROMPTS[0]))


# ---------------------------------------------------------------- logits


def test_logits_of_the_live_adapter_are_pefts(live: HfSession, theirs: Any) -> None:
    keep = [[0, 3], [0], [39, 1, 1], range(7), []]
    found = list(live.logits(PROMPTS, keep))
    assert [logits.dtype for logits in found] == [np.float32] * 5
    for ids, kept, logits in zip(PROMPTS, keep, found, strict=True):
        np.testing.assert_allclose(logits, direct(theirs, ids)[list(kept)], atol=2e-5)


def test_the_adapter_off_is_the_base(live: HfSession, theirs: Any) -> None:
    with live.adapter_off():
        off = next(live.logits(PROMPTS[:1], [[3]]))
    with theirs.disable_adapter():
        np.testing.assert_allclose(off[0], direct(theirs, PROMPTS[0])[3], atol=2e-5)
    np.testing.assert_allclose(next(live.logits(PROMPTS[:1], [[3]]))[0], direct(theirs, PROMPTS[0])[3], atol=2e-5)


def test_long_batches_are_split_and_put_back_in_order(live: HfSession, theirs: Any) -> None:
    generator = np.random.default_rng(0)
    batch = [generator.integers(0, 700, length).tolist() for length in generator.integers(1, 120, 60)]
    seen: list[int] = []
    states = live.hidden(batch, [[len(ids) - 1] for ids in batch], seen.append)
    assert sum(seen) == 60 and len(seen) > 1
    for index in (0, 17, 59):
        np.testing.assert_allclose(live.head(states[index])[0], direct(theirs, batch[index])[-1], atol=2e-5)


@pytest.mark.parametrize(("arch", "targets"), [("gemma2", ["q_proj"]), ("llama", ["lm_head", "q_proj"])])
def test_the_output_layer_as_a_matrix(tmp_path: Path, arch: str, targets: list[str]) -> None:
    """With Gemma's soft-capping, and with a live adapter on the output layer itself."""
    folder = make_checkpoint(tmp_path / "base", arch, tied=arch == "gemma2")
    adapter = make_adapter(tmp_path / "adapter", folder, targets=targets)
    session = open_baseline(CheckpointRef.of(folder, adapter), RUN, dtype="float32")
    states = session.hidden(PROMPTS[:1], [range(4)])[0]
    head = session.head
    expected = next(session.logits(PROMPTS[:1], [range(4)]))
    session.close()
    matrix, bias = head.matrix()
    assert bias is None
    logits = states @ matrix.T
    if head.softcap is not None:
        assert head.softcap == 30
        logits = np.tanh(logits / 30) * 30
    np.testing.assert_allclose(logits, expected, atol=2e-5)
    np.testing.assert_allclose(head(states), expected, atol=2e-5)


def test_an_adapter_that_came_with_new_tokens(base: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    rows = model.get_input_embeddings().weight.shape[0] + 4
    model.resize_token_embeddings(rows)
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"], task_type="CAUSAL_LM")
    tuned = get_peft_model(model, config)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05)
    tuned.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    again.resize_token_embeddings(rows)
    expected = direct(PeftModel.from_pretrained(again, str(tmp_path)).eval(), [5, rows - 1, 9])
    session = open_baseline(CheckpointRef.of(base, tmp_path), RUN, dtype="float32")
    np.testing.assert_allclose(next(session.logits([[5, rows - 1, 9]], [range(3)])), expected, atol=2e-5)
    session.close()
    plain = open_baseline(CheckpointRef.of(base), RUN, dtype="float32")
    before = next(plain.logits([[5, 9]], [range(2)]))
    plain.grow_vocabulary(rows)
    assert plain.vocabulary == rows
    after = next(plain.logits([[5, 9, rows - 1]], [range(2)]))
    np.testing.assert_allclose(after[:, : rows - 4], before, atol=2e-5)
    np.testing.assert_allclose(after[:, -1], before.mean(1), atol=1e-4)
    plain.close()


def test_folders_that_cannot_be_read(base: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        open_baseline(CheckpointRef.of(tmp_path), RUN, dtype="float32")
    with pytest.raises(AdapterError):
        open_baseline(CheckpointRef.of(base, tmp_path), RUN, dtype="float32")


def test_an_adapter_that_lacks_a_tensor(base: Path, adapter: Path, tmp_path: Path) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    del tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"]
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    with pytest.raises(AdapterError, match="lacks tensors") as caught:
        open_baseline(CheckpointRef.of(base, tmp_path), RUN, dtype="float32")
    assert "layers.0.self_attn.q_proj.lora_B" in caught.value.why


# ---------------------------------------------------------------- generation


def greedy(model: Any, ids: list[int], count: int) -> list[int]:
    found = model.generate(
        input_ids=torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        temperature=None,
    )
    return found[0, len(ids) :].tolist()


@pytest.mark.parametrize("arch", ["qwen2", "gemma2", "gemma3", "phi3"])
def test_greedy_answers_are_transformers_own(tmp_path: Path, arch: str) -> None:
    """Alone, and in batches with rows of other lengths and of other ends (sliding windows included)."""
    folder = make_checkpoint(tmp_path / "base", arch)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    lengths = [3, 24, 9, 24, 1]
    expected = [greedy(model, ids, count) for ids, count in zip(PROMPTS, lengths, strict=True)]
    session = open_baseline(CheckpointRef.of(folder), RUN, dtype="float32")
    streams = [session.generate(ids, max_new=n, stop=[]) for ids, n in zip(PROMPTS, lengths, strict=True)]
    assert [list(stream) for stream in streams] == expected
    assert list(session.generate(PROMPTS[2], max_new=9, stop=[])) == expected[2]
    session.close()


def test_the_stop_token_ends_an_answer_and_is_not_in_it(live: HfSession) -> None:
    free = list(live.generate(PROMPTS[2], max_new=12, stop=[]))
    stop = free[5]
    assert list(live.generate(PROMPTS[2], max_new=12, stop=[stop])) == free[: free.index(stop)]
    assert list(live.generate(PROMPTS[2], max_new=0, stop=[])) == []


def test_many_threads_get_their_own_answers(live: HfSession) -> None:
    expected = [list(live.generate(ids, max_new=8, stop=[])) for ids in PROMPTS]
    found: dict[int, list[int]] = {}

    def ask(index: int) -> None:
        found[index] = list(live.generate(PROMPTS[index % 5], max_new=8, stop=[]))

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(15)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[index] for index in range(15)] == expected * 3


def test_closing_an_answer_frees_its_slot(live: HfSession) -> None:
    for _ in range(3):
        stream: Any = live.generate(PROMPTS[0], max_new=150, stop=[])
        next(stream)
        stream.close()
        assert list(stream) == []
    live.generate(PROMPTS[0], max_new=150, stop=[])
    assert len(list(live.generate(PROMPTS[1], max_new=2, stop=[]))) == 2


def test_closing_the_session_ends_what_runs(base: Path) -> None:
    session = open_baseline(CheckpointRef.of(base), RUN, dtype="float32")
    stream = session.generate(PROMPTS[0], max_new=190, stop=[])
    next(stream)
    session.close()
    with pytest.raises(RuntimeError, match="closed"):
        list(stream)
    with pytest.raises(RuntimeError, match="closed"):
        session.generate(PROMPTS[0], max_new=1, stop=[])


def test_more_than_a_slot_holds_is_refused(live: HfSession) -> None:
    with pytest.raises(DataError, match="201 tokens are asked for, a slot of this session holds 200"):
        live.generate([1] * 101, max_new=100, stop=[])
    with pytest.raises(DataError, match="201 tokens"):
        list(live.logits([[1] * 201], [[0]]))


def test_temperature_draws_tokens(live: HfSession) -> None:
    from lora2edge.contracts import Sampling

    drawn = {tuple(live.generate(PROMPTS[0], max_new=5, stop=[], sampling=Sampling(2.0))) for _ in range(5)}
    assert len(drawn) > 1


def test_encode_is_the_tokenizers(live: HfSession) -> None:
    from tests.tiny import bpe_tokenizer

    talk = [{"role": "user", "content": "What is asthma?"}]
    expected = bpe_tokenizer().apply_chat_template(talk, add_generation_prompt=True, return_dict=False)
    assert live.encode(talk) == expected


# ---------------------------------------------------------------- the backend


def test_lower_open_and_damage(base: Path, adapter: Path, tmp_path: Path, theirs: Any) -> None:
    backend, view = HfBackend(), merge(open_checkpoint(str(base)), (read_adapter(str(adapter)),))
    estimate = backend.check(view, TARGET, Machine(2, 1 << 34, 1 << 34, None))
    lowered = backend.lower(view, TARGET, None, tmp_path, SILENT)
    assert lowered.notes == {"dtypes": ["BF16"]}
    written = (tmp_path / "model.safetensors").stat().st_size
    assert 0 <= written - estimate.disk_bytes < 10_000
    session = backend.open(tmp_path, TARGET, RUN)
    assert session.facts.dtype == "bfloat16"
    merged = open_merged(view, RUN, dtype="bfloat16", rounded=True)
    for ours, again in zip(session.logits(PROMPTS, [[0]] * 5), merged.logits(PROMPTS, [[0]] * 5), strict=True):
        assert np.array_equal(ours, again)
    session.close()
    merged.close()

    exact = theirs.merge_and_unload().state_dict()
    stored, original = load_file(tmp_path / "model.safetensors"), load_file(base / "model.safetensors")
    damage = {tensor.name: tensor for tensor in backend.damage(view, tmp_path, SILENT)}
    name = "model.layers.1.mlp.down_proj.weight"
    q, w, b = (tensor[name].double() for tensor in (stored, exact, original))
    found = damage[name]
    assert (found.type, found.layer) == ("BF16", 1)
    assert found.relative_error == pytest.approx(float((q - w).norm() / w.norm()), rel=1e-3)
    assert found.delta_kept == pytest.approx(float(((q - b) * (w - b)).sum() / (w - b).square().sum()), rel=1e-5)
    assert found.delta_noise == pytest.approx(float((q - w).norm() / (w - b).norm()), rel=1e-3)
    assert damage["model.embed_tokens.weight"].delta_kept is None
    assert damage["model.embed_tokens.weight"].relative_error == 0


def test_check_refuses_everything_at_once(base: Path) -> None:
    target = TARGET.model_copy(update={"precision": "q4_k_m", "options": {"imatrix": True}})
    with pytest.raises(Refusals) as caught:
        HfBackend().check(open_checkpoint(str(base)), target, Machine(2, 1 << 34, 1 << 34, None))
    assert [error.code for error in caught.value.errors] == ["unknown-precision", "unknown-option"]


def test_the_doctor_names_versions() -> None:
    health = HfBackend().doctor()
    assert health.works and torch.__version__.split("+")[0] in health.detail
