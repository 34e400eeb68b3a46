"""Graphs of tiny decoders, run by ONNX Runtime and by onnxruntime-genai, beside transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lora2edge.checkpoint import open_checkpoint
from lora2edge.graph.builder import BlockFormat, ChannelFormat, Format
from lora2edge.graph.decoder import Decoder, describe_decoder
from lora2edge.graph.ort_decoder import write_ort_decoder
from lora2edge.graph.write import write_data, write_model
from lora2edge.progress import Silent


class Nearest:
    """Rounds to nearest: scales from the largest magnitude."""

    def __init__(self, checkpoint: Any) -> None:
        self.checkpoint = checkpoint

    def codes(self, tensor: str, start: int, stop: int, form: BlockFormat | ChannelFormat) -> tuple[Any, Any]:
        rows = self.checkpoint.rows(tensor, start, stop)
        if isinstance(form, ChannelFormat):
            levels, scales = _levels(rows[:, None], 127)
            return levels[:, 0].astype(np.int8), scales[:, 0]
        half = 1 << form.bits - 1
        padded = np.pad(rows, ((0, 0), (0, -rows.shape[1] % form.block)))
        levels, scales = _levels(padded.reshape(len(rows), -1, form.block), half - 1)
        codes = (levels + half).astype(np.uint8)
        return (codes if form.bits == 8 else codes[..., 0::2] | codes[..., 1::2] << 4), scales

    def rounded(self, tensor: str, form: Format) -> Any:
        """The whole tensor as its integers say, float32."""
        info = self.checkpoint.tensors[tensor]
        rows = self.checkpoint.rows(tensor, 0, info.shape[0])
        if isinstance(form, ChannelFormat):
            levels, scales = _levels(rows[:, None], 127)
        elif isinstance(form, BlockFormat):
            padded = np.pad(rows, ((0, 0), (0, -rows.shape[1] % form.block)))
            levels, scales = _levels(padded.reshape(len(rows), -1, form.block), (1 << form.bits - 1) - 1)
        else:
            return rows
        return (levels * scales[..., None]).reshape(len(rows), -1)[:, : rows.shape[1]]


def _levels(blocks: Any, most: int) -> tuple[Any, Any]:
    scales = np.abs(blocks).max(-1) / np.float32(most)
    return np.rint(blocks / np.where(scales == 0, 1, scales)[..., None]), scales.astype(np.float32)


@dataclass
class Lowered:
    """A written graph and what it was written from."""

    folder: Path
    decoder: Decoder
    checkpoint: Any
    session: Any

    @property
    def dtype(self) -> str:
        """Of the cache."""
        kind: str = self.session.get_inputs()[2].type
        return {"tensor(float)": "float32", "tensor(float16)": "float16"}[kind]

    def empty(self, batch: int) -> dict[str, Any]:
        """A cache without a token."""
        shape = (batch, self.decoder.kv_heads, 0, self.decoder.head_dim)
        kinds = ("key", "value")
        return {
            f"past_key_values.{layer}.{kind}": np.zeros(shape, self.dtype)
            for layer in range(len(self.decoder.layers))
            for kind in kinds
        }

    def __call__(
        self, ids: Any, lengths: Sequence[int] | None = None, past: Any = None, positions: Any = None
    ) -> tuple[Any, Any]:
        """Logits and the cache. `lengths`: of the rows in all, each padded on the right."""
        ids = np.asarray(ids, np.int64)
        past = past or self.empty(len(ids))
        done = next(iter(past.values())).shape[2]
        total = done + ids.shape[1]
        mask = np.arange(total)[None] < np.asarray(lengths or [total] * len(ids))[:, None]
        feeds = {"input_ids": ids, "attention_mask": mask.astype(np.int64), **past}
        if positions is not None:
            feeds["logits_positions"] = np.asarray(positions, np.int64)
        logits, *present = self.session.run(None, feeds)
        return logits, dict(zip(past, present, strict=True))

    def all(self, ids: Any, lengths: Sequence[int] | None = None, past: Any = None) -> tuple[Any, Any]:
        """Logits of every position."""
        return self(ids, lengths, past, [range(len(ids[0]))])


def lower(
    base: Path,
    folder: Path,
    formats: Mapping[str, Format] | Format | None = None,
    accuracy_level: int = 1,
    **settings: Any,
) -> Lowered:
    """Writes the graph of the checkpoint `base` into `folder`, with genai_config.json, and opens it."""
    folder.mkdir(parents=True)
    checkpoint = open_checkpoint(base)
    decoder = describe_decoder(checkpoint.config, checkpoint.tensors)
    if formats is None:
        formats = {}
    elif not isinstance(formats, Mapping):
        formats = {matrix.name: formats for matrix in decoder.matrices}
    graph = write_ort_decoder(decoder, formats, accuracy_level=accuracy_level, **settings)
    write_data(folder / "model.onnx.data", graph, checkpoint, Nearest(checkpoint), Silent())
    write_model(folder / "model.onnx", graph, "model.onnx.data")
    (folder / "genai_config.json").write_text(json.dumps(_genai(decoder)))
    for path in base.glob("*token*"):
        (folder / path.name).write_bytes(path.read_bytes())
    return Lowered(folder, decoder, checkpoint, open_session(folder))


def open_session(folder: Path, severity: int = 3) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = severity
    return onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])


def _genai(decoder: Decoder) -> dict[str, Any]:
    model = {
        "type": decoder.architecture,
        "context_length": decoder.context_length,
        "vocab_size": decoder.vocab_rows,
        "bos_token_id": 1,
        "eos_token_id": decoder.vocab_rows - 1,
        "pad_token_id": 0,
        "decoder": {
            "filename": "model.onnx",
            "head_size": decoder.head_dim,
            "hidden_size": decoder.hidden,
            "num_attention_heads": decoder.heads,
            "num_hidden_layers": len(decoder.layers),
            "num_key_value_heads": decoder.kv_heads,
            "session_options": {"log_id": "genai", "intra_op_num_threads": 1, "provider_options": []},
            "inputs": {
                "input_ids": "input_ids",
                "attention_mask": "attention_mask",
                "past_key_names": "past_key_values.%d.key",
                "past_value_names": "past_key_values.%d.value",
            },
            "outputs": {
                "logits": "logits",
                "present_key_names": "present.%d.key",
                "present_value_names": "present.%d.value",
            },
        },
    }
    search = {"do_sample": False, "max_length": decoder.context_length, "past_present_share_buffer": True}
    return {"model": model, "search": search}


def genai_tokens(folder: Path, prompts: Sequence[Sequence[int]], new: int) -> list[list[int]]:
    """Greedy tokens by onnxruntime-genai, prompt by prompt."""
    import onnxruntime_genai

    model = onnxruntime_genai.Model(str(folder))
    results = []
    for ids in prompts:
        params = onnxruntime_genai.GeneratorParams(model)
        params.set_search_options(max_length=len(ids) + new, do_sample=False)
        generator = onnxruntime_genai.Generator(model, params)
        generator.append_tokens(np.asarray([ids], np.int32))
        while not generator.is_done():
            generator.generate_next_token()
        results.append([int(token) for token in generator.get_sequence(0)[len(ids) :]])
    return results


def reference(base: Path) -> Any:
    """transformers' model in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager").eval()


