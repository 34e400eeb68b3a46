"""Decode and prefill speed of int4 in ONNX Runtime against onnxruntime-genai's own builder, PyTorch and llama.cpp.

Usage: python benchmarks/onnx_speed.py MODEL --work FOLDER [--threads 1] [--rounds 9] [--results FILE]

MODEL is a folder of make_checkpoint.py. Contenders, each in a process of its own, in a new order each round:
our folder in onnxruntime-genai, the builder's folder in onnxruntime-genai (block 128, accuracy level 4, shared
embedding, pruned head, without and with one matrix for gate and up), our folder in our session, PyTorch bfloat16 with
the live adapter, and llama.cpp's Q4_K_M and Q4_0. The same token ids, greedy, batch 1. Ratios are taken round by round;
their intervals are of 95 %. The roof is what the threads can read from memory, measured in between.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from measure import write_results
from onnx_lowering import TARGET, builder, merge

PREFILL, DECODE, CONTEXT = 128, 32, 512
GGUF = "name: bench/{0}\nbackend: gguf\nprecision: {0}\noptions: {{rounding: llama.cpp, imatrix: false}}\n"
Tokens = Callable[[list[int], int], Iterator[int]]


def open_genai(folder: str, threads: int) -> Tokens:
    import onnxruntime_genai as og

    config = og.Config(folder)
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
    model = og.Model(config)

    def tokens(ids: list[int], count: int) -> Iterator[int]:
        params = og.GeneratorParams(model)
        params.set_search_options(max_length=CONTEXT, do_sample=False)
        generator = og.Generator(model, params)
        generator.append_tokens(np.array(ids, np.int32))
        for _ in range(count):
            generator.generate_next_token()
            yield int(generator.get_next_tokens()[0])

    return tokens


def open_artifact(folder: str, threads: int) -> Tokens:
    from lora2edge.backends.base import load_backend
    from lora2edge.contracts import MANIFEST, Manifest, SessionOptions
    from lora2edge.target import Target

    manifest = Manifest.from_json((Path(folder) / MANIFEST).read_text(encoding="utf-8"))
    target = Target.model_validate(manifest.options)
    session: Any = load_backend(target.backend).open(Path(folder), target, SessionOptions("cpu", threads, 1, CONTEXT))
    return lambda ids, count: session.generate(ids, max_new=count, stop=[])


def open_live(model: str, threads: int) -> Tokens:
    from lora2edge.backends.hf import open_baseline
    from lora2edge.contracts import CheckpointRef, SessionOptions

    ref = CheckpointRef.of(f"{model}/base", f"{model}/adapter")
    session = open_baseline(ref, SessionOptions("cpu", threads, 1, CONTEXT), dtype="bfloat16")
    return lambda ids, count: session.generate(ids, max_new=count, stop=[])


OPENERS = {"genai": open_genai, "artifact": open_artifact, "live": open_live}


def work(kind: str, path: str, threads: int) -> None:
    """A worker: for each line of standard input, the seconds to the first token and between the others."""
    tokens = OPENERS[kind](path, threads)
    ids = np.random.default_rng(0).integers(5, 4000, PREFILL).tolist()
    print("ready", flush=True)
    for _ in sys.stdin:
        times = [time.perf_counter()]
        for _ in tokens(ids, DECODE + 1):
            times.append(time.perf_counter())
        print("result", json.dumps(np.diff(times).tolist()), flush=True)


def bandwidth(threads: int) -> float:
    """Bytes per second that so many threads read from memory: dot products of arrays far larger than the caches."""
    from concurrent.futures import ThreadPoolExecutor

    arrays = [np.ones(1 << 26, np.float32) for _ in range(threads)]
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(5):
            started = time.perf_counter()
            list(pool.map(lambda array: float(array @ array), arrays))
            best = max(best, sum(array.nbytes for array in arrays) / (time.perf_counter() - started))
    return best


def bytes_per_token(folder: Path) -> int:
    """Weights that a decode step reads: all but what is only looked up."""
    import onnx

    model = onnx.load(folder / "model.onnx", load_external_data=False)
    used = {name for node in model.graph.node if "Gather" not in node.op_type for name in node.input}
    reshaped = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "Reshape"}
    used = {reshaped.get(name, name) for name in used}
    sizes = {
        tensor.name: int(next(item.value for item in tensor.external_data if item.key == "length"))
        for tensor in model.graph.initializer
        if tensor.data_location == onnx.TensorProto.EXTERNAL
    }
    return sum(size for name, size in sizes.items() if name in used and not name.startswith(("cosines", "sines")))


class Worker:
    """A contender in a process of its own."""

    def __init__(self, kind: str, path: Path, threads: int) -> None:
        command = [sys.executable, __file__, "--worker", kind, str(path), str(threads)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        self._read("ready")

    def run(self) -> list[float]:
        assert self._process.stdin
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        found: list[float] = json.loads(self._read("result"))
        return found

    def close(self) -> None:
        self._process.kill()

    def _read(self, word: str) -> str:
        assert self._process.stdout
        for line in self._process.stdout:
            if line.startswith(word):
                return line.removeprefix(word)
        raise SystemExit(f"{self._process.args} ended")


def prepare(model: Path, folder: Path) -> dict[str, tuple[str, Path]]:
    """Builds what is not there yet: name → kind of contender and its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    lowered = {"int4": TARGET, **{name: GGUF.format(name) for name in ("q4_k_m", "q4_0")}}
    for name, text in lowered.items():
        target = folder / f"{name}.yaml"
        target.write_text(text, encoding="utf-8")
        if not (folder / name).exists():
            command = ["lower", "--base", model / "base", "--adapter", model / "adapter", "--target", target]
            command += ["--out", folder / f"{name}.out"]
            subprocess.run([sys.executable, "-m", "lora2edge", *map(str, command)], check=True)
            (artifact,) = (folder / f"{name}.out" / "artifacts").iterdir()
            (folder / name).symlink_to(artifact)
    if not (folder / "merged").exists():
        merge(model, folder / "merged")
    for name, more in (("builder", ()), ("builder-fused", ("fuse_mlp_gate_up=true",))):
        if not (folder / name).exists():
            command = builder(folder / "merged", folder / name, folder / "cache", *more)
            subprocess.run(command, check=True, capture_output=True)
    return {
        "ours": ("genai", folder / "int4"),
        "builder": ("genai", folder / "builder"),
        "builder, gate and up fused": ("genai", folder / "builder-fused"),
        "ours, own session": ("artifact", folder / "int4"),
        "PyTorch bf16, live adapter": ("live", model),
        "llama.cpp Q4_K_M": ("artifact", folder / "q4_k_m"),
        "llama.cpp Q4_0": ("artifact", folder / "q4_0"),
    }


