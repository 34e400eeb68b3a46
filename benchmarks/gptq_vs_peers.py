"""GPTQ to int4: lora2edge against GPT-QModel and llm-compressor, on the same checkpoint and the same token ids.

Usage: python benchmarks/gptq_vs_peers.py --base DIR --adapter DIR --data JSONL [JSONL] --gptqmodel PYTHON
           --llm-compressor PYTHON [--samples 128] [--seeds 1 2 3] [--results FILE]

The adapter is merged into a 16-bit checkpoint, which all start from. A seed draws the calibration samples. Every method
runs in a process of its own, in the interpreter that has it (gptq_methods.py); all round every linear layer but the
output head to symmetric int4. One evaluator that knows nothing of the methods' libraries unpacks the checkpoints, puts
the weights into the float32 model and takes KL(16-bit || int4) over all answer tokens of the test text. With the first
seed what it unpacks is compared with what each peer's own library makes of its file.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from measure import Cost, run_chain, write_results

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lora2edge.texts import Texts

    Weights = Mapping[str, NDArray[Any]]

OURS, GPTQMODEL, LLM_COMPRESSOR = "lora2edge", "gptqmodel", "llm-compressor"
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora2edge": (OURS, {}),
    "lora2edge, mse": (OURS, {"grid": "mse"}),
    "lora2edge, range": (OURS, {"grid": "range"}),
    "lora2edge, no activation order": (OURS, {"activation_order": False}),
    "lora2edge, 16-bit inputs": (OURS, {"feedback": False}),
    "gptqmodel": (GPTQMODEL, {}),
    "gptqmodel, desc_act + static_groups": (GPTQMODEL, {"desc_act": True, "static_groups": True}),
    "gptqmodel, mse": (GPTQMODEL, {"desc_act": True, "static_groups": True, "mse": 2.4}),
    "gptqmodel, GPTAQ": (GPTQMODEL, {"desc_act": True, "static_groups": True, "gptaq": {}}),
    "llm-compressor": (LLM_COMPRESSOR, {}),
    "llm-compressor, no actorder": (LLM_COMPRESSOR, {"actorder": None}),
    "llm-compressor, mse": (LLM_COMPRESSOR, {"observer": "memoryless_mse"}),
}
"""llm-compressor's default order of columns is `actorder=static`. Ours fits steps with the inputs' mean squares."""
PLAIN = ("gptqmodel", "gptqmodel, desc_act + static_groups", "llm-compressor", "llm-compressor, no actorder")
"""What the ratio is taken against; the other peers choose their steps by a search, or aim as ours does."""
_NIBBLES = np.arange(0, 32, 4, dtype=np.uint32)
_HALF = 2.0**-11
"""Relative step of float16, in which gptqmodel's own kernel unpacks."""


def unpacked(folder: Path) -> dict[str, NDArray[np.float32]]:
    """The quantized weights of a checkpoint as float32, from the formats' definitions."""
    from safetensors.numpy import load_file

    if (folder / "dequantized.safetensors").is_file():
        return dict(load_file(folder / "dequantized.safetensors"))
    stored = load_file(folder / "model.safetensors")
    paths = [name.rpartition(".") for name in stored]
    found = {path: _gptq(stored, path) for path, _, key in paths if key == "qweight"}
    found |= {path: _compressed_tensors(stored, path) for path, _, key in paths if key == "weight_packed"}
    return {f"{path}.weight": np.ascontiguousarray(values, np.float32) for path, values in found.items()}


def _gptq(stored: Weights, path: str) -> NDArray[Any]:
    """GPTQ v1: eight input channels an int32, zeros stored less 1."""
    packed, zeros = (stored[f"{path}.{key}"].view(np.uint32) for key in ("qweight", "qzeros"))
    codes = (packed[:, None, :] >> _NIBBLES[:, None] & 15).reshape(-1, packed.shape[1]).astype(np.int32)
    zero = (zeros[:, :, None] >> _NIBBLES & 15).reshape(len(zeros), -1).astype(np.int32) + 1
    group = stored[f"{path}.g_idx"]
    values: NDArray[Any] = (codes - zero[group]) * stored[f"{path}.scales"].astype(np.float32)[group]
    return values.T


