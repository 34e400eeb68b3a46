"""The baseline, recorded once: later runs compare with it without loading a model."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from lora2edge.contracts import Progress, Sample, Session, TokenizerFiles
from lora2edge.quality.divergence import sample_nll
from lora2edge.quality.gain import estimate, gain
from lora2edge.quality.recorded import RECORD, open_recorded
from lora2edge.quality.tasks import accuracy_by_label, answer, matches, short_items
from lora2edge.storage import write_json
from lora2edge.texts import Renderer, read_samples, samples_digest, write_samples

if TYPE_CHECKING:
    from lora2edge.contracts import FloatArray

_SCHEMA = 1
_SAMPLES, _HIDDEN, _HEAD, _BIAS = "samples.jsonl", "hidden.npy", "head.npy", "bias.npy"
_TOKENIZER = "tokenizer"


class OutputHead(Protocol):
    """A model's output layer, which can outlive the model."""

    softcap: float | None

    def __call__(self, hidden: FloatArray) -> FloatArray:
        """`[n, H]` → `[n, V]`, float32."""
        ...

    def matrix(self) -> tuple[FloatArray, FloatArray | None]:
        """`[V, H]` and `[V]` or None, float32."""
        ...


class TorchSession(Session, Protocol):
    """What a PyTorch session can do beyond any session."""

    @property
    def head(self) -> OutputHead: ...
    @property
    def vocabulary(self) -> int: ...
    @property
    def tokenizer(self) -> TokenizerFiles: ...
    def grow_vocabulary(self, rows: int) -> None: ...
    def adapter_off(self) -> AbstractContextManager[None]: ...
    def hidden(
        self,
        batch: Sequence[Sequence[int]],
        keep: Sequence[Sequence[int]],
        advance: Callable[[int], None] | None = None,
    ) -> list[FloatArray]:
        """`[len(keep[i]), H]` float32 per sequence: what the head sees at the kept positions."""
        ...


class Reference:
    """A recorded baseline: samples, last hidden states at the scored positions, output layer, answers."""

    def __init__(self, path: Path, record: dict[str, Any]) -> None:
        self.path = path
        self.samples: list[Sample] = read_samples(path / _SAMPLES)
        self.figures: dict[str, Any] = record["figures"]
        """What `record_reference` returned."""
        self.nll: list[float] = record["nll"]
        """Per sample, summed over response tokens, nats."""
        self.base_nll: list[float] = record["base_nll"]
        self.answered: list[int] = record["answered"]
        """Indices of the samples whose answers are compared."""
        self.accuracy_reason: str = record["figures"]["accuracy_reason"]
        self.end_ids: list[int] = record["end_ids"]
        self._softcap: float | None = record["softcap"]
        self._hidden = np.load(path / _HIDDEN, mmap_mode="r", allow_pickle=False)
        self._head = np.load(path / _HEAD, mmap_mode="r", allow_pickle=False)
        bias = path / _BIAS
        self._bias = np.load(bias, allow_pickle=False) if bias.exists() else None
        self._ends = np.cumsum([len(sample.positions) for sample in self.samples])

    def logits(self, index: int) -> FloatArray:
        """The baseline's logits at the scored positions of sample `index`: `[n, V]` float32."""
        stop = int(self._ends[index])
        states = np.array(self._hidden[stop - len(self.samples[index].positions) : stop])
        logits: FloatArray = states @ self._head.T
        if self._bias is not None:
            logits += self._bias
        if self._softcap is not None:
            logits = np.tanh(logits / np.float32(self._softcap)) * np.float32(self._softcap)
        return logits

    def all_logits(self) -> Iterator[FloatArray]:
        """`logits` of every sample, in order."""
        return (self.logits(index) for index in range(len(self.samples)))

    def renderer(self) -> Renderer:
        """The tokenizer that the samples were made with."""
        return Renderer(TokenizerFiles({file.name: file for file in sorted((self.path / _TOKENIZER).iterdir())}))


