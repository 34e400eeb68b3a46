"""Classifiers in PyTorch against transformers and PEFT used directly, and the merge proof on them."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel
from transformers import AutoTokenizer

from lora2edge.adapters import Combination, MergedCheckpoint, merge, open_view, read_adapter
from lora2edge.backends.hf import (
    HfBackend,
    HfClassifier,
    open_live_classifier,
    open_merged_classifier,
    write_checkpoint,
)
from lora2edge.checkpoint import open_checkpoint
from lora2edge.contracts import CheckpointRef, Encoded, LabelledSample, SessionOptions
from lora2edge.errors import CheckpointError, DataError, ProofError, UnsupportedError
from lora2edge.progress import SILENT
from lora2edge.quality import CLASSIFIER, MergeProof, verify_merge
from lora2edge.target import load_target
from lora2edge.tasks import tools_for
from tests.classifiers import (
    CLASSES,
    TAGS,
    make_classifier,
    make_classifier_adapter,
    make_labelled_data,
    make_tagged_data,
)
from tests.tiny import make_adapter

OPTIONS = SessionOptions("cpu", 1, 4, 90)
TEXTS = ("A swollen wrist, room 7.", "chills", "red spots and itching skin on the arm since May", "sweating at night")
AUTO = {
    "sequence-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
}
Case = tuple[Path, Path]


def sequence(kind: str, folder: Path, *, head: bool = True, dtype: str = "float32") -> Case:
    base = make_classifier(folder / "base", kind, head=head, dtype=dtype)
    targets = {"distilbert": ("q_lin",), "deberta-v2": ("query_proj",), "llama": ("q_proj", "up_proj")}.get(
        kind, ("query", "value")
    )
    heads = {
        "distilbert": ("pre_classifier", "classifier"),
        "llama": ("score",),
        "bert": ("pooler", "classifier"),
        "deberta-v2": ("pooler", "classifier"),
    }
    save = heads.get(kind, ("classifier",)) if not head else ("score",) if kind == "llama" else ("classifier",)
    return base, make_classifier_adapter(folder / "adapter", base, targets=targets, save=save)


def tokens(kind: str, folder: Path, *, head: bool = True, dtype: str = "float32") -> Case:
    base = make_classifier(folder / "base", kind, "TokenClassification", labels=TAGS, head=head, dtype=dtype)
    return base, make_classifier_adapter(folder / "adapter", base, "TOKEN_CLS", labels=TAGS)


CASES: dict[str, Callable[[Path], Case]] = {
    "bert": partial(sequence, "bert"),
    "roberta": partial(sequence, "roberta"),
    "distilbert": partial(sequence, "distilbert"),
    "deberta-v2 with a new head": partial(sequence, "deberta-v2", head=False),
    "bert with a new head": partial(sequence, "bert", head=False),
    "llama with a new head": partial(sequence, "llama", head=False),
    "bert tokens": partial(tokens, "bert"),
    "roberta tokens with a new head": partial(tokens, "roberta", head=False),
}


def view_of(case: Case) -> MergedCheckpoint:
    return merge(open_checkpoint(case[0]), [read_adapter(case[1])])


def by_peft(case: Case, view: MergedCheckpoint, texts: list[Encoded], pad: int) -> list[Any]:
    """Each text alone, by the libraries: no padding."""
    loaded = getattr(transformers, AUTO[view.task]).from_pretrained(case[0], num_labels=3, dtype=torch.float32)
    loaded.config.pad_token_id = pad
    live = PeftModel.from_pretrained(loaded, str(case[1])).eval()
    answers = []
    for text in texts:
        inputs = {"input_ids": torch.tensor([text.ids])}
        if text.types:
            inputs["token_type_ids"] = torch.tensor([text.types])
        with torch.inference_mode():
            answers.append(live(**inputs).logits[0].numpy())
    return answers


def largest_error(ours: list[Any], theirs: list[Any]) -> float:
    assert [each.shape for each in ours] == [each.shape for each in theirs]
    scale = max(np.abs(each).max() for each in theirs)
    return float(max(np.abs(a - b).max() for a, b in zip(ours, theirs, strict=True)) / scale)


@pytest.mark.parametrize("name", CASES)
def test_a_live_classifier_is_pefts(name: str, tmp_path: Path) -> None:
    """Live, merged and written: one batch padded on the right gives what each text gives alone."""
    case = CASES[name](tmp_path)
    view = view_of(case)
    live = open_live_classifier(view.ref, OPTIONS, dtype="float32")
    texts = [live.encode(text) for text in TEXTS]
    if name == "bert":
        texts.append(live.encode("itching skin", "on the arm"))
        assert texts[-1].types
    tokenizer = AutoTokenizer.from_pretrained(case[0])
    assert [list(text.ids) for text in texts[:4]] == [tokenizer(text)["input_ids"] for text in TEXTS]
    expected = by_peft(case, view, texts, tokenizer.pad_token_id)
    assert len({tuple(np.round(each.ravel()[:3], 3)) for each in expected}) == len(texts), "all texts answer the same"
    assert largest_error(live.classify(texts), expected) < 1e-5
    assert live.has_base_head == ("new head" not in name) and len(live.labels) == 3
    merged = open_merged_classifier(view, OPTIONS, dtype="float32", rounded=False)
    assert largest_error(merged.classify(texts), expected) < 1e-5
    (tmp_path / "written").mkdir()
    write_checkpoint(view, tmp_path / "written", SILENT)
    written = HfBackend().open(tmp_path / "written", load_target("hf/merged"), OPTIONS)
    assert isinstance(written, HfClassifier)
    assert largest_error(written.classify(texts), expected) < 1e-5
    assert list(written.labels) == list(live.labels)
    if "llama" in name:  # what training set, and no folder had
        assert json.loads((tmp_path / "written" / "config.json").read_text())["pad_token_id"] == tokenizer.pad_token_id
    with live.adapter_off():
        assert largest_error(live.classify(texts), expected) > 1e-2
    with pytest.raises(DataError) as caught:
        live.classify([Encoded(tuple(range(5, 96)))])
    assert caught.value.code == "too-long"


def samples_of(view: MergedCheckpoint, folder: Path) -> list[LabelledSample]:
    make = make_tagged_data if view.task == "token-classification" else make_labelled_data
    names = TAGS if view.task == "token-classification" else CLASSES
    data = make(folder / "data.jsonl")
    if list(view.config["id2label"].values()) != list(names):  # a new head has no names: lines go by index
        lines = [json.loads(line) for line in data.read_text().splitlines()]
        for line in lines:
            for key in ("label", "labels"):
                value = line.get(key)
                found = value if isinstance(value, list) else [value]
                index = [names.index(label) if isinstance(label, str) else label for label in found]
                if key in line:
                    line[key] = index if isinstance(value, list) else index[0]
        data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    tools = tools_for(view.task)
    return tools.load_texts(str(data), view, max_length=90, calibration_tokens=900, test_tokens=None).calibration


def prove(
    view: MergedCheckpoint, samples: list[LabelledSample], dtype: str = "float32", wrong: Any = None
) -> MergeProof:
    return verify_merge(
        lambda kind: open_live_classifier(view.ref, OPTIONS, dtype=kind),
        lambda kind, rounded: open_merged_classifier(wrong or view, OPTIONS, dtype=kind, rounded=rounded),
        samples,
        dtype=dtype,
        progress=SILENT,
        runner=CLASSIFIER,
    )


@pytest.mark.parametrize(
    ("make", "dtype"),
    [
        (CASES["bert"], "float32"),
        (partial(sequence, "llama", head=False, dtype="bfloat16"), "bfloat16"),
        (partial(tokens, "bert", dtype="bfloat16"), "bfloat16"),
    ],
)
def test_the_merge_of_a_classifier_is_proved(make: Any, dtype: str, tmp_path: Path) -> None:
    case = make(tmp_path)
    view = view_of(case)
    samples = samples_of(view, tmp_path)
    proof = prove(view, samples, dtype)
    assert proof.adapter_kl > 1e-3 and proof.math_kl < 1e-11 and proof.logit_error is not None
    assert proof.logit_error < 1e-5 and proof.positions == sum(len(sample.positions) for sample in samples)
    assert (proof.floor_kl > 1e-9) == (dtype == "bfloat16")
    assert prove(view, samples, dtype) == proof, "a random head got into the figures"


class Scaled:
    """A merged view with one delta 1 % too large."""

    def __init__(self, view: MergedCheckpoint, factor: float) -> None:
        self._view, self._factor = view, factor

    def __getattr__(self, name: str) -> Any:
        return getattr(self._view, name)

    def rows(self, name: str, start: int, stop: int) -> Any:
        rows, delta = self._view.rows(name, start, stop), self._view.delta(name, start, stop)
        return rows if delta is None or "layer.0" not in name else rows + np.float32(self._factor - 1) * delta


@pytest.mark.parametrize("factor", [0.0, 1.01])
def test_a_wrong_merge_of_a_classifier_is_no_merge(factor: float, tmp_path: Path) -> None:
    view = view_of(CASES["bert"](tmp_path))
    samples = samples_of(view, tmp_path)
    with pytest.raises(ProofError) as caught:
        prove(view, samples, wrong=Scaled(view, factor))
    assert caught.value.exit_code == 3 and "logit_error" in caught.value.why


def test_classes_far_apart_hide_nothing(tmp_path: Path) -> None:
    """Where one class has all of the probability, KL does not see a wrong logit, and the bound on logits does."""
    base, adapter = CASES["bert"](tmp_path)
    from safetensors.torch import load_file, save_file

    tensors = load_file(adapter / "adapter_model.safetensors")
    name = next(name for name in tensors if name.endswith("classifier.bias"))
    tensors[name] = torch.tensor([60.0, 0.0, 0.0])
    save_file(tensors, adapter / "adapter_model.safetensors", {"format": "pt"})
    view = view_of((base, adapter))
    with pytest.raises(ProofError) as caught:
        prove(view, samples_of(view, tmp_path), wrong=Scaled(view, 1.2))
    assert "logit_error" in caught.value.why and "math_kl" not in caught.value.why


def test_a_classifier_trained_on_a_quantized_base(tmp_path: Path) -> None:
    """The live model of a QLoRA classifier with a new head: the dequantized layers, and the adapter's head."""
    base, adapter = CASES["llama with a new head"](tmp_path)
    settings = {
        "quant_type": "nf4",
        "double_quant": False,
        "dtype": "F32",
        "blocksize": 64,
        "kernel": "cpu",
        "names": None,
    }
    ref = CheckpointRef(str(base), CheckpointRef.of(base, adapter).adapters, requantized=settings)
    with_base = open_live_classifier(ref, OPTIONS, dtype="float32")
    merged = open_merged_classifier(open_view(ref), OPTIONS, dtype="float32", rounded=False)
    plain = open_live_classifier(CheckpointRef.of(base, adapter), OPTIONS, dtype="float32")
    texts = [plain.encode(text) for text in TEXTS]
    expected = with_base.classify(texts)
    assert largest_error(merged.classify(texts), expected) < 1e-5
    assert largest_error(plain.classify(texts), expected) > 1e-3