def _compressed_tensors(stored: Weights, path: str) -> NDArray[Any]:
    """pack-quantized, symmetric: eight input channels an int32, codes stored plus 8."""
    rows, columns = stored[f"{path}.weight_shape"]
    codes = stored[f"{path}.weight_packed"].view(np.uint32)[:, :, None] >> _NIBBLES & 15
    scales = stored[f"{path}.weight_scale"]
    steps = codes.reshape(rows, -1)[:, :columns].astype(np.int32) - 8
    values: NDArray[Any] = steps * np.repeat(scales, columns // scales.shape[1], axis=1)
    return values


def check_unpacking(python: str, command: list[str], out: Path) -> float:
    """Largest difference between our unpacking and the library's own, over the largest weight of the matrix."""
    from safetensors.numpy import load_file

    subprocess.run([python, *command, "--check"], check=True, capture_output=True)
    ours, theirs = unpacked(out), load_file(out / "library.safetensors")
    if ours.keys() != theirs.keys():
        raise RuntimeError(f"{out}: {len(ours)} matrices unpacked, the library finds {len(theirs)}")
    worst = max(float(np.abs(ours[name] - theirs[name]).max() / np.abs(ours[name]).max()) for name in ours)
    if worst > _HALF:
        raise RuntimeError(f"{out}: unpacked weights differ by {worst:.1e} from the library's own")
    return worst


class Evaluator:
    """The 16-bit checkpoint in float32, and its answers' distributions."""

    def __init__(self, checkpoint: Path, texts: Texts) -> None:
        from transformers import AutoModelForCausalLM

        self._model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="float32").eval()
        self._samples = texts.test
        self._original = {name: value.clone() for name, value in self._model.state_dict().items()}
        self._reference = list(self._log_probabilities())
        self.tokens = sum(map(len, self._reference))

    def compare(self, weights: Weights) -> dict[str, float]:
        """KL in nats a token, mean and 99th percentile, and the share of tokens whose most probable one is another."""
        import torch

        linears = {f"{at}.weight" for at, module in self._model.named_modules() if isinstance(module, torch.nn.Linear)}
        if weights.keys() != linears - {"lm_head.weight"}:
            raise RuntimeError(f"{len(weights)} matrices are quantized, the model has {len(linears)} with its head")
        state = self._model.state_dict()
        for name, value in self._original.items():
            state[name].copy_(torch.from_numpy(weights[name].copy()) if name in weights else value)
        kl, flips = [], []
        for reference, found in zip(self._reference, self._log_probabilities(), strict=True):
            reference, found = reference.double(), found.double()
            kl.append((reference.exp() * (reference - found)).sum(-1))
            flips.append((reference.argmax(-1) != found.argmax(-1)).double())
        every = torch.cat(kl)
        return {
            "kl_mean": float(every.mean()),
            "kl_p99": float(every.quantile(0.99)),
            "flips": float(torch.cat(flips).mean()),
        }

    def _log_probabilities(self) -> Iterator[Any]:
        import torch

        for sample in self._samples:
            with torch.inference_mode():
                logits = self._model(input_ids=torch.tensor([sample.ids[:-1]]), use_cache=False).logits[0]
            yield torch.log_softmax(logits[sample.positions.start : sample.positions.stop], -1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--adapter", type=Path, required=True)
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="one file, or calibration and test")
    parser.add_argument("--gptqmodel", metavar="PYTHON", help="its interpreter; without, it is left out")
    parser.add_argument("--llm-compressor", metavar="PYTHON", help="its interpreter; without, it is left out")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--samples", type=int, default=128, help="calibration samples a seed draws")
    parser.add_argument("--length", type=int, help="cut samples of all calibration text joined, each of so many tokens")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--test-tokens", type=int, default=20000)
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--damping", type=float, default=0.01)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the methods' passes")
    parser.add_argument("--batch", type=int, default=1, help="samples the peers run at a time")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--costs-only", action="store_true", help="of random weights: nothing is evaluated")
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    pythons = {OURS: sys.executable, GPTQMODEL: options.gptqmodel, LLM_COMPRESSOR: options.llm_compressor}
    chosen = {name: METHODS[name] for name in options.methods if pythons[METHODS[name][0]]}
    environment = {"OMP_NUM_THREADS": str(options.threads), "OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1"}
    os.environ.update(environment)
    common = {name: getattr(options, name) for name in ("threads", "dtype", "batch", "damping", "group")}
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(1, spawn) as small:
        # Linux counts what a process' parent held into its peak, and this one holds a model.
        small.submit(os.getpid).result()
        scratch = Path(folder)
        checkpoint = scratch / "merged"
        run_chain([[sys.executable, "-m", "lora2edge", "merge", "--base", str(options.base), "--adapter",
                    str(options.adapter), "--out", str(checkpoint)]])  # fmt: skip
        texts = read_texts(checkpoint, options.data, options.test_tokens)
        evaluator = None if options.costs_only else Evaluator(checkpoint, texts)
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in chosen}
        checked = {}
        tokens = []
        for seed in options.seeds:
            drawn = draw(texts, seed, options.samples, options.length)
            tokens.append(sum(map(len, drawn)))
            samples = scratch / f"samples-{seed}.json"
            samples.write_text(json.dumps(drawn), encoding="utf-8")
            for place, (name, (method, settings)) in enumerate(chosen.items()):
                out = scratch / f"{seed}-{place}"
                command = [str(Path(__file__).with_name("gptq_methods.py")), method, str(checkpoint), str(samples),
                           str(out)]  # fmt: skip
                chain = [[pythons[method], *command, "--settings", json.dumps({**common, **settings})]]
                cost = small.submit(run_chain, chain).result()
                run: dict[str, Any] = {"seed": seed, **asdict(cost), **json.loads((out / "steps.json").read_bytes())}
                if method != OURS and seed == options.seeds[0]:
                    checked[name] = check_unpacking(pythons[method], command, out)
                if evaluator:
                    run |= evaluator.compare(unpacked(out))
                runs[name].append(run)
                report(name, run, cost)
            if options.results:  # after every seed: a run takes hours on a larger model
                settings = {**common, "samples": options.samples, "calibration_tokens": tokens}
                found: dict[str, Any] = {
                    "command": "benchmarks/gptq_vs_peers.py",
                    "settings": settings,
                    "methods": summarize(runs),
                }
                if evaluator:
                    found |= {
                        "test_tokens": evaluator.tokens,
                        "unpacking_differs_by": checked,
                        **ratio(found["methods"]),
                    }
                write_results(options.results, {**found, "runs": runs})
    summary = summarize(runs)
    print(json.dumps({**summary, **({} if options.costs_only else ratio(summary))}, indent=2))


