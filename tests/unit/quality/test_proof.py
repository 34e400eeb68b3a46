"""The merge proof on tiny models: true merges pass, wrong ones do not. And the recorded baseline."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lora2edge.adapters import merge, read_adapter
from lora2edge.backends.hf import HfSession, open_baseline, open_merged
from lora2edge.checkpoint import open_checkpoint
from lora2edge.contracts import CheckpointRef, SessionOptions
from lora2edge.errors import DataError, ProofError
from lora2edge.progress import SILENT
from lora2edge.quality import (
    MergeProof,
    judge,
    measure_quality,
    open_reference,
    record_reference,
    verify_merge,
)
from lora2edge.report.schema import Baseline, Quality
from lora2edge.target import Gate, Target
from lora2edge.texts import Renderer, Texts, load_texts, read_items
from tests.tiny import make_adapter, make_checkpoint, make_data

RUN = SessionOptions("cpu", threads=1, slots=4, max_length=400)
DOWN = "model.layers.1.mlp.down_proj.weight"


class Case:
    """A base, an adapter, their merged view, and texts."""

    def __init__(self, folder: Path, arch: str = "qwen2", dtype: str = "bfloat16", **adapter: Any) -> None:
        self.base = make_checkpoint(folder / "base", arch, dtype=dtype)
        self.adapter = make_adapter(folder / "adapter", self.base, **adapter)
        self.view = merge(open_checkpoint(str(self.base)), (read_adapter(str(self.adapter)),))
        data = make_data(folder / "data.jsonl", 60)
        self.texts: Texts = load_texts(
            str(data), Renderer(self.view.tokenizer), max_length=400, calibration_tokens=1000, test_tokens=400
        )

    def live(self, dtype: str) -> HfSession:
        return open_baseline(CheckpointRef.of(self.base, self.adapter), RUN, dtype=dtype)

    def live_agreement(self, dtype: str) -> float:
        """Share of positions where PEFT's live model has the same first answer in float32 and in `dtype`."""
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        answers = []
        for number in (torch.float32, getattr(torch, dtype)):
            model = AutoModelForCausalLM.from_pretrained(self.base, dtype=number)
            live = PeftModel.from_pretrained(model, str(self.adapter), autocast_adapter_dtype=False).eval()
            with torch.inference_mode():
                answers.append(
                    torch.cat(
                        [
                            live(torch.tensor([sample.ids])).logits[0, list(sample.positions)].argmax(-1)
                            for sample in self.texts.calibration
                        ]
                    )
                )
        return float((answers[0] == answers[1]).double().mean())

    def prove(self, view: Any = None, dtype: str = "bfloat16") -> MergeProof:
        def merged(dtype: str, rounded: bool) -> HfSession:
            return open_merged(view or self.view, RUN, dtype=dtype, rounded=rounded)

        return verify_merge(self.live, merged, self.texts.calibration, dtype=dtype, progress=SILENT)


class Wrong:
    """The view with another rule for some rows: `change(name, base rows, delta rows)`."""

    def __init__(self, view: Any, change: Callable[[str, Any, Any], Any]) -> None:
        self._view, self._change = view, change

    def __getattr__(self, name: str) -> Any:
        return getattr(self._view, name)

    def rows(self, name: str, start: int, stop: int) -> Any:
        delta = self._view.delta(name, start, stop)
        exact = self._view.rows(name, start, stop)
        return exact if delta is None else self._change(name, exact - delta, delta)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("proof"), strength=0.05)


@pytest.mark.parametrize(
    ("arch", "dtype", "settings"),
    [
        ("qwen2", "bfloat16", {}),
        ("llama", "float16", {"use_rslora": True}),
        ("gemma2", "bfloat16", {}),
        ("qwen3", "float32", {}),
    ],
)
def test_true_merges_pass(tmp_path: Path, arch: str, dtype: str, settings: Any) -> None:
    case = Case(tmp_path, arch, dtype, **settings)
    proof = case.prove(dtype=dtype)
    assert 0 < proof.math_kl < 1e-10
    assert proof.adapter_kl > 0.01
    assert proof.positions > 300
    # How often 16 bits alone change the first answer of these random weights depends on the processor's kernels:
    # live in float32 against live in 16 bits is the measure. 0.05 is three standard errors over 300 positions.
    assert proof.top1_agreement > case.live_agreement(dtype) - 0.05
    assert proof.top1_agreement_float32 > 0.95
    if dtype == "float32":
        assert proof.floor_kl == 0 and proof.kl_mean == proof.rounding_kl < 1e-9
    else:
        assert 1e-9 < proof.rounding_kl < proof.floor_kl
        assert proof.kl_mean < 3 * proof.floor_kl


