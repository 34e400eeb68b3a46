"""The logits check: whether a graph that another tool wrote is the merged model.

Known to be wrong without a word otherwise: Mistral's sliding window, OLMo, Phi-2 and Nemotron by onnxruntime-genai's
builder 0.18; rotary settings of newer config files by optimum-onnx 0.1.
"""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lora2edge.backends.onnxruntime.classifier import open_classifier
from lora2edge.backends.onnxruntime.decoder import Cache, Call, Decoder, lengths_mask
from lora2edge.backends.onnxruntime.session import open_session
from lora2edge.calibration.model import build_model, quiet, torch_errors
from lora2edge.contracts import Checkpoint, Encoded
from lora2edge.errors import GateError

if TYPE_CHECKING:
    from lora2edge.contracts import FloatArray

BOUND = 1e-4
"""Of the largest logit. Float32 sums in another order differ by 1e-6; Phi-2's wrong activation by 2e-4."""
_DECODED = 6
"""Tokens that are read one by one, on a cache."""
_CHUNK = 256
_KEPT = 24
"""Positions at the end of a prompt whose logits are compared."""


@dataclass(frozen=True, slots=True)
class _Compared:
    """One comparison."""

    what: str
    error: float
    """Of the largest logit."""


def reference_logits(checkpoint: Checkpoint, examples: Sequence[Encoded]) -> list[FloatArray]:
    """The merged model's in PyTorch, float32, its weights rounded as the merged checkpoint has them.

    `[kept, V]` of each prompt's last positions; `[labels]` or `[tokens, labels]` where it classifies.
    """
    import torch

    model = build_model(checkpoint, dtype="float32", device="cpu", rounded=True)
    taken = inspect.signature(model.forward).parameters
    found = []
    with torch_errors("run the merged model"), quiet(), torch.inference_mode():
        for example in examples:
            ids = torch.tensor([example.ids])
            more: dict[str, Any] = {"attention_mask": torch.ones_like(ids)}
            if example.types and "token_type_ids" in taken:
                more["token_type_ids"] = torch.tensor([example.types])
            if checkpoint.task == "causal-lm" and "logits_to_keep" in taken:
                more["logits_to_keep"] = min(_KEPT, len(example.ids))
            logits: FloatArray = model(input_ids=ids, **more).logits[0].numpy()
            found.append((logits[-_KEPT:] if checkpoint.task == "causal-lm" else logits).copy())
    return found


def check_export(
    folder: Path, checkpoint: Checkpoint, examples: Sequence[Encoded], reference: Sequence[FloatArray]
) -> None:
    """Compares the graph in `folder`, opened as an artifact is, with `reference`.

    Decoders: whole prompts of several lengths in one padded batch, the longest beyond every window, then two of them
    read in chunks and token by token on one cache. Raises GateError `export-wrong` where a logit is further off than
    BOUND times the largest, and what opening raises.
    """
    largest = max(float(np.abs(logits).max()) for logits in reference)
    compare = _decoder if checkpoint.task == "causal-lm" else _classifier
    done = [
        _Compared(what, float(np.abs(found - expected).max()) / largest if found.shape == expected.shape else math.inf)
        for what, found, expected in compare(folder, examples, reference)
    ]
    wrong = [item for item in done if not item.error <= BOUND]
    if wrong:
        worst = max(wrong, key=lambda item: item.error if item.error == item.error else math.inf)
        told = ", ".join(f"{item.what}: {item.error:.1g}" for item in done)
        raise GateError(
            "export-wrong",
            f"at {worst.what}, float32 logits are off by {worst.error:.2g} of the largest, {BOUND:g} is allowed",
            why=f"compared with the merged model in PyTorch: {told}",
        )


def check_finite(folder: Path, checkpoint: Checkpoint, examples: Sequence[Encoded]) -> None:
    """Runs the quantized graph in `folder`. Raises GateError `export-wrong` where a logit is not finite."""
    compare = _decoder if checkpoint.task == "causal-lm" else _classifier
    for what, found, _ in compare(folder, examples, [np.zeros((1, 1), np.float32)] * len(examples)):
        if not np.isfinite(found).all():
            raise GateError("export-wrong", f"the exported graph gives a logit that is not finite ({what})")


def _decoder(
    folder: Path, examples: Sequence[Encoded], reference: Sequence[FloatArray]
) -> Iterator[tuple[str, FloatArray, FloatArray]]:
    threads = os.cpu_count() or 1
    rows = [example.ids for example in examples]
    longest = max(len(ids) for ids in rows)
    session = open_session(folder, device="cpu", threads=threads, slots=1, max_length=longest)
    with session:
        keep = [range(max(0, len(ids) - _KEPT), len(ids)) for ids in rows]
        for ids, found, expected in zip(rows, session.logits(rows, keep), reference, strict=True):
            yield f"a prompt of {len(ids)} tokens", found, expected
        decoder = Decoder(session.opened)
        pair = range(len(rows))[-2:]
        for index, found in zip(pair, _decoded(decoder, [rows[index] for index in pair]), strict=True):
            what = f"the last {len(found)} tokens of {len(rows[index])}, read one by one"
            yield what, found, reference[index][-len(found) :]


def _decoded(decoder: Decoder, rows: Sequence[Sequence[int]]) -> Iterator[FloatArray]:
    """Logits of the last tokens of each row, all but these read in chunks, these one by one and beside each other."""
    cache = Cache(decoder, len(rows), max(len(ids) for ids in rows))
    steps = min(_DECODED, *(len(ids) - 1 for ids in rows))
    starts = [len(ids) - steps for ids in rows]
    for row, ids in enumerate(rows):
        prefill = Call(decoder, cache, row, 1)
        for start in range(0, starts[row], _CHUNK):
            stop = min(start + _CHUNK, starts[row])
            prefill.run(np.asarray([ids[start:stop]], np.int64), np.ones((1, stop), np.int64))
    step = Call(decoder, cache, 0, len(rows))
    found = []
    for index in range(steps):
        tokens = np.asarray([[ids[start + index]] for ids, start in zip(rows, starts, strict=True)], np.int64)
        lengths = np.asarray([start + index + 1 for start in starts], np.int64)
        found.append(step.run(tokens, lengths_mask(lengths)).copy())
    for row in range(len(rows)):
        yield np.stack([logits[row] for logits in found])


def _classifier(
    folder: Path, examples: Sequence[Encoded], reference: Sequence[FloatArray]
) -> Iterator[tuple[str, FloatArray, FloatArray]]:
    longest = max(len(example.ids) for example in examples)
    with open_classifier(folder, device="cpu", threads=os.cpu_count() or 1, max_length=longest) as session:
        together = session.classify(examples)
        alone = session.classify(examples[:1])
    for example, found, expected in zip(examples, together, reference, strict=True):
        yield f"a text of {len(example.ids)} tokens among {len(examples)}", found, expected
    yield f"a text of {len(examples[0].ids)} tokens alone", alone[0], reference[0]