def read_texts(checkpoint: Path, files: list[Path], test_tokens: int) -> Texts:
    from lora2edge.checkpoint import open_checkpoint
    from lora2edge.recipe import DataFiles
    from lora2edge.texts import Renderer, load_texts

    data = str(files[0]) if len(files) == 1 else DataFiles(calibration=str(files[0]), test=str(files[1]))
    renderer = Renderer(open_checkpoint(checkpoint).tokenizer)
    return load_texts(data, renderer, max_length=1024, calibration_tokens=2**40, test_tokens=test_tokens)


def draw(texts: Texts, seed: int, count: int, length: int | None) -> list[list[int]]:
    """`count` samples; with `length`, stretches of so many tokens of all of them in a drawn order."""
    pool = random.Random(seed).sample(texts.calibration, len(texts.calibration))
    if length is None:
        return [list(sample.ids) for sample in pool[:count]]
    joined = [token for sample in pool for token in sample.ids]
    joined *= -(-count * length // len(joined))
    return [joined[start : start + length] for start in range(0, count * length, length)]


def report(name: str, run: Mapping[str, Any], cost: Cost) -> None:
    quality = f"KL {run['kl_mean']:.3e}  flips {run['flips']:.2%}" if "kl_mean" in run else ""
    print(f"seed {run['seed']} {name:36} {quality} {cost.wall_s:7.1f} s wall {cost.cpu_s:7.1f} s cpu "
          f"{cost.peak_rss_bytes / 1e6:6.0f} MB", flush=True)  # fmt: skip


def summarize(runs: Mapping[str, list[dict[str, Any]]]) -> dict[str, dict[str, float]]:
    """Means over the seeds; of memory the most."""
    summary: dict[str, dict[str, float]] = {}
    for name, found in runs.items():
        means = {key: float(np.mean([run[key] for run in found])) for key in found[0] if key != "seed"}
        summary[name] = {**means, "peak_rss_bytes": max(run["peak_rss_bytes"] for run in found)}
    return summary


def ratio(summary: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """Our mean KL over that of the best of the peers' plain methods, and of all of theirs."""
    found: dict[str, Any] = {}
    for key, names in (("plain", PLAIN), ("any", [name for name, (method, _) in METHODS.items() if method != OURS])):
        present = {name: summary[name]["kl_mean"] for name in names if name in summary}
        if OURS in summary and present:
            best = min(present, key=lambda name: present[name])
            found[f"kl_ratio_to_best_{key}_peer"] = summary[OURS]["kl_mean"] / present[best]
            found[f"best_{key}_peer"] = best
    return found


if __name__ == "__main__":
    main()
