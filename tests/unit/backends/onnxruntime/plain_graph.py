"""A Qwen2 graph as other exporters write them: it gives the logits of all tokens, and takes no positions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np

from lora2edge.checkpoint import open_checkpoint
from lora2edge.graph.builder import Graph, GraphBuilder, Part
from lora2edge.graph.write import write_data, write_model
from lora2edge.progress import SILENT


def write_qwen2(checkpoint: Path, folder: Path) -> Path:
    """`checkpoint` (Qwen2, tied, float32) as model.onnx and model.onnx.data, with the tokenizer's files."""
    folder.mkdir(parents=True)
    view = open_checkpoint(checkpoint)
    graph = _graph(json.loads((checkpoint / "config.json").read_text()))
    write_data(folder / "model.onnx.data", graph, view, None, SILENT)
    (folder / "journal.jsonl").unlink(missing_ok=True)
    write_model(folder / "model.onnx", graph, "model.onnx.data")
    for path in checkpoint.iterdir():
        if path.suffix in {".json", ".jinja"}:
            shutil.copy(path, folder)
    return folder


def _graph(config: dict) -> Graph:
    hidden, layers, heads = (config[f"{key}"] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads"))
    kv, inner, vocab = config["num_key_value_heads"], config["intermediate_size"], config["vocab_size"]
    size, epsilon = hidden // heads, config["rms_norm_eps"]
    theta = config["rope_parameters"]["rope_theta"]
    b = GraphBuilder("plain", opset=21)
    b.add_input("input_ids", "int64", ("batch", "sequence"))
    b.add_input("attention_mask", "int64", ("batch", "total"))
    b.add_output("logits", "float32", ("batch", "sequence", vocab))
    one, axis = b.constant("one", [1], "int64"), b.constant("axis", 1, "int64")
    lengths = b.op("ReduceSum", "attention_mask", one, keepdims=0)
    last = b.op("Cast", b.op("Sub", lengths, one), to="int32")
    total = b.op("Cast", b.op("Gather", b.op("Shape", "attention_mask"), axis), to="int32")

    def angles(start: int, stop: int) -> np.ndarray:
        inverse = theta ** -(np.arange(0, size, 2) / size)
        return np.outer(np.arange(start, stop), inverse)

    limit = config["max_position_embeddings"]
    cos = b.table("cos", (limit, size // 2), lambda start, stop: np.cos(angles(start, stop)).astype(np.float32))
    sin = b.table("sin", (limit, size // 2), lambda start, stop: np.sin(angles(start, stop)).astype(np.float32))

    def weight(*names: str, rows: int = 0, columns: int = 0) -> str:
        parts = [Part(name, 0, count) for name, count in zip(names, _split(len(names), rows), strict=True)]
        return b.floats("+".join(names), parts, (rows, columns) if columns else (rows,))

    def _split(count: int, rows: int) -> list[int]:
        return [hidden, kv * size, kv * size] if count == 3 else [rows]

    def norm(x: str, name: str) -> str:
        return b.op("SimplifiedLayerNormalization", x, weight(name, rows=hidden), axis=-1, epsilon=epsilon)

    def linear(x: str, *names: str, rows: int, columns: int, bias: bool = False, out: str = "") -> str:
        matrix = weight(*(f"{name}.weight" for name in names), rows=rows, columns=columns)
        y = b.contrib("FusedMatMul", x, matrix, transB=1, out="" if bias else out)
        return b.op("Add", y, weight(*(f"{name}.bias" for name in names), rows=rows), out=out) if bias else y

    embedding = weight("model.embed_tokens.weight", rows=vocab, columns=hidden)
    x = b.op("Gather", embedding, "input_ids", axis=0)
    for layer in range(layers):
        names = [f"past_key_values.{layer}.{kind}" for kind in ("key", "value")]
        presents = [f"present.{layer}.{kind}" for kind in ("key", "value")]
        for name in names:
            b.add_input(name, "float32", ("batch", kv, "past", size))
        for name in presents:
            b.add_output(name, "float32", ("batch", kv, "present", size))
        place = f"model.layers.{layer}."
        y = norm(x, place + "input_layernorm.weight")
        projections = [f"{place}self_attn.{kind}_proj" for kind in "qkv"]
        packed = linear(y, *projections, rows=hidden + 2 * kv * size, columns=hidden, bias=True)
        (y, *_) = b.ops(
            "GroupQueryAttention",
            *(packed, "", "", *names, last, total, cos, sin),
            out=(f"attention.{layer}", *presents),
            domain="com.microsoft",
            num_heads=heads,
            kv_num_heads=kv,
            do_rotary=1,
            rotary_interleaved=0,
            scale=size**-0.5,
            local_window_size=-1,
        )
        x = b.op("Add", x, linear(y, place + "self_attn.o_proj", rows=hidden, columns=hidden))
        y = norm(x, place + "post_attention_layernorm.weight")
        gate, up = (linear(y, f"{place}mlp.{kind}_proj", rows=inner, columns=hidden) for kind in ("gate", "up"))
        y = b.op("Mul", b.op("Mul", gate, b.op("Sigmoid", gate)), up)
        x = b.op("Add", x, linear(y, place + "mlp.down_proj", rows=hidden, columns=inner))
    matrix = weight("model.embed_tokens.weight", rows=vocab, columns=hidden)
    b.contrib("FusedMatMul", norm(x, "model.norm.weight"), matrix, transB=1, out="logits")
    return b.finish()