def record_reference(
    baseline: TorchSession,
    open_base: Callable[[], TorchSession],
    samples: Sequence[Sample],
    folder: Path,
    *,
    seed: int,
    progress: Progress,
) -> dict[str, Any]:
    """Measures baseline and base on `samples` into the existing `folder`; returns the baseline's figures, JSON-ready.

    Hidden states (float32, 0.3 GB for 20 thousand positions of a 7B model) and the effective output matrix are kept
    instead of logits (12 GB): logits made from them again are the baseline's to rounding. Closes `baseline` before
    it opens the base, so that one model is in memory at a time. Raises GateError where a logit is not finite.
    """
    facts = asdict(baseline.facts)
    write_samples(folder / _SAMPLES, samples)
    _copy_tokenizer(baseline.tokenizer, folder / _TOKENIZER)
    renderer = Renderer(baseline.tokenizer)
    end_ids = sorted({*renderer.end_ids, *(sample.ids[-1] for sample in samples)})
    answered, reason = short_items(samples)
    chosen = [samples[index] for index in answered]

    progress.start("baseline: hidden states", len(samples), "samples")
    _record_states(baseline, samples, folder, progress)
    progress.start("baseline: answers", len(chosen), "answers")
    right = _right(baseline, renderer, chosen, end_ids, progress)
    vocabulary = baseline.vocabulary
    baseline.close()

    base = open_base()
    try:
        base.grow_vocabulary(vocabulary)
        progress.start("base: losses", len(samples), "samples")
        ids, keep = inputs_of(samples)
        base_nll = sample_nll(base.logits(ids, keep), samples, progress.advance)
        progress.start("base: answers", len(chosen), "answers")
        base_right = _right(base, renderer, chosen, end_ids, progress)
    finally:
        base.close()

    record = {
        "schema": _SCHEMA,
        "samples": samples_digest(samples),
        "softcap": baseline.head.softcap,
        "end_ids": end_ids,
        "answered": answered,
        "base_nll": base_nll.tolist(),
        "nll": [0.0] * len(samples),
        "figures": {"accuracy_reason": reason},
    }
    progress.start("baseline: losses", len(samples), "samples")
    nll = sample_nll(Reference(folder, record).all_logits(), samples, progress.advance)
    progress.finish()
    count = np.array([len(sample.positions) for sample in samples], np.int64)
    tokens = float(count.sum())
    figures = {
        "facts": facts,
        "ppl": float(np.exp(nll.sum() / tokens)),
        "nll": float(nll.sum() / tokens),
        **_accuracy(right, chosen, reason, seed),
        "gain": gain(base_nll, nll, count, seed).to_json(),
        "base": {
            "ppl": float(np.exp(base_nll.sum() / tokens)),
            "nll": float(base_nll.sum() / tokens),
            "accuracy": sum(base_right) / len(base_right) if base_right else None,
        },
    }
    write_json(folder / RECORD, {**record, "nll": nll.tolist(), "figures": figures})
    return figures


def open_reference(path: Path) -> Reference:
    """The baseline recorded in folder `path`. Raises DataError where it is incomplete or of another version."""
    return open_recorded(path, _SCHEMA, Reference)


def inputs_of(samples: Sequence[Sample]) -> tuple[list[tuple[int, ...]], list[range]]:
    """Token ids, and the positions that are kept. The last token predicts nothing that is scored."""
    return [sample.ids[:-1] for sample in samples], [sample.positions for sample in samples]


def _record_states(baseline: TorchSession, samples: Sequence[Sample], folder: Path, progress: Progress) -> None:
    ids, keep = inputs_of(samples)
    np.save(folder / _HIDDEN, np.concatenate(baseline.hidden(ids, keep, progress.advance)))
    matrix, bias = baseline.head.matrix()
    np.save(folder / _HEAD, matrix)
    if bias is not None:
        np.save(folder / _BIAS, bias)


def _right(
    session: Session, renderer: Renderer, samples: Sequence[Sample], end_ids: Sequence[int], progress: Progress
) -> list[bool]:
    answers = answer(session, samples, stop=end_ids, advance=progress.advance)
    return matches([renderer.decode(ids) for ids in answers], samples)


def _accuracy(right: Sequence[bool], samples: Sequence[Sample], reason: str, seed: int) -> dict[str, Any]:
    if not right:
        return {"accuracy": None, "accuracy_by": {}, "accuracy_reason": reason}
    hits = np.array(right, np.float64)
    found = estimate(lambda hits, count: hits / count, {"hits": hits, "count": np.ones_like(hits)}, seed)
    return {"accuracy": found.value, "accuracy_by": accuracy_by_label(right, samples), "accuracy_reason": ""}


def _copy_tokenizer(files: TokenizerFiles, folder: Path) -> None:
    folder.mkdir()
    for name, path in files.files.items():
        shutil.copyfile(path, folder / name)
