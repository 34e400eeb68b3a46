"""GGUF files with GPTQ's codes against `llama-quantize` with the same importance matrix, at the same bytes.

Usage: python benchmarks/gguf_rounding.py BASE ADAPTER CALIBRATION TEST --tools BIN --work FOLDER [--results FILE]

BIN is the folder of build_peers.sh. For each file type, with the mixture's own types and with embedding and head held
at 16 bits on both sides: our file with `rounding: gptq`, our file with `rounding: llama.cpp`, and llama-quantize's of
our merged float32 GGUF with our imatrix.gguf. Our llama.cpp file must equal llama-quantize's byte for byte, and all
three must have tensors of the same types and bytes. Each is then opened by the same llama.cpp, and compared with the
live adapter on the same test tokens; intervals are of 95 %, over test samples. `weights_only` is measured on the same
weights stored in float32: without the rounding of activations that llama.cpp's kernels do, which both sides share. At
last an unmodified llama-perplexity opens our file: its perplexity stands beside ours over the same tokens.

FOLDER keeps what was built: a second run measures again and builds nothing.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from measure import write_results
from quality import Measured

from lora2edge.backends.gguf import MODEL_FILE
from lora2edge.backends.gguf.container import read_header
from lora2edge.backends.gguf.model import plan_model
from lora2edge.backends.gguf.session import GgufSession, open_session
from lora2edge.checkpoint import open_checkpoint
from lora2edge.quality.divergence import Divergence, log_softmax
from lora2edge.recipe import DataFiles
from lora2edge.target import Target
from lora2edge.tasks.language import ANSWER_TOKENS

TYPES = ("q4_0", "q4_k_m", "q5_k_m", "q6_k")
CHUNK = 256
"""Context of llama-perplexity."""
ATTEMPTS = 20
"""llama-perplexity writes its log from another thread, and at times exits before the last line, the result."""


@dataclass(frozen=True)
class Setting:
    """One file type, and what its embedding and head are stored in."""

    precision: str
    ends: str
    """`mixture` (llama.cpp's choice) or `f16`."""
    tied: bool
    """Whether embedding and head are one tensor."""

    @property
    def name(self) -> str:
        return f"{self.precision}, ends {self.ends}"

    def target(self, rounding: str) -> Target:
        keys = ("output_tensor_type",) if self.tied else ("output_tensor_type", "token_embedding_type")
        ends = dict.fromkeys(keys, "f16") if self.ends == "f16" else {}
        name = f"{rounding}-{self.precision}-{self.ends}"
        return Target(name=name, backend="gguf", precision=self.precision, options={"rounding": rounding, **ends})

    def quantize(self, tools: Path, merged: Path, imatrix: Path, out: Path) -> None:
        """The same file by llama.cpp's own tool."""
        ends = ["--output-tensor-type", "f16", "--token-embedding-type", "f16"] if self.ends == "f16" else []
        command = [tools / "llama-quantize", "--imatrix", imatrix, *ends, merged, out, self.precision.upper(), "1"]
        _run(command)


class Bench(Measured):
    """One model, and llama.cpp's tools."""

    def __init__(self, arguments: argparse.Namespace, settings: Sequence[Setting]) -> None:
        self.tools: Path = arguments.tools
        self.as_run_only: bool = arguments.as_run_only
        merged = Target(name="merged-f32", backend="gguf", precision="f32")
        data = DataFiles(calibration=str(arguments.calibration), test=str(arguments.test))
        targets = [setting.target(rounding) for setting in settings for rounding in ("gptq", "llama.cpp")]
        super().__init__(arguments.base, arguments.adapter, data, [merged, *targets], arguments.work, arguments.threads)
        self.merged = self.lower(merged).path / MODEL_FILE

    def open(self, path: Path) -> GgufSession:
        longest = max(CHUNK, *(len(sample.ids) for sample in self.texts.test)) + ANSWER_TOKENS
        return open_session(path, device="cpu", threads=self.threads, slots=1, max_length=longest)

    def diverge(self, path: Path, *, weights_only: bool = False) -> Divergence:
        """The file's distance from the live adapter on the test text; with `weights_only`, stored in float32."""
        if weights_only:
            wide = self.work / "wide.gguf"
            _run([self.tools / "llama-quantize", "--allow-requantize", path, wide, "F32", "1"])
            try:
                return self.diverge(wide)
            finally:
                wide.unlink()
        with self.open(path) as session:
            return self.divergence(session)

    def run(self, setting: Setting) -> dict[str, Any]:
        """Builds the three files of a setting and compares them."""
        ours, plain = (self.lower(setting.target(rounding)) for rounding in ("gptq", "llama.cpp"))
        paths = {"gptq": ours.path / MODEL_FILE, "llama.cpp": plain.path / MODEL_FILE}
        peer = self.work / f"llama-quantize-{setting.precision}-{setting.ends}.gguf"
        setting.quantize(self.tools, self.merged, plain.path / "imatrix.gguf", peer)
        layout = layout_of(peer)
        for name, path in paths.items():
            if layout_of(path) != layout:
                raise SystemExit(f"{setting.name}: rounding {name} and llama-quantize store tensors differently")
        if tensor_data(paths["llama.cpp"]) != tensor_data(peer):
            raise SystemExit(f"{setting.name}: rounding llama.cpp gives other bytes than llama-quantize")

        files = {"gptq": paths["gptq"], "llama-quantize": peer}
        result: dict[str, Any] = {
            "precision": setting.precision,
            "ends": setting.ends,
            "tensor_types": dict(Counter(kind for kind, _ in layout.values())),
            "tensor_bytes": sum(size for _, size in layout.values()),
            "file_bytes": {name: path.stat().st_size for name, path in files.items()},
            "rounding_llama_cpp_equals_llama_quantize": True,
            "rounding": ours.result["notes"]["rounding"],
            "lowering": {
                name: {key: lowered.result[key] for key in ("seconds", "cpu_seconds", "peak_rss_bytes")}
                for name, lowered in (("gptq", ours), ("llama.cpp", plain))
            },
        }
        for kind in ("as_run",) if self.as_run_only else ("as_run", "weights_only"):
            found = {name: self.diverge(path, weights_only=kind == "weights_only") for name, path in files.items()}
            result[kind] = {
                **{name: self.figures(divergence) for name, divergence in found.items()},
                **self.compared(found["gptq"], found["llama-quantize"]),
            }
        result["perplexity"] = self.perplexities(paths["gptq"])
        peer.unlink()
        return result

    def perplexities(self, path: Path) -> dict[str, Any]:
        """Perplexity over the test responses as one text: by llama-perplexity, and by our session of the same file.

        llama-perplexity cuts the text's tokens into chunks and scores what the second half of each chunk predicts.
        """
        text = self.work / "responses.txt"
        text.write_text("\n\n".join(sample.item.response.strip() for sample in self.texts.test), encoding="utf-8")
        command = [self.tools / "llama-perplexity", "-m", path, "-f", text, "-c", CHUNK, "-b", CHUNK]
        for _ in range(ATTEMPTS):
            said = _run([*command, "-t", self.threads])
            final, counted = re.search(r"PPL = ([\d.]+)", said), re.search(r"perplexity over (\d+) chunks", said)
            if final and counted:
                break
        else:
            raise SystemExit(f"llama-perplexity gave no perplexity\n{said[-2000:]}")
        with self.open(path) as session:
            ids = session.tokenize(text.read_text(encoding="utf-8"), special=False)
            chunks = [ids[start : start + CHUNK] for start in range(0, len(ids) - CHUNK + 1, CHUNK)]
            scored = range(CHUNK // 2, CHUNK - 1)
            nll = 0.0
            for chunk, logits in zip(chunks, session.logits(chunks, [scored] * len(chunks)), strict=True):
                next_ids = np.array(chunk[scored.start + 1 : scored.stop + 1])
                nll -= float(log_softmax(logits)[np.arange(len(next_ids)), next_ids].sum())
        if len(chunks) != int(counted[1]):
            raise SystemExit(f"llama-perplexity scored {counted[1]} chunks, we {len(chunks)}: other tokens")
        ours, theirs = float(np.exp(nll / (len(chunks) * len(scored)))), float(final[1])
        return {
            "tokens": len(chunks) * len(scored),
            "lora2edge": ours,
            "llama-perplexity": theirs,
            "relative_difference": abs(ours / theirs - 1),
        }


def layout_of(path: Path) -> dict[str, tuple[str, int]]:
    """Tensor name → type and bytes."""
    return {item.name: (item.type, item.size_bytes) for item in read_header(path).values()}


def tensor_data(path: Path) -> dict[str, bytes]:
    data = path.read_bytes()
    return {item.name: data[item.offset : item.offset + item.size_bytes] for item in read_header(path).values()}


def _run(command: Sequence[object]) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{command[0]} exited {done.returncode}\n{(done.stdout + done.stderr)[-2000:]}")
    return done.stdout + done.stderr


def _line(setting: Setting, result: dict[str, Any]) -> str:
    run = result["as_run"]
    ours, peer, ratio = run["gptq"], run["llama-quantize"], run["kl_ratio"]
    weights = f", weights only {result['weights_only']['kl_ratio']['value']:.2f}" if "weights_only" in result else ""
    return (
        f"{setting.name}: KL {ours['kl_mean']['value']:.2e} / {peer['kl_mean']['value']:.2e}"
        f" = {ratio['value']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]{weights};"
        f" flips {ours['flips']['value']:.2%} / {peer['flips']['value']:.2%};"
        f" perplexity differs by {result['perplexity']['relative_difference']:.2%}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("base", "adapter", "calibration", "test"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--tools", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--types", nargs="+", default=list(TYPES))
    parser.add_argument("--ends", nargs="+", choices=["mixture", "f16"], default=["mixture", "f16"])
    parser.add_argument("--as-run-only", action="store_true", help="leaves out weights_only, half of the time")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path)
    arguments = parser.parse_args()
    if not shutil.which(str(arguments.tools / "llama-quantize")):
        parser.error(f"{arguments.tools} holds no llama-quantize: benchmarks/build_peers.sh makes it")
    base = open_checkpoint(arguments.base)
    tied = all(tensor.name != "output.weight" for tensor in plan_model(base.config, base.tensors).tensors)
    settings = [Setting(precision, ends, tied) for ends in arguments.ends for precision in arguments.types]
    bench = Bench(arguments, settings)
    floor = bench.diverge(bench.merged)
    found: dict[str, Any] = {
        "command": "benchmarks/gguf_rounding.py",
        "parameters": bench.plan.parameters,
        "calibration_tokens": bench.calibration.result["tokens"],
        "test_samples": len(bench.texts.test),
        "test_tokens": floor.positions,
        "gain": bench.gain,
        "merged_f32": bench.figures(floor),
        "settings": [],
    }
    print(f"{floor.positions} test tokens, gain {bench.gain['value']:.3f}, KL of the float32 file {floor.kl_mean:.2e}")
    for setting in settings:
        result = bench.run(setting)
        found["settings"].append(result)
        print(_line(setting, result), flush=True)
        if arguments.results:
            write_results(arguments.results, found)


if __name__ == "__main__":
    main()
