"""Speed of a classifier's graphs against PyTorch, one shape of batch after the other, all contenders interleaved.

Usage: python benchmarks/encoder_speed.py FOLDER [--family bert] [--threads 1] [--rounds 7] [--only NAME ...]

FOLDER keeps a random-weight classifier of the family's base shape (BERT-base: 12 layers, 768 wide) and its graphs; they
are made where they are missing. A round runs every contender in turn, for at least `--seconds` each; what counts is
the ratio within a round. Texts have their full length: nothing is padding.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from measure import write_results

from lora2edge.checkpoint import open_checkpoint
from lora2edge.graph.builder import BlockFormat, ChannelFormat, Format
from lora2edge.graph.encoder_families import describe_encoder
from lora2edge.graph.ort_encoder import write_ort_encoder
from lora2edge.graph.ranges import find_ranges
from lora2edge.graph.write import write_data, write_model
from lora2edge.progress import SILENT

_FAMILIES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "bert": ("Bert", {"vocab_size": 30522, "num_labels": 4}),
    "distilbert": ("DistilBert", {"vocab_size": 30522, "num_labels": 4}),
    "deberta-v3": (
        "DebertaV2",
        {"vocab_size": 30522, "num_labels": 4, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
         "intermediate_size": 3072, "relative_attention": True, "position_buckets": 256, "norm_rel_ebd": "layer_norm",
         "share_att_key": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False},
    ),
}  # fmt: skip
_PYTORCH = ("PyTorch float32", "PyTorch bfloat16")
_GRAPHS: Mapping[str, Format | None] = {
    "float32": None,
    "int8 dynamic": ChannelFormat(),
    "int8 static": ChannelFormat(),
    "int8 weights": BlockFormat(8, 128),
}
_SHAPES = [(batch, length) for batch in (1, 8, 32) for length in (32, 128, 512)]
Contender = Callable[[Mapping[str, np.ndarray]], object]


class _Nearest:
    """Rounds to nearest: speed does not depend on the codes."""

    def __init__(self, checkpoint: Any) -> None:
        self._checkpoint = checkpoint

    def codes(self, tensor: str, start: int, stop: int, form: Any) -> tuple[np.ndarray, np.ndarray]:
        rows = self._checkpoint.rows(tensor, start, stop)
        if isinstance(form, ChannelFormat):
            scales = np.abs(rows).max(1) / 127
            return np.rint(rows / scales[:, None]).astype(np.int8), scales
        blocks = rows.reshape(len(rows), -1, form.block)
        scales = np.abs(blocks).max(2) / 127
        return (np.rint(blocks / scales[..., None]) + 128).astype(np.uint8), scales


def make_model(folder: Path, family: str) -> None:
    """A random-weight classifier as save_pretrained writes it, with a tokenizer that is not used."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models

    torch.manual_seed(0)
    name, settings = _FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**settings)
    model = getattr(transformers, f"{name}ForSequenceClassification")(config)
    model.save_pretrained(folder)
    Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]")).save(str(folder / "tokenizer.json"))


def write_graphs(model: Path, folder: Path, names: list[str]) -> None:
    """`folder`/NAME/model.onnx of each that is missing; the pooler and the classifier stay float."""
    checkpoint = open_checkpoint(model)
    encoder = describe_encoder(checkpoint.config, checkpoint.tensors, checkpoint.task)
    for name in ["float32", *names]:
        if (folder / name / "model.onnx").exists():
            continue
        (folder / name).mkdir(parents=True, exist_ok=True)
        form = _GRAPHS[name]
        formats = {m.name: form for m in encoder.matrices if form and m.role not in ("pooler", "classifier")}
        batches = [make_batch(2, 128, seed) for seed in range(4)]
        ranges = find_ranges(folder / "float32" / "model.onnx", batches) if name == "int8 static" else None
        graph = write_ort_encoder(encoder, formats, activations=ranges)
        write_data(folder / name / "model.onnx.data", graph, checkpoint, _Nearest(checkpoint), SILENT)
        write_model(folder / name / "model.onnx", graph, "model.onnx.data")
    checkpoint.close()