def test_a_base_that_is_stored_in_4_bits(tmp_path: Path) -> None:
    """Live and merged both compute with the dequantized weights: transformers packs them, bitsandbytes quantizes."""
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    case = Case(tmp_path)
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    packed = AutoModelForCausalLM.from_pretrained(case.base, quantization_config=settings, dtype=torch.bfloat16)
    weights = case.base / "model.safetensors"
    plain = weights.read_bytes()
    packed.save_pretrained(case.base)
    assert len(weights.read_bytes()) < 0.8 * len(plain)
    case.view = merge(open_checkpoint(str(case.base)), (read_adapter(str(case.adapter)),))
    proof = case.prove()
    assert 0 < proof.math_kl < 1e-10 and proof.adapter_kl > 0.01
    # The reference is bitsandbytes' own dequantization, with PEFT's adapter on it.
    from peft import PeftModel

    live = PeftModel.from_pretrained(packed.dequantize(torch.float32).float(), str(case.adapter)).eval()
    sample = case.texts.calibration[0]
    with torch.inference_mode():
        expected = live(torch.tensor([sample.ids])).logits[0, list(sample.positions)].numpy()
    session = case.live("float32")
    found = next(session.logits([sample.ids], [sample.positions]))
    assert np.abs(found - expected).max() < 1e-3


