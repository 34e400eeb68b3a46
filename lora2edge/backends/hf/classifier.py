"""Classifiers in PyTorch: the baseline (base + live adapter through PEFT), a merged view, a written checkpoint."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lora2edge.adapters import open_base, open_view
from lora2edge.backends.hf.load import find_reference, is_quantized, load_live_classifier
from lora2edge.calibration.model import build_model
from lora2edge.contracts import Checkpoint, CheckpointRef, Encoded, SessionFacts, SessionOptions
from lora2edge.errors import DataError, UnsupportedError
from lora2edge.texts import TextEncoder, check_classes, padding_id, segment_count

if TYPE_CHECKING:
    from lora2edge.contracts import FloatArray


def open_live_classifier(ref: CheckpointRef, options: SessionOptions, *, dtype: str) -> HfClassifier:
    """The base folder as a classifier, with the adapters live on it, read by transformers and PEFT themselves.

    Without adapters it is a checkpoint folder that is a classifier itself. `dtype`: "float32", "bfloat16" or "float16".
    Raises CheckpointError or AdapterError where the libraries cannot read the folders.
    """
    view = open_view(ref)
    try:
        model = load_live_classifier(ref, view, dtype=dtype, device=options.device)
        base = open_base(ref)
        own_head = base.task == view.task
        base.close()
        session = HfClassifier(model, view, options, dtype=dtype, reference=find_reference(ref), has_base_head=own_head)
    finally:
        view.close()
    if is_quantized(ref):
        session.facts = replace(session.facts, build=f"{session.facts.build}; quantized base, dequantized when loaded")
    return session


def open_merged_classifier(view: Checkpoint, options: SessionOptions, *, dtype: str, rounded: bool) -> HfClassifier:
    """A view (merged or plain) in PyTorch; `rounded`: with weights as they would be written. Writes nothing."""
    model = build_model(view, dtype=dtype, device=options.device, rounded=rounded)
    return HfClassifier(model, view, options, dtype=dtype)


class HfClassifier:
    """Implements contracts.Classifier."""

    def __init__(
        self,
        model: Any,
        view: Checkpoint,
        options: SessionOptions,
        *,
        dtype: str,
        reference: str = "",
        has_base_head: bool = True,
    ) -> None:
        """`model`: a transformers classifier in evaluation mode, or a PeftModel of one. `view`: its headers."""
        import torch
        import transformers

        torch.set_num_threads(options.threads)
        self.labels: Sequence[str] = check_classes(view)
        self.has_base_head = has_base_head
        """Whether the base has a classification head without the adapter."""
        self._model = model
        self._classifier: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._device = options.device
        self._encoder_parts = (view.tokenizer, segment_count(view))
        self._encoder: TextEncoder | None = None
        self._padding = padding_id(view) or 0
        # A decoder's class is read from the last token that is not this one.
        self._classifier.config.get_text_config().pad_token_id = self._padding
        accepted = inspect.signature(self._classifier.forward).parameters
        self._takes_types = "token_type_ids" in accepted
        self._without_cache = {"use_cache": False} if "use_cache" in accepted else {}
        build = f"torch {torch.__version__} ({torch.backends.cpu.get_cpu_capability()})"
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        if model is not self._classifier:
            import peft

            versions["peft"] = peft.__version__
        self.facts = SessionFacts(
            backend="hf",
            device=torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
            dtype=dtype,
            slots=options.slots,
            threads=torch.get_num_threads(),
            max_length=options.max_length,
            batching="one batch at a time, padded on the right to its longest text",
            build=build,
            versions=versions,
            reference=reference,
        )

    def encode(self, text: str, pair: str | None = None) -> Encoded:
        if self._encoder is None:
            self._encoder = TextEncoder(*self._encoder_parts)
        return self._encoder.encode(text, pair)

    def classify(self, batch: Sequence[Encoded]) -> list[FloatArray]:
        """As contracts.Classifier has it. Raises DataError for a text that is longer than the session holds."""
        import torch

        longest = max(len(text.ids) for text in batch)
        if longest > self.facts.max_length:
            raise DataError(
                "too-long",
                f"a text has {longest} tokens, this session takes {self.facts.max_length}",
                hint="open the session with a larger max_length, or shorten the text",
            )
        ids = torch.full((len(batch), longest), self._padding, dtype=torch.long)
        mask = torch.zeros(len(batch), longest, dtype=torch.long)
        types = torch.zeros(len(batch), longest, dtype=torch.long)
        for row, text in enumerate(batch):
            ids[row, : len(text.ids)] = torch.tensor(text.ids)
            mask[row, : len(text.ids)] = 1
            if text.types:
                types[row, : len(text.types)] = torch.tensor(text.types)
        inputs = {"input_ids": ids.to(self._device), "attention_mask": mask.to(self._device), **self._without_cache}
        if self._takes_types:
            inputs["token_type_ids"] = types.to(self._device)
        with torch.inference_mode():
            logits = self._model(**inputs).logits.float().cpu().numpy()
        if logits.shape[-1] != len(self.labels):
            raise UnsupportedError(
                "class-count",
                f"the model gives {logits.shape[-1]} logits for {len(self.labels)} classes",
                why="id2label in config.json is of another head",
                hint="mend id2label in the base's config.json",
            )
        if logits.ndim == 2:
            return list(logits)
        return [logits[row, : len(text.ids)] for row, text in enumerate(batch)]

    @contextlib.contextmanager
    def adapter_off(self) -> Iterator[None]:
        """The base alone inside the block. Where the adapter brought the head, that is one of random weights."""
        disable: Callable[[], Any] | None = getattr(self._model, "disable_adapter", None)
        with disable() if disable else contextlib.nullcontext():
            yield

    @property
    def vocabulary(self) -> int:
        """Rows of the input embedding."""
        return int(self._classifier.get_input_embeddings().weight.shape[0])

    def grow_vocabulary(self, rows: int) -> None:
        """Adds rows (the mean of the others) so that a base can read tokens that came with an adapter."""
        import torch

        before = self.vocabulary
        if rows <= before:
            return
        self._classifier.resize_token_embeddings(rows, mean_resizing=False)
        with torch.no_grad():
            weight = self._classifier.get_input_embeddings().weight
            weight[before:] = weight[:before].float().mean(0).to(weight.dtype)

    def close(self) -> None:
        """Frees the model."""
        import gc

        self._model = self._classifier = None
        gc.collect()
        if self._device == "cuda":
            import torch

            torch.cuda.empty_cache()
