"""Tiny encoders of every family as transformers has them, and their graphs in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lora2edge.checkpoint import open_checkpoint
from lora2edge.graph.builder import BlockFormat, ChannelFormat, Format
from lora2edge.graph.encoder import Encoder
from lora2edge.graph.encoder_families import describe_encoder
from lora2edge.graph.ort_encoder import write_ort_encoder
from lora2edge.graph.write import write_data, write_model
from lora2edge.progress import SILENT
from tests.tiny import bpe_tokenizer, randomize

VOCAB = 384
PAD = 1
"""Not 0, so that positions counted from the padding differ from plain ones."""
_COMMON = {"vocab_size": VOCAB, "max_position_embeddings": 48, "num_labels": 3, "pad_token_id": PAD}
_BERT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "layer_norm_eps": 1e-5,
}  # fmt: skip
_DISTILBERT = {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4}
_V3 = {
    "relative_attention": True, "position_buckets": 8, "norm_rel_ebd": "layer_norm", "share_att_key": True,
    "pos_att_type": ["p2c", "c2p"], "type_vocab_size": 0, "position_biased_input": False,
}  # fmt: skip
FAMILIES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "bert": ("Bert", {**_BERT, "type_vocab_size": 2}),
    "bert, one type, gelu_new": ("Bert", {**_BERT, "type_vocab_size": 1, "hidden_act": "gelu_new"}),
    "bert, relu": ("Bert", {**_BERT, "hidden_act": "relu"}),
    "bert, silu": ("Bert", {**_BERT, "hidden_act": "silu"}),
    "roberta": ("Roberta", {**_BERT, "type_vocab_size": 1}),
    "xlm-roberta": ("XLMRoberta", {**_BERT, "type_vocab_size": 1}),
    "camembert": ("Camembert", {**_BERT, "type_vocab_size": 1}),
    "roberta, two types": ("Roberta", {**_BERT, "type_vocab_size": 2}),
    "distilbert": ("DistilBert", _DISTILBERT),
    "deberta-v3": ("DebertaV2", {**_BERT, **_V3}),
    "deberta-v2": ("DebertaV2", {**_BERT, **_V3, "position_biased_input": True, "type_vocab_size": 2}),
    "deberta, own position matrices": ("DebertaV2", {**_BERT, **_V3, "share_att_key": False}),
    "deberta, c2p": ("DebertaV2", {**_BERT, **_V3, "share_att_key": False, "pos_att_type": ["c2p"]}),
    "deberta, p2c": ("DebertaV2", {**_BERT, **_V3, "share_att_key": False, "pos_att_type": ["p2c"]}),
    "deberta, no buckets, no norm": (
        "DebertaV2",
        {**_BERT, **_V3, "position_buckets": -1, "max_relative_positions": 16, "norm_rel_ebd": "none"},
    ),
    "deberta, narrow embedding": ("DebertaV2", {**_BERT, **_V3, "embedding_size": 16}),
    "deberta, convolution": ("DebertaV2", {**_BERT, **_V3, "conv_kernel_size": 3, "conv_act": "gelu"}),
    "deberta, convolution, one layer": (
        "DebertaV2",
        {**_BERT, **_V3, "conv_kernel_size": 5, "conv_groups": 4, "num_hidden_layers": 1},
    ),
    "deberta, absolute": ("DebertaV2", {**_BERT, "relative_attention": False, "position_biased_input": True}),
}
TASKS = {"sequence": "ForSequenceClassification", "token": "ForTokenClassification"}


def make_encoder(folder: Path, family: str, task: str) -> Any:
    """The model in float32, also saved in `folder`."""
    import torch
    import transformers

    name, settings = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**_COMMON, **settings)
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{name}{TASKS[task]}")(config).to(torch.float32).eval()
    randomize(model, 0)
    model.save_pretrained(folder)
    bpe_tokenizer(VOCAB - 8).save_pretrained(folder)
    return model


def ragged(lengths: list[int], *, pairs: bool = False, seed: int = 0) -> dict[str, np.ndarray]:
    """A batch padded on the right; `pairs`: the second half of each text is of another type."""
    generator = np.random.default_rng(seed)
    shape = (len(lengths), max(lengths))
    ids, mask, types = np.full(shape, PAD), np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    for row, length in enumerate(lengths):
        ids[row, :length] = generator.integers(2, VOCAB, length)
        mask[row, :length] = 1
        types[row, length // 2 : length] = int(pairs)
    return {"input_ids": ids.astype(np.int64), "attention_mask": mask, "token_type_ids": types}


def reference(model: Any, batch: Mapping[str, np.ndarray], has_types: bool) -> np.ndarray:
    """transformers' logits."""
    import torch

    given = {key: torch.tensor(value) for key, value in batch.items() if has_types or key != "token_type_ids"}
    with torch.no_grad():
        return model(**given).logits.numpy()


