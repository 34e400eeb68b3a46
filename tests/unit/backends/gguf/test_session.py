"""Logits and generation against transformers in float32, alone and many at once."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from lora2edge.backends.gguf.context import Context
from lora2edge.backends.gguf.session import GgufSession, open_session
from lora2edge.backends.scheduler import Answer
from lora2edge.contracts import Sampling
from lora2edge.errors import InputError, Lora2EdgeError, UnsupportedError
from tests.tiny import VOCAB

MAX_LENGTH = 400
LENGTHS = (5, 300, 33, 90, 1, 250, 64, 17)


@pytest.fixture(scope="module")
def model(qwen2_checkpoint: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(
        qwen2_checkpoint, dtype=torch.float32, attn_implementation="eager"
    ).eval()


@pytest.fixture(scope="module")
def open_tiny(qwen2_gguf: Path) -> Callable[..., GgufSession]:
    def opened(slots: int = 1, max_length: int = MAX_LENGTH, cache: str = "f32") -> GgufSession:
        return open_session(qwen2_gguf, device="cpu", threads=1, slots=slots, max_length=max_length, cache=cache)

    return opened


@pytest.fixture(scope="module")
def session(open_tiny: Callable[..., GgufSession]) -> Iterator[GgufSession]:
    with open_tiny() as opened:
        yield opened


@pytest.fixture(scope="module")
def session4(open_tiny: Callable[..., GgufSession]) -> Iterator[GgufSession]:
    with open_tiny(slots=4) as opened:
        yield opened


def prompts() -> list[list[int]]:
    return [np.random.default_rng(length).integers(0, VOCAB - 8, length).tolist() for length in LENGTHS]


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


@pytest.mark.parametrize("slots", [1, 4])
def test_logits_equal_transformers(model, session, session4, slots: int) -> None:
    keep = [range(length) for length in LENGTHS]
    found = list({1: session, 4: session4}[slots].logits(prompts(), keep))
    for ids, logits in zip(prompts(), found, strict=True):
        assert logits.dtype == np.float32
        np.testing.assert_allclose(logits, expected_logits(model, ids), atol=5e-5, rtol=0)


def test_float16_cache_costs_little(model, open_tiny) -> None:
    """What users run. The cache rounds keys and values to 11 bits, and the logits move by about 1e-3."""
    ids = prompts()[1]
    with open_tiny(cache="f16") as opened:
        (logits,) = opened.logits([ids], [range(len(ids))])
    expected = expected_logits(model, ids)
    difference = np.abs(logits - expected)
    assert 1e-5 < difference.max() < 0.03
    p = torch.log_softmax(torch.tensor(expected), -1)
    q = torch.log_softmax(torch.tensor(logits), -1)
    assert float((p.exp() * (p - q)).sum(-1).mean()) < 5e-6


def test_only_the_kept_rows_in_the_order_asked_for(model, session4) -> None:
    batch = prompts()
    keep = [[4], list(range(100, 230)), [3, 1, 1, 32], [], [0], [249], [63, 0], []]
    found = list(session4.logits(batch, keep))
    assert [logits.shape for logits in found] == [(len(positions), VOCAB) for positions in keep]
    for ids, positions, logits in zip(batch, keep, found, strict=True):
        np.testing.assert_allclose(logits, expected_logits(model, ids)[positions], atol=5e-5, rtol=0)


def test_more_rows_than_one_batch_may_output(model, qwen2_gguf, monkeypatch) -> None:
    """The output buffer is bounded: with room for 10 rows a sequence is read in many small steps."""
    monkeypatch.setattr("lora2edge.backends.gguf.session.OUTPUT_BYTES", 10 * 4 * VOCAB)
    batch = prompts()
    with open_session(qwen2_gguf, device="cpu", threads=1, slots=3, max_length=MAX_LENGTH, cache="f32") as opened:
        found = list(opened.logits(batch, [range(len(ids)) for ids in batch]))
    for ids, logits in zip(batch, found, strict=True):
        np.testing.assert_allclose(logits, expected_logits(model, ids), atol=5e-5, rtol=0)


def test_logits_repeat_bit_by_bit(session4) -> None:
    keep = [range(length) for length in LENGTHS]
    first = [logits.copy() for logits in session4.logits(prompts(), keep)]
    for one, two in zip(first, session4.logits(prompts(), keep), strict=True):
        np.testing.assert_array_equal(one, two)


def test_logits_left_early_free_their_slots(session) -> None:
    rows = session.logits(prompts(), [range(length) for length in LENGTHS])
    next(rows)
    rows.close()
    assert len(list(session.generate([1, 2], max_new=2, stop=[]))) == 2


@pytest.mark.parametrize("slots", [1, 4])
def test_greedy_equals_transformers(model, session, session4, slots: int) -> None:
    opened = {1: session, 4: session4}[slots]
    for ids in prompts()[:4]:
        assert list(opened.generate(ids, max_new=12, stop=[])) == expected_tokens(model, ids, 12)


@pytest.mark.parametrize("slots", [1, 4])
def test_many_threads_get_what_one_gets(model, session, session4, slots: int) -> None:
    """Eight threads on one slot and on four: queued, batched, each its own answer."""
    opened = {1: session, 4: session4}[slots]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda ids: list(opened.generate(ids, max_new=16, stop=[])), prompts()))
    assert found == [expected_tokens(model, ids, 16) for ids in prompts()]
    assert len({tuple(tokens) for tokens in found}) == len(LENGTHS)


def test_four_slots_share_their_steps(open_tiny, monkeypatch) -> None:
    """Four requests of one prompt and 30 tokens need little more than 30 steps on four slots, and 4 x 30 on one."""
    steps = []
    fill = Context._fill
    monkeypatch.setattr(Context, "_fill", lambda self, active: steps.append(1) or fill(self, active))
    counts = {}
    for slots in (1, 4):
        steps.clear()
        with open_tiny(slots=slots) as opened:
            answers = [opened.generate([7, 8, 9], max_new=30, stop=[]) for _ in range(4)]
            assert len({tuple(answer) for answer in answers}) == 1
        counts[slots] = len(steps)
    assert counts[1] == 120
    assert counts[4] < 60


def test_stop_tokens_end_the_answer_and_are_not_in_it(model, session) -> None:
    ids, expected = next((ids, found) for ids in prompts() if len(set(found := expected_tokens(model, ids, 12))) > 2)
    stop = next(token for token in expected if expected.index(token) > 1)
    assert list(session.generate(ids, max_new=12, stop=[stop])) == expected[: expected.index(stop)]
    assert list(session.generate(ids, max_new=12, stop=[expected[0]])) == []


def test_without_stop_max_new_tokens_come_whatever_they_are(session) -> None:
    end = session.token_id("<|im_end|>")
    for ids in ([end], [end, end], prompts()[0]):
        assert len(list(session.generate(ids, max_new=40, stop=()))) == 40


def test_closing_the_answer_frees_its_slot(session) -> None:
    """One slot: the second request can only start because the first one is cancelled."""
    long = session.generate([1, 2, 3], max_new=390, stop=[])
    next(long)
    waiting = session.generate([4, 5], max_new=3, stop=[])
    long.close()
    assert len(list(waiting)) == 3
    assert list(long) == []


def test_dropping_the_answer_frees_its_slot(session) -> None:
    session.generate([1, 2, 3], max_new=390, stop=[])
    abandoned = iter(session.generate([1, 2, 3], max_new=390, stop=[]))
    next(abandoned)
    del abandoned
    assert len(list(session.generate([4, 5], max_new=3, stop=[]))) == 3


def test_a_waiting_request_can_be_cancelled(session) -> None:
    running = session.generate([1, 2, 3], max_new=50, stop=[])
    waiting = session.generate([4], max_new=50, stop=[])
    waiting.close()
    assert len(list(running)) == 50


def test_scoring_and_answering_at_once(model, session4) -> None:
    ids = prompts()[2]
    expected = expected_tokens(model, ids, 60)
    answer = session4.generate(ids, max_new=60, stop=[])
    found = list(session4.logits(prompts()[:4], [range(length) for length in LENGTHS[:4]]))
    for prompt, logits in zip(prompts(), found, strict=False):
        np.testing.assert_allclose(logits, expected_logits(model, prompt), atol=5e-5, rtol=0)
    assert list(answer) == expected


def test_temperature_follows_the_distribution(model, open_tiny) -> None:
    """First tokens of 2,000 requests against softmax(logits / T): chi-square over the ten likeliest and the rest."""
    ids, temperature, count = [3, 1, 4, 1, 5], 1.3, 2000
    probability = torch.softmax(torch.tensor(expected_logits(model, ids)[-1]).double() / temperature, -1).numpy()
    with open_tiny(slots=8) as opened:
        answers = [opened.generate(ids, max_new=1, stop=[], sampling=Sampling(temperature)) for _ in range(count)]
        drawn = np.array([next(answer) for answer in answers])
    top = np.argsort(-probability)[:10]
    observed = np.array([*[(drawn == token).sum() for token in top], (~np.isin(drawn, top)).sum()])
    expected = count * np.array([*probability[top], 1 - probability[top].sum()])
    chi_square = ((observed - expected) ** 2 / expected).sum()
    assert chi_square < 29.6  # 0.1 % quantile of 10 degrees of freedom; the seed is fixed


def test_sampled_requests_repeat_in_a_new_session(open_tiny) -> None:
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

        class Broken:
            def __init__(self, functions):
                self._functions = functions

            def __getattr__(self, name):
                return (lambda *_: -3) if name == "llama_decode" else getattr(self._functions, name)

        healthy = opened._scheduler._engine._c
        opened._scheduler._engine._c = Broken(healthy)
        answers = [opened.generate([1, 2, 3], max_new=5, stop=[]) for _ in range(2)]
        for answer in answers:
            with pytest.raises(Lora2EdgeError) as caught:
                list(answer)
            assert caught.value.code == "llama-decode"
            assert "status -3" in caught.value.what
        with pytest.raises(Lora2EdgeError):
            list(opened.logits([[1, 2]], [[1]]))
        opened._scheduler._engine._c = healthy
        ids = prompts()[0]
        assert list(opened.generate(ids, max_new=8, stop=[])) == expected_tokens(model, ids, 8)


def test_not_a_number_is_never_a_token(open_tiny, monkeypatch) -> None:
    rows = Context._rows

    def poisoned(self, count):
        found = rows(self, count).copy()
        found[:, VOCAB // 2] = np.nan
        return found

    monkeypatch.setattr(Context, "_rows", poisoned)
    with open_tiny() as opened, pytest.raises(Lora2EdgeError) as caught:
        list(opened.generate([1, 2, 3], max_new=5, stop=[]))
    assert caught.value.code == "not-finite"


@pytest.mark.parametrize("ids", [[-1], [VOCAB], [5, 10**6, 5]])
def test_ids_outside_the_vocabulary_are_refused(session, ids: list[int]) -> None:
    with pytest.raises(InputError) as caught:
        session.generate(ids, max_new=1, stop=[])
    assert caught.value.code == "token-id"
    assert str(VOCAB) in caught.value.what
    with pytest.raises(InputError):
        session.logits([ids], [[0]])


def test_too_long_names_both_numbers(session) -> None:
    with pytest.raises(InputError) as caught:
        session.generate([1] * 390, max_new=11, stop=[])
    assert caught.value.code == "too-long"
    assert "390 prompt + 11 new" in caught.value.what and str(MAX_LENGTH) in caught.value.what
    assert len(list(session.generate([1] * 390, max_new=10, stop=[]))) == 10
    with pytest.raises(InputError) as caught:
        session.logits([[1] * (MAX_LENGTH + 1)], [[0]])
    assert str(MAX_LENGTH + 1) in caught.value.what
    (rows,) = session.logits([[1] * MAX_LENGTH], [[MAX_LENGTH - 1]])
    assert rows.shape == (1, VOCAB)


@pytest.mark.parametrize(
    ("batch", "keep", "code"),
    [([[1, 2]], [[2]], "keep-position"), ([[1, 2]], [[-1]], "keep-position"), ([[1, 2]], [], "keep-shape")],
)
def test_bad_positions_are_refused_at_the_call(session, batch, keep, code: str) -> None:
    with pytest.raises(InputError) as caught:
        session.logits(batch, keep)
    assert caught.value.code == code


def test_bad_requests_are_refused_at_the_call(session) -> None:
    with pytest.raises(InputError, match="at least one token"):
        session.generate([], max_new=1, stop=[])
    with pytest.raises(InputError, match="max_new is 0"):
        session.generate([1], max_new=0, stop=[])


def test_close_ends_what_is_under_way(open_tiny) -> None:
    opened = open_tiny()
    running = opened.generate([1, 2, 3], max_new=390, stop=[])
    next(running)
    waiting = opened.generate([1], max_new=5, stop=[])
    opened.close()
    opened.close()
    for answer in (running, waiting):
        with pytest.raises(InputError) as caught:
            list(answer)
        assert caught.value.code == "session-closed"
    for use in (
        lambda: opened.generate([1], max_new=1, stop=[]),
        lambda: opened.tokenize("a", special=False),
        lambda: opened.decode([1]),
        lambda: list(opened.logits([[1]], [[0]])),
    ):
        with pytest.raises(InputError) as caught:
            use()
        assert caught.value.code == "session-closed"
    assert not any(thread.name == "lora2edge-llama" and not thread.daemon for thread in threading.enumerate())


def test_threads_end_with_their_sessions(open_tiny) -> None:
    before = sum(thread.name == "lora2edge-llama" for thread in threading.enumerate())
    for _ in range(3):
        with open_tiny() as opened:
            next(opened.generate([1], max_new=100, stop=[]))
    time.sleep(0.05)
    assert sum(thread.name == "lora2edge-llama" for thread in threading.enumerate()) == before


def test_a_forked_process_is_refused(session, monkeypatch) -> None:
    """The thread that owns the context does not exist there: waiting for it would never end."""
    monkeypatch.setattr(os, "getpid", lambda: 1)
    with pytest.raises(InputError) as caught:
        session.generate([1], max_new=1, stop=[])
    assert caught.value.code == "forked"


def test_an_unclosed_session_does_not_hang_or_crash_the_interpreters_end(qwen2_gguf: Path) -> None:
    import subprocess
    import sys

    code = (
        "import sys; from pathlib import Path; from lora2edge.backends.gguf.session import open_session\n"
        "s = open_session(Path(sys.argv[1]), device='cpu', threads=1, slots=1, max_length=400)\n"
        "print(next(s.generate([1, 2], max_new=390, stop=[])))"
    )
    result = subprocess.run([sys.executable, "-c", code, str(qwen2_gguf)], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip().isdigit()
    assert result.stderr == ""


def test_facts(session4) -> None:
    facts = session4.facts
    assert (facts.backend, facts.device, facts.slots, facts.threads) == ("gguf", "cpu", 4, 1)
    assert facts.max_length == MAX_LENGTH
    assert facts.dtype == "weights all F32, cache F32"
    assert "4 requests" in facts.batching
    assert set(facts.versions) > {"llama.cpp"}


@pytest.mark.parametrize(("threads", "slots", "length"), [(0, 1, 10), (1, 0, 10), (1, 257, 10), (1, 1, 0)])
def test_bad_options_are_refused(qwen2_gguf: Path, threads: int, slots: int, length: int) -> None:
    with pytest.raises(InputError) as caught:
        open_session(qwen2_gguf, device="cpu", threads=threads, slots=slots, max_length=length)
    assert caught.value.code == "session-options"


def test_more_positions_than_the_model_has_are_refused(qwen2_gguf: Path) -> None:
    with pytest.raises(InputError) as caught:
        open_session(qwen2_gguf, device="cpu", threads=1, slots=1, max_length=513)
    assert "513" in caught.value.what and "512" in caught.value.what


def test_a_gpu_that_the_build_cannot_use_is_refused(qwen2_gguf: Path) -> None:
    with pytest.raises(UnsupportedError) as caught:
        open_session(qwen2_gguf, device="cuda", threads=1, slots=1, max_length=10)
    assert caught.value.code == "no-gpu-build"


def test_a_broken_file_gives_llama_cpps_reason(tmp_path: Path, qwen2_gguf: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(qwen2_gguf.read_bytes()[:5000])
    with pytest.raises(InputError) as caught:
        open_session(broken, device="cpu", threads=1, slots=1, max_length=10)
    assert caught.value.code == "gguf-unreadable"
    assert caught.value.why and caught.value.why != "no reason was given"
    with pytest.raises(InputError) as caught:
        open_session(tmp_path / "none.gguf", device="cpu", threads=1, slots=1, max_length=10)
    assert caught.value.code == "gguf-missing"


def test_an_answer_is_an_iterator(session) -> None:
    answer = session.generate([1], max_new=2, stop=[])
    assert isinstance(answer, Answer) and iter(answer) is answer
    assert len([next(answer), next(answer)]) == 2
    with pytest.raises(StopIteration):
        next(answer)
    with pytest.raises(StopIteration):
        next(answer)