def interval(ratios: np.ndarray) -> dict[str, float]:
    """Median of the rounds' ratios with a bootstrap interval of 95 %."""
    drawn = np.random.default_rng(0).choice(ratios, (4000, len(ratios)))
    low, high = np.percentile(np.median(drawn, axis=1), [2.5, 97.5])
    return {"median": float(np.median(ratios)), "low": float(low), "high": float(high)}


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        work(sys.argv[2], sys.argv[3], int(sys.argv[4]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", nargs="+")
    parser.add_argument("--results", type=Path)
    arguments = parser.parse_args()
    contenders = prepare(arguments.model, arguments.work)
    if arguments.only:
        contenders = {name: contenders[name] for name in ["ours", *arguments.only]}
    workers = {name: Worker(kind, path.resolve(), arguments.threads) for name, (kind, path) in contenders.items()}
    prefill: dict[str, list[float]] = {name: [] for name in workers}
    decode: dict[str, list[float]] = {name: [] for name in workers}
    roofs = []
    try:
        for worker in workers.values():
            worker.run()
        for turn in range(arguments.rounds):
            for name in (
                np.random.default_rng(turn).permutation(list(workers)).tolist()
            ):  # no one always follows another
                first, *rest = workers[name].run()
                prefill[name].append(PREFILL / first)
                decode[name].append(1 / float(np.median(rest)))
            roofs.append(bandwidth(arguments.threads))
    finally:
        for worker in workers.values():
            worker.close()
    touched = bytes_per_token(arguments.work / "int4")
    roof = float(np.max(roofs)) / touched
    result: dict[str, Any] = {
        "command": "benchmarks/onnx_speed.py",
        "threads": arguments.threads,
        "rounds": arguments.rounds,
        "prompt_tokens": PREFILL,
        "new_tokens": DECODE,
        "bytes_per_token": touched,
        "bandwidth": {"best": max(roofs), "median": float(np.median(roofs))},
        "share_of_roof": {
            "median_step": float(np.median(decode["ours"])) / roof,
            "best_round": max(decode["ours"]) / roof,
        },
        "contenders": {},
    }
    for name in workers:
        told: dict[str, Any] = {}
        for what, rates in (("prefill", prefill), ("decode", decode)):
            told[what] = {
                "tokens_per_second": float(np.median(rates[name])),
                "ours_to_it": interval(np.array(rates["ours"]) / np.array(rates[name])),
            }
        result["contenders"][name] = told
        print(f"{name:28}", *(
            f"{what} {told[what]['tokens_per_second']:7.1f}/s, ours to it {told[what]['ours_to_it']['median']:5.2f}"
            f" [{told[what]['ours_to_it']['low']:.2f}, {told[what]['ours_to_it']['high']:.2f}]"
            for what in told
        ), flush=True)  # fmt: skip
    share = result["share_of_roof"]["median_step"]
    print(f"{touched / 1e6:.0f} MB a token, roof {roof:.1f}/s, median step at {share:.0%}")
    if arguments.results:
        write_results(arguments.results, result)


if __name__ == "__main__":
    main()