def test_the_figures_are_those_of_the_models(case: Case) -> None:
    """math_kl, adapter_kl and rounding_kl again, from PEFT and PyTorch alone."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    def load() -> Any:
        model = AutoModelForCausalLM.from_pretrained(case.base, dtype=torch.float32)
        return PeftModel.from_pretrained(model, str(case.adapter)).eval()

    def kl(p: Any, q: Any) -> float:
        return float(torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1).mean())

    def scores(model: Any) -> Any:
        with torch.inference_mode():
            rows = [
                model(torch.tensor([sample.ids])).logits[0, list(sample.positions)].double().log_softmax(-1)
                for sample in case.texts.calibration
            ]
        return torch.cat(rows)

    live = load()
    tuned = scores(live)
    with live.disable_adapter():
        base = scores(live)
    rounded = load().merge_and_unload()
    with torch.no_grad():
        for parameter in rounded.parameters():
            parameter.copy_(parameter.bfloat16())
    proof = case.prove()
    assert proof.positions == len(tuned)
    assert proof.adapter_kl == pytest.approx(kl(tuned, base), rel=1e-4)
    assert proof.rounding_kl == pytest.approx(kl(tuned, scores(rounded)), rel=1e-2)


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("a delta scaled by 1.01", lambda name, base, delta: base + np.float32(1.01) * delta),
        ("one tensor left out", lambda name, base, delta: base if name == DOWN else base + delta),
        ("the sign of one tensor", lambda name, base, delta: base - delta if name == DOWN else base + delta),
        ("rounded before it was added", lambda name, base, delta: base + delta.astype(np.float16)),
        ("no adapter at all", lambda name, base, delta: base),
        ("a NaN", lambda name, base, delta: np.where(delta > 1e9, 0, np.float32(np.nan)) if name == DOWN else base),
    ],
)
def test_wrong_merges_do_not_pass(case: Case, what: str, change: Any) -> None:
    with pytest.raises(ProofError) as caught:
        case.prove(Wrong(case.view, change))
    assert caught.value.code == ("merge-not-finite" if what == "a NaN" else "merge-proof")
    assert caught.value.exit_code == 3


def test_bad_rounding_does_not_pass(case: Case) -> None:
    """Weights that are right before they are written, and truncated to 4 bits of mantissa when they are."""

    def merged(dtype: str, rounded: bool) -> HfSession:
        def truncate(name: str, base: Any, delta: Any) -> Any:
            rows = np.ascontiguousarray(base + delta, np.float32)
            return (rows.view(np.uint32) & np.uint32(0xFFF80000)).view(np.float32)

        view: Any = Wrong(case.view, truncate) if rounded else case.view
        return open_merged(view, RUN, dtype=dtype, rounded=rounded)

    with pytest.raises(ProofError, match="rounding_kl"):
        verify_merge(case.live, merged, case.texts.calibration, dtype="bfloat16", progress=SILENT)


# ---------------------------------------------------------------- the recorded baseline


@pytest.fixture(scope="module")
def recorded(case: Case, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("reference")
    figures = record_reference(
        case.live("float32"),
        lambda: open_baseline(CheckpointRef.of(case.base), RUN, dtype="float32"),
        case.texts.test,
        folder,
        seed=0,
        progress=SILENT,
    )
    return folder, figures


def test_the_record_gives_the_baselines_logits(case: Case, recorded: tuple[Path, dict[str, Any]]) -> None:
    reference = open_reference(recorded[0])
    assert reference.samples == case.texts.test
    session = case.live("float32")
    expected = session.logits([s.ids for s in case.texts.test], [s.positions for s in case.texts.test])
    for index, logits in enumerate(expected):
        np.testing.assert_allclose(reference.logits(index), logits, atol=3e-5)
    session.close()


def test_figures_of_the_baseline(case: Case, recorded: tuple[Path, dict[str, Any]]) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(case.base, dtype=torch.float32).eval()
    total = tokens = 0.0
    for sample in case.texts.test:
        labels = torch.tensor([sample.ids])
        labels[0, : sample.prompt_length] = -100
        with torch.inference_mode():
            loss = model(torch.tensor([sample.ids]), labels=labels).loss
        total += float(loss) * len(sample.positions)
        tokens += len(sample.positions)
    figures = recorded[1]
    assert figures["base"]["nll"] == pytest.approx(total / tokens, rel=1e-5)
    assert figures["base"]["ppl"] == pytest.approx(math.exp(total / tokens), rel=1e-5)
    assert figures["gain"]["value"] == pytest.approx(figures["base"]["nll"] - figures["nll"], rel=1e-9)
    assert figures["accuracy"] == 0 and figures["accuracy_by"]["lang"] == {"en": 0, "zh": 0}
    Baseline.model_validate(json.loads(json.dumps(figures)))


def test_quality_of_the_baseline_itself_and_of_another_model(case: Case, recorded: tuple[Path, dict[str, Any]]) -> None:
    reference = open_reference(recorded[0])
    session = case.live("float32")
    same = measure_quality(session, reference, seed=0, progress=SILENT)
    session.close()
    assert same["kl_mean"] < 1e-10 and same["flips"] == 0
    assert same["ppl"] == pytest.approx(recorded[1]["ppl"], rel=1e-6)
    assert same["intervals"]["ppl_ratio"]["value"] == pytest.approx(1, abs=1e-6)

    base = open_baseline(CheckpointRef.of(case.base), RUN, dtype="float32")
    lost = measure_quality(base, reference, seed=0, progress=SILENT)
    base.close()
    assert lost["nll"] == pytest.approx(recorded[1]["base"]["nll"], rel=1e-9)
    assert lost["kl_mean"] > 0.01 and lost["kl_p99"] > lost["kl_mean"]
    if lost["gain_kept"] is not None:
        assert lost["gain_kept"]["value"] == pytest.approx(0, abs=1e-9)
    target = Target(name="t", backend="hf", precision="stored", gates={"kl_mean": Gate(max=0.005)})
    assert [judge(target, figures)[1] for figures in (same, lost)] == ["pass", "fail"]
    assert lost["items"] == len(case.texts.test)
    Quality.model_validate(json.loads(json.dumps(lost)))


class Scripted:
    """A session that answers from a table, and with nonsense where the table is silent."""

    def __init__(self, session: HfSession, table: dict[tuple[int, ...], list[int]]) -> None:
        self._session, self._table = session, table

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def generate(self, ids: Any, *, max_new: int, stop: Any) -> Any:
        assert list(stop) == [759]  # <|im_end|>
        return iter(self._table.get(tuple(ids), [5, 6, 7])[:max_new])


def test_accuracy_where_answers_are_short(case: Case, tmp_path: Path) -> None:
    def scripted(right: Callable[[Any], bool]) -> Any:
        known = [sample for sample in case.texts.test if right(sample.item.labels)]
        table = {s.ids[: s.prompt_length]: list(s.ids[s.prompt_length : -1]) for s in known}
        return Scripted(case.live("float32"), table)

    english = scripted(lambda labels: labels["lang"] == "en")
    nothing = scripted(lambda labels: False)
    figures = record_reference(english, lambda: nothing, case.texts.test, tmp_path, seed=0, progress=SILENT)
    short = [sample for sample in case.texts.test if len(sample.positions) <= 32]
    share = sum(sample.item.labels["lang"] == "en" for sample in short) / len(short)
    assert 0 < share < 1
    assert figures["accuracy"] == pytest.approx(share)
    assert figures["accuracy_by"]["lang"] == {"en": 1, "zh": 0}
    assert figures["base"]["accuracy"] == 0
    chinese = scripted(lambda labels: labels["lang"] == "zh")
    found = measure_quality(chinese, open_reference(tmp_path), seed=0, progress=SILENT)
    chinese.close()
    assert found["accuracy"] == pytest.approx(1 - share)
    assert found["accuracy_by"]["lang"] == {"en": 0, "zh": 1}
    assert found["intervals"]["accuracy"]["low"] < 1 - share < found["intervals"]["accuracy"]["high"]


def test_long_answers_have_no_accuracy(case: Case, tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": f"q {n}", "response": "word " * 40}) for n in range(3)))
    samples = [Renderer(case.view.tokenizer).sample(item) for item in read_items(path)]
    figures = record_reference(
        case.live("float32"), lambda: case.live("float32"), samples, tmp_path, seed=0, progress=SILENT
    )
    assert figures["accuracy"] is None and "median" in figures["accuracy_reason"]
    session = case.live("float32")
    found = measure_quality(session, open_reference(tmp_path), seed=0, progress=SILENT)
    session.close()
    assert found["accuracy"] is None and found["accuracy_reason"] == figures["accuracy_reason"]
    # The "base" here is the baseline itself: there is no gain to keep.
    assert found["gain_kept"] is None and "reaches 0" in found["gain_kept_reason"]


def test_an_incomplete_record_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no recorded baseline"):
        open_reference(tmp_path)
