"""Sessions in PyTorch: the baseline (base + live adapter through PEFT), a merged view, a written checkpoint."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lora2edge.backends.hf.batching import Batcher
from lora2edge.backends.hf.load import find_reference, is_quantized, load_live, resolve_tokenizer
from lora2edge.calibration.model import build_model
from lora2edge.contracts import (
    GREEDY,
    Checkpoint,
    CheckpointRef,
    Message,
    Sampling,
    SessionFacts,
    SessionOptions,
    TokenizerFiles,
)
from lora2edge.errors import DataError, UnsupportedError
from lora2edge.texts import Renderer

if TYPE_CHECKING:
    from lora2edge.contracts import FloatArray

_BATCH_TOKENS = 1024
"""Padded tokens of one forward pass: full matrix speed on a CPU, and activations stay below the size that glibc hands
back to the system after each layer (measured: 2048 takes 1.1 × the time in float32, 1.4 × in bfloat16)."""


def open_baseline(ref: CheckpointRef, options: SessionOptions, *, dtype: str) -> HfSession:
    """The base folder, with the adapters live on it, read by transformers and PEFT themselves.

    Without adapters it is the base alone, or any checkpoint folder. `dtype`: "float32", "bfloat16" or "float16".
    Raises CheckpointError or AdapterError where the libraries cannot read the folders.
    """
    model = load_live(ref, dtype=dtype, device=options.device)
    session = HfSession(model, resolve_tokenizer(ref), options, dtype=dtype, reference=find_reference(ref))
    if is_quantized(ref):
        session.facts = replace(session.facts, build=f"{session.facts.build}; quantized base, dequantized when loaded")
    return session


def open_merged(view: Checkpoint, options: SessionOptions, *, dtype: str, rounded: bool) -> HfSession:
    """A view (merged or plain) in PyTorch; `rounded`: with weights as they would be written. Writes nothing."""
    model = build_model(view, dtype=dtype, device=options.device, rounded=rounded)
    return HfSession(model, view.tokenizer, options, dtype=dtype)


class Head:
    """The output layer of a session, which outlives it: hidden states → logits, a live adapter on it included."""

    def __init__(self, causal: Any, dtype: Any, device: str) -> None:
        self._module = causal.get_output_embeddings()
        self._dtype = dtype
        self._device = device
        cap = getattr(causal.config.get_text_config(), "final_logit_softcapping", None)
        self.softcap: float | None = float(cap) if cap else None
        """c of c·tanh(logits / c) (Gemma 2, arXiv 2408.00118), or None."""

    def __call__(self, hidden: FloatArray) -> FloatArray:
        """`[n, H]` float32 hidden states → `[n, V]` float32 logits, computed in the session's dtype."""
        import torch

        with torch.inference_mode():
            logits = self.tensor(torch.from_numpy(hidden).to(self._device, self._dtype))
            result: FloatArray = logits.float().cpu().numpy()
        return result

    def tensor(self, hidden: Any) -> Any:
        """The same on tensors, in the session's dtype."""
        import torch

        logits = self._module(hidden)
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap

    def matrix(self) -> tuple[FloatArray, FloatArray | None]:
        """`[V, H]` and `[V]` (or None) float32 with logits = hidden · matrixᵀ + bias before soft-capping.

        Taken from the layer by feeding it unit vectors, so that whatever adapter is live on it is in the matrix.
        """
        import numpy as np
        import torch

        with torch.inference_mode():
            size = int(self._module.weight.shape[1])
            zero = self._module(torch.zeros(1, size, dtype=self._dtype, device=self._device)).float()
            matrix = np.empty((zero.shape[1], size), np.float32)
            step = max(1, (1 << 26) // zero.shape[1])
            for start in range(0, size, step):
                stop = min(size, start + step)
                units = torch.zeros(stop - start, size, dtype=self._dtype, device=self._device)
                units[torch.arange(stop - start), torch.arange(start, stop)] = 1
                matrix[:, start:stop] = (self._module(units).float() - zero).T.cpu().numpy()
            bias: FloatArray = zero[0].cpu().numpy()
        return matrix, bias if bias.any() else None


class HfSession:
    """A causal language model in PyTorch, as a Session."""

    def __init__(
        self,
        model: Any,
        tokenizer: TokenizerFiles,
        options: SessionOptions,
        *,
        dtype: str,
        reference: str = "",
    ) -> None:
        import peft
        import torch
        import transformers

        torch.set_num_threads(options.threads)
        device, slots = options.device, options.slots
        self._model = model
        self._causal = model.get_base_model() if isinstance(model, peft.PeftModel) else model
        self._device = device
        self._tokenizer = tokenizer
        self._renderer: Renderer | None = None
        self._dtype = getattr(torch, dtype)
        self.head = Head(self._causal, self._dtype, device)
        self.facts = SessionFacts(
            backend="hf",
            device=torch.cuda.get_device_name() if device == "cuda" else "cpu",
            dtype=dtype,
            slots=slots,
            threads=options.threads,
            max_length=options.max_length,
            batching=(
                f"static: up to {slots} waiting requests are prefilled and decoded together, finished ones leave "
                "the batch, the next batch starts when all are done"
            ),
            build=f"torch {torch.__version__} ({torch.backends.cpu.get_cpu_capability()})",
            versions={
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "peft": peft.__version__,
            },
            reference=reference,
        )
        self._check_head()
        self._batcher = Batcher(self._causal, self.head.tensor, device=device, threads=options.threads, slots=slots)

    @property
    def tokenizer(self) -> TokenizerFiles:
        """What `encode` reads."""
        return self._tokenizer

    @contextlib.contextmanager
    def adapter_off(self) -> Iterator[None]:
        """While the block runs, the model is the base alone; a model without an adapter stays what it is."""
        with self._model.disable_adapter() if self._model is not self._causal else contextlib.nullcontext():
            yield

    @property
    def vocabulary(self) -> int:
        """Rows of the input embedding."""
        return int(self._causal.get_input_embeddings().weight.shape[0])

    def grow_vocabulary(self, rows: int) -> None:
        """Adds rows (the mean of the others) so that a base can read tokens that came with an adapter."""
        if rows > self.vocabulary:
            _grow(self._causal, rows)
            self.head = Head(self._causal, self._dtype, self._device)

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Token ids by tokenizer.json and the chat template, the adapter folder's before the base's."""
        if self._renderer is None:
            self._renderer = Renderer(self._tokenizer)
        return self._renderer.encode(messages)

    def hidden(
        self,
        batch: Sequence[Sequence[int]],
        keep: Sequence[Sequence[int]],
        advance: Callable[[int], None] | None = None,
    ) -> list[FloatArray]:
        """For each sequence the states that the head sees at the kept positions, `[len(keep[i]), H]` float32.

        Sequences run sorted by length in padded batches. The padding is on the right, where a causal model cannot
        see it from a kept position. `advance` is called with the number of sequences after each batch.
        """
        import torch

        for ids in batch:
            self._check_length(len(ids))
        found: dict[int, FloatArray] = {}
        body = self._causal.base_model
        with torch.inference_mode():
            for group in _groups([len(ids) for ids in batch]):
                width = max(len(batch[index]) for index in group)
                padded = torch.zeros(len(group), width, dtype=torch.long)
                for row, index in enumerate(group):
                    padded[row, : len(batch[index])] = torch.tensor(batch[index])
                states = body(input_ids=padded.to(self._device), use_cache=False).last_hidden_state
                for row, index in enumerate(group):
                    kept = states[row, torch.tensor(list(keep[index]), dtype=torch.long)]
                    found[index] = kept.float().cpu().numpy()
                if advance:
                    advance(len(group))
        return [found[index] for index in range(len(batch))]

    def logits(self, batch: Sequence[Sequence[int]], keep: Sequence[Sequence[int]]) -> Iterator[FloatArray]:
        """`[len(keep[i]), V]` float32 for each sequence, in order; the head runs on kept rows only."""
        for states in self.hidden(batch, keep):
            yield self.head(states)

    def generate(
        self, ids: Sequence[int], *, max_new: int, stop: Sequence[int], sampling: Sampling = GREEDY
    ) -> Iterator[int]:
        """New token ids, without the stop token. Thread-safe. Raises DataError where the slot is too short."""
        self._check_length(len(ids) + max_new)
        return self._batcher.stream(ids, max_new=max_new, stop=stop, temperature=sampling.temperature)

    def close(self) -> None:
        """Ends the decoding thread and frees the model; `head` stays usable."""
        import gc

        self._batcher.close()
        self._model = self._causal = None
        gc.collect()
        if self._device == "cuda":
            import torch

            torch.cuda.empty_cache()

    def _check_length(self, length: int) -> None:
        if length > self.facts.max_length:
            raise DataError(
                "too-long",
                f"{length} tokens are asked for, a slot of this session holds {self.facts.max_length}",
                hint="open the session with a larger max_length, or shorten the text",
            )

    def _check_head(self) -> None:
        """Some architectures scale their logits in ways that `Head` does not know: three tokens find it out."""
        import torch

        ids = torch.tensor([[0, 1, 2]], device=self._device)
        with torch.inference_mode():
            theirs = self._causal(input_ids=ids, use_cache=False).logits.float()
            ours = self.head.tensor(self._causal.base_model(input_ids=ids, use_cache=False).last_hidden_state).float()
        if theirs.shape != ours.shape or not torch.allclose(theirs, ours, rtol=1e-2, atol=1e-2, equal_nan=True):
            raise UnsupportedError(
                "unknown-head",
                f"logits of {type(self._causal).__name__} are not its output layer's on the last hidden states",
                why="perplexity and divergence would be measured on other logits than the model's",
                hint="this architecture is not supported yet",
            )


def _grow(causal: Any, rows: int) -> None:
    """Resizes the embeddings; new rows are the mean of the old ones (not random, so that figures repeat)."""
    import torch

    before = int(causal.get_input_embeddings().weight.shape[0])
    causal.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        for layer in (causal.get_input_embeddings(), causal.get_output_embeddings()):
            layer.weight[before:] = layer.weight[:before].float().mean(0).to(layer.weight.dtype)


def _groups(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Indices in batches of similar length, each at most `_BATCH_TOKENS` when padded, or one sequence."""
    group: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: lengths[index]):
        if group and (len(group) + 1) * lengths[index] > _BATCH_TOKENS:
            yield group
            group = []
        group.append(index)
    if group:
        yield group