def test_adapters_of_several_tasks_are_refused(tmp_path: Path) -> None:
    base, adapter = CASES["llama with a new head"](tmp_path)
    first = make_adapter(tmp_path / "first", base, targets=["q_proj"])
    adapters = [read_adapter(first), read_adapter(adapter)]
    view = merge(open_checkpoint(base), adapters, Combination.from_json({"method": "sequence", "seed": 0}))
    with pytest.raises(UnsupportedError) as caught:
        tools_for(view.task).check(view)
    assert caught.value.code == "combine-tasks" and "first" in caught.value.what


def test_a_head_of_other_classes_is_refused(tmp_path: Path) -> None:
    base = make_classifier(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config["id2label"] = {"0": "a", "1": "b"}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError) as caught:
        tools_for("sequence-classification").check(open_checkpoint(base))
    assert caught.value.code == "class-count" and "3 rows" in caught.value.what and "2 classes" in caught.value.what


def test_a_decoder_without_padding_token_is_refused(tmp_path: Path) -> None:
    base, adapter = CASES["llama with a new head"](tmp_path)
    config = json.loads((base / "tokenizer_config.json").read_text())
    del config["pad_token"]
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError) as caught:
        tools_for("sequence-classification").check(view_of((base, adapter)))
    assert caught.value.code == "no-pad-token"
