"""Logits and generation against transformers in float32, alone and many at once."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora2edge.backends.onnxruntime import session as session_module
from lora2edge.backends.onnxruntime.decoder import Call, Decoder
from lora2edge.backends.onnxruntime.engine import DecoderEngine
from lora2edge.backends.onnxruntime.session import OnnxSession, open_session
from lora2edge.contracts import Sampling
from lora2edge.errors import InputError, Lora2EdgeError, UnsupportedError
from tests.tiny import VOCAB, make_checkpoint
from tests.unit.graph.decoders import lower

MAX_LENGTH = 400
LENGTHS = (5, 300, 33, 90, 1, 250, 64, 17)


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def open_tiny(decoder: Path) -> Callable[..., OnnxSession]:
    def opened(slots: int = 1, max_length: int = MAX_LENGTH, folder: Path = decoder) -> OnnxSession:
        return open_session(folder, device="cpu", threads=1, slots=slots, max_length=max_length)

    return opened


@pytest.fixture(scope="module")
def session(open_tiny: Callable[..., OnnxSession]) -> Iterator[OnnxSession]:
    with open_tiny() as opened:
        yield opened


@pytest.fixture(scope="module")
def session3(open_tiny: Callable[..., OnnxSession]) -> Iterator[OnnxSession]:
    with open_tiny(slots=3) as opened:
        yield opened


def prompts() -> list[list[int]]:
    return [np.random.default_rng(length).integers(0, VOCAB - 16, length).tolist() for length in LENGTHS]


@torch.no_grad()
def expected_logits(model: torch.nn.Module, ids: list[int]) -> np.ndarray:
    return model(torch.tensor([ids])).logits[0].numpy()


@torch.no_grad()
def expected_tokens(model: torch.nn.Module, ids: list[int], count: int) -> list[int]:
    """Greedy, without a cache and without `generate`, which masks what equals the padding token."""
    found = list(ids)
    for _ in range(count):
        found.append(int(model(torch.tensor([found])).logits[0, -1].argmax()))
    return found[len(ids) :]


def test_logits_equal_transformers(model, session) -> None:
    keep = [range(length) for length in LENGTHS]
    found = list(session.logits(prompts(), keep))
    for ids, logits in zip(prompts(), found, strict=True):
        assert logits.dtype == np.float32
        np.testing.assert_allclose(logits, expected_logits(model, ids), atol=5e-5, rtol=0)
    again = list(session.logits(prompts(), keep))
    assert all(one.tobytes() == other.tobytes() for one, other in zip(found, again, strict=True))


def test_only_the_kept_rows_in_the_order_asked_for(model, session) -> None:
    keep = [[4, 0, 4], [], [32], [7, 80], [0], [], [63, 1], [2]]
    for ids, positions, rows in zip(prompts(), keep, session.logits(prompts(), keep), strict=True):
        assert rows.shape == (len(positions), VOCAB)
        if positions:
            np.testing.assert_allclose(rows, expected_logits(model, ids)[positions], atol=5e-5, rtol=0)
    assert list(session.logits([], [])) == []


def test_small_windows_and_long_sequences_give_the_same(model, session, monkeypatch) -> None:
    monkeypatch.setattr(session_module, "BATCH_TOKENS", 96)
    monkeypatch.setattr(session_module, "BATCH_BYTES", 200 * 4 * VOCAB)
    monkeypatch.setattr(session_module, "SCORED_BYTES", 130 * 4 * VOCAB)
    keep = [range(0, length, 3) if length != 250 else [249] for length in LENGTHS]
    shapes = []
    rows = Decoder.run_rows
    monkeypatch.setattr(Decoder, "run_rows", lambda *given: shapes.append(given[2].shape) or rows(*given))
    for ids, positions, logits in zip(prompts(), keep, session.logits(prompts(), keep), strict=True):
        np.testing.assert_allclose(logits, expected_logits(model, ids)[list(positions)], atol=5e-5, rtol=0)
    assert max(count for count, _ in shapes) > 1  # short ones of a window together


def test_logits_do_not_compute_what_is_not_asked_for(session, monkeypatch) -> None:
    """One row of the head for each sequence of a batch, however long."""
    sizes = []
    rows = Decoder.run_rows

    def watched(self, texts, positions):
        found = rows(self, texts, positions)
        sizes.append(found.shape)
        return found

    monkeypatch.setattr(Decoder, "run_rows", watched)
    list(session.logits([[1] * 60, [2] * 60], [[59], [3]]))
    assert sum(count * kept for count, kept, _ in sizes) == 2


def test_a_graph_that_gives_all_logits_is_run_too(model, open_tiny, foreign_decoder) -> None:
    with open_tiny(slots=2, folder=foreign_decoder) as opened:
        keep = [[length - 1, 0] for length in LENGTHS]
        for ids, positions, logits in zip(prompts(), keep, opened.logits(prompts(), keep), strict=True):
            np.testing.assert_allclose(logits, expected_logits(model, ids)[positions], atol=5e-5, rtol=0)
        answers = [opened.generate(ids, max_new=6, stop=[]) for ids in prompts()]
        for ids, answer in zip(prompts(), answers, strict=True):
            assert list(answer) == expected_tokens(model, ids, 6)


def test_concurrent_answers_equal_single_ones(model, session, session3) -> None:
    """Eight requests of all lengths on three slots: queued, prefilled beside others, moved between rows."""
    counts = [40, 3, 17, 28, 60, 5, 11, 33]
    answers = [session3.generate(ids, max_new=n, stop=[]) for ids, n in zip(prompts(), counts, strict=True)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(list, answers))
    for ids, count, found in zip(prompts(), counts, together, strict=True):
        assert found == list(session.generate(ids, max_new=count, stop=[])) == expected_tokens(model, ids, count)


def test_rows_that_end_make_room_and_the_last_moves_in(model, open_tiny, monkeypatch) -> None:
    widths = []
    run = Call.run
    monkeypatch.setattr(Call, "run", lambda self, ids, mask: widths.append(ids.shape) or run(self, ids, mask))
    with open_tiny(slots=3) as opened:
        ids = prompts()
        first, second = (opened.generate(ids[index], max_new=200, stop=[]) for index in (0, 2))
        third = opened.generate(ids[3], max_new=300, stop=[])
        taken = [next(third) for _ in range(5)]
        assert next(first) is not None
        first.close()
        second.close()
        taken += list(third)
    assert taken == expected_tokens(model, ids[3], 300)
    assert (3, 1) in widths and widths[-1] == (1, 1)


def test_a_prompt_is_read_without_logits_of_every_token(open_tiny, monkeypatch) -> None:
    sizes = []
    run = Call.run
    monkeypatch.setattr(Call, "run", lambda *given: sizes.append(run(*given).shape) or run(*given))
    with open_tiny() as opened:
        list(opened.generate(prompts()[1], max_new=2, stop=[]))
    assert set(sizes) == {(1, VOCAB)}


def test_four_slots_share_their_steps(open_tiny, monkeypatch) -> None:
    steps = []
    step = DecoderEngine._step
    monkeypatch.setattr(DecoderEngine, "_step", lambda self: steps.append(1) or step(self))
    counts = {}
    for slots in (1, 4):
        with open_tiny(slots=slots) as opened:
            steps.clear()
            answers = [opened.generate([9, 8, 7], max_new=30, stop=[]) for _ in range(4)]
            assert len({tuple(answer) for answer in answers}) == 1
            counts[slots] = len(steps)
    assert counts[4] < 45 and counts[1] > 110


def test_the_stop_token_ends_an_answer_and_is_left_out(model, session) -> None:
    tokens = expected_tokens(model, prompts()[0], 12)
    stop = tokens[6]
    assert list(session.generate(prompts()[0], max_new=12, stop=[stop])) == tokens[: tokens.index(stop)]


def test_closing_an_answer_frees_its_slot(model, open_tiny) -> None:
    with open_tiny() as opened:
        running = opened.generate([1, 2, 3], max_new=390, stop=[])
        waiting = opened.generate([4, 5, 6], max_new=3, stop=[])
        next(running)
        running.close()
        assert list(running) == []
        assert list(waiting) == expected_tokens(model, [4, 5, 6], 3)
        dropped = opened.generate([1, 2, 3], max_new=390, stop=[])
        next(dropped)
        del dropped
        assert len(list(opened.generate([7], max_new=2, stop=[]))) == 2


def test_a_cancelled_request_that_waits_never_starts(open_tiny) -> None:
    with open_tiny() as opened:
        running = opened.generate([1, 2, 3], max_new=200, stop=[])
        waiting = opened.generate(list(range(1, 300)), max_new=5, stop=[])
        waiting.close()
        assert len(list(running)) == 200
        assert opened._scheduler._pending == type(opened._scheduler._pending)()


def test_sampling_repeats_by_request_number(open_tiny) -> None:
    runs = []
    for _ in range(2):
        with open_tiny() as opened:
            runs.append(
                [list(opened.generate([3, 1, 4], max_new=20, stop=[], sampling=Sampling(1.0))) for _ in range(3)]
            )
    assert runs[0] == runs[1]
    assert len({tuple(tokens) for tokens in runs[0]}) == 3


def test_a_failed_step_reaches_its_callers_and_the_session_lives(model, open_tiny, monkeypatch) -> None:
    with open_tiny(slots=2) as opened:
        with monkeypatch.context() as broken:
            broken.setattr(Call, "_run", lambda self: 1 / 0)
            answers = [opened.generate([1, 2, 3], max_new=5, stop=[]) for _ in range(2)]
            for answer in answers:
                with pytest.raises(Lora2EdgeError) as caught:
                    list(answer)
                assert caught.value.code == "session-failed"
        assert list(opened.generate(prompts()[0], max_new=8, stop=[])) == expected_tokens(model, prompts()[0], 8)


def test_not_a_number_is_never_a_token(open_tiny, monkeypatch) -> None:
    run = Call.run
    monkeypatch.setattr(Call, "run", lambda *given: run(*given) * np.nan)
    with open_tiny() as opened, pytest.raises(Lora2EdgeError) as caught:
        list(opened.generate([1, 2, 3], max_new=5, stop=[]))
    assert caught.value.code == "not-finite" and "ONNX Runtime" in caught.value.what


def test_closing_the_session_ends_what_is_under_way(open_tiny) -> None:
    opened = open_tiny()
    answers = [opened.generate([1, 2, 3], max_new=390, stop=[]) for _ in range(2)]
    next(answers[0])
    scored = opened.logits([[1, 2]] * 2, [[1]] * 2)
    closer = threading.Thread(target=opened.close)
    closer.start()
    for answer in answers:
        with pytest.raises(InputError) as caught:
            list(answer)
        assert caught.value.code == "session-closed"
    closer.join()
    opened.close()
    for use in (
        lambda: opened.generate([1], max_new=1, stop=[]),
        lambda: opened.logits([[1]], [[0]]),
        lambda: next(scored),
    ):
        with pytest.raises(InputError) as caught:
            use()
        assert caught.value.code == "session-closed"


def test_too_long_names_both_numbers(session) -> None:
    with pytest.raises(InputError) as caught:
        session.generate([1] * 390, max_new=11, stop=[])
    assert caught.value.code == "too-long"
    assert "390 prompt + 11 new" in caught.value.what and str(MAX_LENGTH) in caught.value.what
    assert len(list(session.generate([1] * 390, max_new=10, stop=[]))) == 10
    with pytest.raises(InputError) as caught:
        session.logits([[1] * (MAX_LENGTH + 1)], [[0]])
    assert caught.value.code == "too-long" and str(MAX_LENGTH + 1) in caught.value.what


def test_a_cache_longer_than_the_model_is_refused(open_tiny) -> None:
    with pytest.raises(InputError) as caught:
        open_tiny(max_length=513)
    assert caught.value.code == "too-long" and "513" in caught.value.what and "512" in caught.value.what


@pytest.mark.parametrize("ids", [[-1], [VOCAB], [5, 10**6, 5]])
def test_ids_outside_the_vocabulary_are_refused(session, ids: list[int]) -> None:
    with pytest.raises(InputError) as caught:
        session.generate(ids, max_new=1, stop=[])
    assert caught.value.code == "token-id" and str(VOCAB) in caught.value.what
    with pytest.raises(InputError):
        session.logits([ids], [[0]])


def test_left_padding_is_refused(session, checkpoint: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    pad = tokenizer.pad_token_id
    for use in (
        lambda: session.generate([pad] * 3 + [5, 6], max_new=2, stop=[]),
        lambda: session.logits([[pad, pad, 5]], [[2]]),
    ):
        with pytest.raises(InputError) as caught:
            use()
        assert caught.value.code == "left-padded"
    assert len(list(session.generate([5, pad, 6], max_new=2, stop=[]))) == 2


@pytest.mark.parametrize(
    ("batch", "keep", "code"),
    [([[1, 2]], [[2]], "keep-position"), ([[1, 2]], [[-1]], "keep-position"), ([[1], [2]], [[0]], "keep-shape")],
)
def test_positions_outside_a_sequence_are_refused(session, batch, keep, code: str) -> None:
    with pytest.raises(InputError) as caught:
        session.logits(batch, keep)
    assert caught.value.code == code


def test_nothing_to_read_or_write_is_refused(session) -> None:
    for ids, count, code in (([], 1, "empty-prompt"), ([1], 0, "max-new")):
        with pytest.raises(InputError) as caught:
            session.generate(ids, max_new=count, stop=[])
        assert caught.value.code == code


def test_encode_equals_transformers(session, checkpoint: Path) -> None:
    messages = [{"role": "user", "content": "What are the symptoms of iron deficiency? 缺铁性贫血"}]
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert session.encode(messages) == list(expected)
    assert session.decode(session.encode(messages)) == tokenizer.decode(expected, skip_special_tokens=True)


def test_answers_stream(open_tiny) -> None:
    """The first token is there long before the last."""
    with open_tiny() as opened:
        began = time.perf_counter()
        answer = opened.generate([1, 2, 3], max_new=390, stop=[])
        next(answer)
        first = time.perf_counter() - began
        list(answer)
        assert first < (time.perf_counter() - began) / 3


def test_a_graph_that_is_no_decoder_is_refused(decoder: Path, tmp_path: Path) -> None:
    import onnx
    from onnx import TensorProto, helper

    value = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"])
    out = helper.make_tensor_value_info("logits", TensorProto.INT64, ["batch", "sequence"])
    graph = helper.make_graph([helper.make_node("Identity", ["input_ids"], ["logits"])], "no", [value], [out])
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), tmp_path / "model.onnx"
    )
    with pytest.raises(UnsupportedError) as caught:
        open_session(tmp_path, device="cpu", threads=1, slots=1, max_length=8)
    assert caught.value.code == "decoder-inputs"


def test_facts(session) -> None:
    facts = session.facts
    assert (facts.backend, facts.device, facts.slots, facts.max_length) == ("onnxruntime", "cpu", 1, MAX_LENGTH)
    assert facts.versions["onnxruntime"] in facts.build and "float32" in facts.dtype
    assert session.opened.nodes["CPUExecutionProvider"]["GroupQueryAttention"] == 2


@pytest.mark.parametrize("arch", ["llama", "mistral", "qwen3", "gemma2", "gemma3", "phi3"])
def test_every_architecture_in_chunks_and_beside_others(arch: str, tmp_path: Path) -> None:
    """Windows and caches: prompts of several chunks, decoded together on two slots."""
    window = {"sliding_window": 48} if arch in {"mistral", "gemma2", "gemma3", "phi3"} else {}
    base = make_checkpoint(tmp_path / "checkpoint", arch, dtype="float32", **window)
    lowered = lower(base, tmp_path / "artifact")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager").eval()
    ids = [prompt for prompt in prompts() if len(prompt) in {300, 33, 90}]
    with open_session(lowered.folder, device="cpu", threads=1, slots=2, max_length=MAX_LENGTH) as opened:
        answers = [opened.generate(prompt, max_new=12, stop=[]) for prompt in ids]
        assert [list(answer) for answer in answers] == [expected_tokens(model, prompt, 12) for prompt in ids]
        for prompt, logits in zip(ids, opened.logits(ids, [range(len(prompt)) for prompt in ids]), strict=True):
            wanted = expected_logits(model, prompt)
            assert np.abs(logits - wanted).max() <= 1e-5 * np.abs(wanted).max()


def test_a_forked_process_is_told_to_open_its_own(decoder: Path) -> None:
    """Threads do not survive a fork: without the check the child would wait for ever."""
    code = f"""
import os, sys
from pathlib import Path
from lora2edge.backends.onnxruntime.session import open_session
from lora2edge.errors import InputError
session = open_session(Path({str(decoder)!r}), device="cpu", threads=1, slots=1, max_length=32)
if (child := os.fork()) == 0:
    try:
        session.generate([1], max_new=1, stop=[])
    except InputError as error:
        session.close()
        os._exit(7 if error.code == "forked" else 1)
    os._exit(2)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), len(list(session.generate([1], max_new=3, stop=[]))))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["7", "3"]


def test_a_session_that_is_never_closed_ends_with_the_process(decoder: Path) -> None:
    """An answer under way does not crash the interpreter's end."""
    code = f"""
from pathlib import Path
from lora2edge.backends.onnxruntime.session import open_session
session = open_session(Path({str(decoder)!r}), device="cpu", threads=1, slots=1, max_length=400)
answer = session.generate([1], max_new=399, stop=[])
print(next(answer) >= 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "True", "")