def make_batch(batch: int, length: int, seed: int = 0) -> dict[str, np.ndarray]:
    ids = np.random.default_rng(seed).integers(1000, 30000, (batch, length))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}


def open_pytorch(model: Path, dtype: str, threads: int) -> Contender:
    import torch
    from transformers import AutoModelForSequenceClassification

    torch.set_num_threads(threads)
    loaded = AutoModelForSequenceClassification.from_pretrained(model, dtype=getattr(torch, dtype)).eval()
    has_types = getattr(loaded.config, "type_vocab_size", 0) > 1

    def run(batch: Mapping[str, np.ndarray]) -> object:
        given = {key: torch.from_numpy(value) for key, value in batch.items() if has_types or "type" not in key}
        with torch.inference_mode():
            return loaded(**given).logits.float().numpy()

    return run


def open_graph(path: Path, threads: int) -> Contender:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    return lambda batch: session.run(["logits"], {name: batch[name] for name in names})


def time_batch(run: Contender, batch: Mapping[str, np.ndarray], seconds: float) -> float:
    """Seconds of the fastest call, of as many as fit."""
    best, until = float("inf"), time.perf_counter() + seconds
    while True:
        started = time.perf_counter()
        run(batch)
        ended = time.perf_counter()
        best = min(best, ended - started)
        if ended > until:
            return best


def measure(contenders: Mapping[str, Contender], shape: tuple[int, int], rounds: int, seconds: float) -> dict[str, Any]:
    """Median latency of each, and its speed over each PyTorch contender's: [least, median, most] over the rounds."""
    batch = make_batch(*shape)
    for run in contenders.values():
        run(batch)
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            times[name].append(time_batch(run, batch, seconds))
    told: dict[str, Any] = {"batch": shape[0], "length": shape[1], "contenders": {}}
    for name, own in times.items():
        latency = statistics.median(own)
        entry: dict[str, Any] = {"latency_ms": latency * 1e3, "texts_per_s": shape[0] / latency}
        for peer in _PYTORCH:
            if peer in times:
                ratios = sorted(theirs / ours for ours, theirs in zip(own, times[peer], strict=True))
                entry[f"speed over {peer}"] = [ratios[0], statistics.median(ratios), ratios[-1]]
        told["contenders"][name] = entry
    return told


def show(told: Mapping[str, Any]) -> None:
    for name, entry in told["contenders"].items():
        ratios = "  ".join(
            f"{entry[f'speed over {peer}'][1]:5.2f}" for peer in _PYTORCH if f"speed over {peer}" in entry
        )
        print(f"{told['batch']:3} x {told['length']:3}  {name:17} {entry['latency_ms']:9.2f} ms  "
              f"{entry['texts_per_s']:8.1f} texts/s  {ratios}", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--family", default="bert", choices=_FAMILIES)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.3)
    parser.add_argument("--only", nargs="*", default=[*_PYTORCH, *_GRAPHS])
    parser.add_argument("--shapes", nargs="*", help="as BATCHxLENGTH")
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    model, graphs = options.folder / "model", options.folder / "graphs"
    if not model.exists():
        make_model(model, options.family)
    write_graphs(model, graphs, [name for name in options.only if name in _GRAPHS])
    contenders = {
        name: open_pytorch(model, name.split()[1], options.threads)
        if name in _PYTORCH
        else open_graph(graphs / name / "model.onnx", options.threads)
        for name in options.only
    }
    shapes = [tuple(map(int, shape.split("x"))) for shape in options.shapes or []] or _SHAPES
    print(f"{'shape':9}  {'':17} {'latency':>12}  {'':16}  over PyTorch float32, bfloat16")
    results = []
    for shape in shapes:
        results.append(measure(contenders, shape, options.rounds, options.seconds))
        show(results[-1])
        if options.results:
            told = {"family": options.family, "threads": options.threads, "rounds": options.rounds, "shapes": results}
            write_results(options.results, told)


if __name__ == "__main__":
    main()