class Rounding:
    """Rounds to nearest, as a backend's Rounder would."""

    def __init__(self, checkpoint: Any) -> None:
        self._checkpoint = checkpoint

    def codes(self, tensor: str, start: int, stop: int, form: Format) -> tuple[np.ndarray, np.ndarray]:
        rows = self._checkpoint.rows(tensor, start, stop)
        if isinstance(form, ChannelFormat):
            codes, scales = round_rows(rows)
            return codes.astype(np.int8), scales
        assert isinstance(form, BlockFormat)
        codes, scales = round_blocks(rows, form)
        codes = (codes + (1 << (form.bits - 1))).astype(np.uint8)
        return (codes if form.bits == 8 else codes[..., ::2] | codes[..., 1::2] << 4), scales


def round_rows(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scales = (np.abs(rows).max(1) / 127).astype(np.float32)
    return np.rint(rows / scales[:, None]), scales


def round_blocks(rows: np.ndarray, form: BlockFormat) -> tuple[np.ndarray, np.ndarray]:
    blocks = -(-rows.shape[1] // form.block)
    padded = np.pad(rows, ((0, 0), (0, blocks * form.block - rows.shape[1]))).reshape(len(rows), blocks, form.block)
    top = (1 << (form.bits - 1)) - 1
    scales = (np.abs(padded).max(2) / top).astype(np.float32)
    return np.rint(padded / scales[..., None]), scales


def dequantized(rows: np.ndarray, form: Format) -> np.ndarray:
    """What the codes of `Rounding` stand for."""
    if isinstance(form, ChannelFormat):
        codes, scales = round_rows(rows)
        return codes * scales[:, None]
    assert isinstance(form, BlockFormat)
    codes, scales = round_blocks(rows, form)
    return (codes * scales[..., None]).reshape(len(rows), -1)[:, : rows.shape[1]]


def write_encoder(folder: Path, out: Path, formats: Any = None, **options: Any) -> Encoder:
    """Writes `out`/model.onnx and its data. `formats`: a function of each matrix, or None for floats."""
    checkpoint = open_checkpoint(folder)
    try:
        return write_checkpoint(checkpoint, out, formats, **options)
    finally:
        checkpoint.close()


def write_checkpoint(checkpoint: Any, out: Path, formats: Any = None, **options: Any) -> Encoder:
    """The same of an opened checkpoint."""
    encoder = describe_encoder(checkpoint.config, checkpoint.tensors, checkpoint.task)
    chosen = {matrix.name: formats(matrix) for matrix in encoder.matrices if formats and formats(matrix)}
    graph = write_ort_encoder(encoder, chosen, **options)
    out.mkdir(exist_ok=True)
    write_data(out / "model.onnx.data", graph, checkpoint, Rounding(checkpoint), SILENT)
    write_model(out / "model.onnx", graph, "model.onnx.data")
    return encoder


def open_graph(path: Path, optimized: Path | None = None) -> Any:
    """A session of one thread. `optimized`: where ONNX Runtime writes the graph that it runs."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3 if optimized else 2
    if optimized:
        options.optimized_model_filepath = str(optimized)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run_graph(session: Any, batch: Mapping[str, np.ndarray]) -> np.ndarray:
    return session.run(["logits"], {value.name: batch[value.name] for value in session.get_inputs()})[0]


def error(found: np.ndarray, expected: np.ndarray, mask: np.ndarray) -> float:
    """Largest difference over the largest logit, padding left out."""
    if expected.ndim == 3:
        found, expected = found[mask.astype(bool)], expected[mask.astype(bool)]
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())