def reference_logits(model: Any, ids: Any) -> Any:
    """`[batch, tokens, vocabulary]` float32 of a whole forward pass."""
    import torch

    with torch.no_grad():
        return model(torch.tensor(np.asarray(ids)), use_cache=False).logits.numpy()


def reference_tokens(model: Any, prompts: Sequence[Sequence[int]], new: int) -> list[list[int]]:
    """Greedy tokens of prompts of one length, in one batch."""
    import torch

    ids = torch.tensor(prompts)
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
    return [row[len(prompts[0]) :] for row in out.tolist()]


class InPlace:
    """Plain ONNX Runtime on cache buffers that are past and present in one."""

    def __init__(self, lowered: Lowered, batch: int, most: int) -> None:
        import onnxruntime

        decoder = lowered.decoder
        shape = (batch, decoder.kv_heads, most, decoder.head_dim)
        names = [f"{layer}.{kind}" for layer in range(len(decoder.layers)) for kind in ("key", "value")]
        value = onnxruntime.OrtValue.ortvalue_from_numpy
        self.buffers = {name: value(np.full(shape, 7, lowered.dtype)) for name in names}
        self.session = lowered.session

    def __call__(self, ids: Any, lengths: Any, positions: Any = None) -> Any:
        """Logits. `ids`: the new tokens; `lengths`: of the rows with them."""
        import onnxruntime

        binding = self.session.io_binding()
        lengths = np.asarray(lengths)
        binding.bind_cpu_input("input_ids", np.ascontiguousarray(ids, np.int64))
        mask = np.arange(lengths.max())[None] < lengths[:, None]
        binding.bind_cpu_input("attention_mask", mask.astype(np.int64))
        if positions is not None:
            # bind_cpu_input does not look among overridable initializers.
            value = onnxruntime.OrtValue.ortvalue_from_numpy(np.asarray(positions, np.int64))
            binding.bind_ortvalue_input("logits_positions", value)
        for name, value in self.buffers.items():
            binding.bind_ortvalue_input(f"past_key_values.{name}", value)
            binding.bind_ortvalue_output(f"present.{name}", value)
        binding.bind_output("logits")
        self.session.run_with_iobinding(binding)
        return next(value.numpy() for value in binding.get_outputs() if len(value.shape()) == 3)


def pad(prompts: Sequence[Sequence[int]]) -> tuple[Any, Any]:
    """Ids padded on the right, and lengths."""
    lengths = np.array([len(ids) for ids in prompts])
    ids = np.zeros((len(prompts), lengths.max()), np.int64)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = prompt
    return ids, lengths


def greedy(lowered: Lowered, prompts: Sequence[Sequence[int]], new: int) -> list[list[int]]:
    """Greedy tokens of ragged prompts in one batch."""
    ids, lengths = pad(prompts)
    step = InPlace(lowered, len(prompts), int(lengths.max()) + new)
    results: list[list[int]] = [[] for _ in prompts]
    for _ in range(new):
        chosen = step(ids, lengths)[:, -1].argmax(-1)
        for row, token in enumerate(chosen):
            results[row].append(int(token))
        ids, lengths = chosen[:, None], lengths + 1
    return results


def error_of(found: Any, expected: Any) -> float:
    """Largest difference, relative to the largest logit."""
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())
