"""Quantizes one checkpoint by one method, in the interpreter that has the method: a process of gptq_vs_peers.py.

Usage: PYTHON benchmarks/gptq_methods.py METHOD CHECKPOINT SAMPLES OUT [--settings JSON] [--check]

SAMPLES is a JSON list of lists of token ids. All linear layers but the output head get symmetric integers. The figures
that the method itself can tell apart (loading, quantizing, saving) go to OUT/steps.json. With --check the finished
checkpoint in OUT is opened with the method's own library instead, and what that dequantizes is written to
OUT/library.safetensors.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

STEPS: dict[str, float] = {}


@contextmanager
def timed(step: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    STEPS[f"{step}_s"] = time.perf_counter() - started


def gptqmodel(checkpoint: str, samples: list[list[int]], out: Path, settings: dict[str, Any]) -> None:
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # before its thread pool exists: with 2 cores it stops at 1
    os.chdir(out.parent)  # it writes ./logs
    with timed("import"):
        import torch
        from gptqmodel import GPTQModel, QuantizeConfig
    torch.set_num_threads(settings.pop("threads"))
    dtype, batch = getattr(torch, settings.pop("dtype")), settings.pop("batch")
    config = QuantizeConfig(
        bits=4, sym=True, damp_percent=settings.pop("damping"), group_size=settings.pop("group"), device="cpu",
        offload_to_disk=False, pack_impl="original", **settings,
    )  # fmt: skip
    with timed("load"):
        model = GPTQModel.load(checkpoint, config, dtype=dtype)
    with timed("quantize"):
        model.quantize([{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in samples], batch_size=batch)
    with timed("save"):
        model.save(str(out))


def gptqmodel_check(out: Path) -> dict[str, Any]:
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    os.chdir(out.parent)
    import torch
    from gptqmodel import BACKEND, GPTQModel

    model = GPTQModel.load(str(out), device="cpu", backend=BACKEND.GPTQ_TORCH, dtype=torch.float16).model
    modules = {name: module for name, module in model.named_modules() if hasattr(module, "dequantize_weight")}
    return {f"{name}.weight": module.dequantize_weight().T.float().contiguous() for name, module in modules.items()}


def llm_compressor(checkpoint: str, samples: list[list[int]], out: Path, settings: dict[str, Any]) -> None:
    os.chdir(out.parent)
    with timed("import"):
        import torch
        from datasets import Dataset
        from llmcompressor import oneshot
        from llmcompressor.modifiers.gptq import GPTQModifier
        from transformers import AutoModelForCausalLM, AutoTokenizer
    torch.set_num_threads(settings.pop("threads"))
    batch, group = settings.pop("batch"), settings.pop("group")
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": group}
    if "observer" in settings:
        weights["observer"] = settings.pop("observer")
    data = Dataset.from_dict({"input_ids": samples, "attention_mask": [[1] * len(ids) for ids in samples]})
    with timed("load"):
        dtype = getattr(torch, settings.pop("dtype"))
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    with timed("quantize"):
        modifier = GPTQModifier(
            config_groups={"group_0": {"targets": ["Linear"], "weights": weights}},
            ignore=["lm_head"],
            dampening_frac=settings.pop("damping"),
            **settings,
        )
        oneshot(
            model=model, dataset=data, recipe=[modifier], processor=tokenizer, batch_size=batch,
            max_seq_length=max(map(len, samples)), num_calibration_samples=len(samples),
        )  # fmt: skip
    with timed("save"):
        model.save_pretrained(out, save_compressed=True)


def llm_compressor_check(out: Path) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    config = CompressedTensorsConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, quantization_config=config)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    return {f"{name}.weight": module.weight.data.float() for name, module in linears.items() if "lm_head" not in name}


def lora2edge(checkpoint: str, samples: list[list[int]], out: Path, settings: dict[str, Any]) -> None:
    with timed("import"):
        import numpy as np
        import torch  # noqa: F401
        from safetensors.numpy import save_file

        from lora2edge.backends.layerwise import OPTIONS, round_layers
        from lora2edge.calibration import calibrate
        from lora2edge.checkpoint import open_checkpoint
        from lora2edge.contracts import Item, Sample
        from lora2edge.progress import SILENT
        from lora2edge.quantize import Factor, IntGrid, RoundingLog, fit_mse, fit_range, gptq_codes

    group, grid = settings["group"], settings.get("grid", "importance")
    for folder in ("calibration", "rounding"):
        (out / folder).mkdir()
    empty = Item(({"role": "user", "content": ""}, {"role": "assistant", "content": ""}))

    class Int4:
        """Implements layerwise.Encoder: of each row the scales in float16, then a byte a code."""

        def encode(self, name: str, weights: Any, factor: Factor, log: RoundingLog) -> Any:
            if grid == "range":
                steps = fit_range(weights, 4, group, scale_dtype="float16")
            else:
                importance = factor.importance if grid == "importance" else None
                steps = fit_mse(weights, 4, group, scale_dtype="float16", importance=importance)
            log.add(name, steps.affine, factor)
            scales = steps.scales.astype(np.float16).view(np.uint8)
            return np.concatenate([scales, gptq_codes(weights, steps.affine, factor)], axis=1)

        def decode(self, name: str, data: Any) -> Any:
            groups = -(-view.tensors[name].shape[1] // group)
            scales = np.ascontiguousarray(data[:, : 2 * groups]).view(np.float16).astype(np.float32)
            zeros = np.full(scales.shape, 8, np.uint8)
            return IntGrid(4, scales, zeros, group).values(data[:, 2 * groups :])

        def embedding(self, rows: Any) -> Any:
            return rows

    with timed("load"):
        view = open_checkpoint(Path(checkpoint))
    with timed("calibrate"):
        calibration = calibrate(
            view, [Sample(tuple(ids), 0, empty) for ids in samples], out / "calibration", SILENT,
            device="cpu", threads=settings["threads"], dtype=settings["dtype"], layer_inputs=True,
        )  # fmt: skip
    names = [name for name in calibration.names if "lm_head" not in name and "embed" not in name]
    options = replace(OPTIONS, damping=settings["damping"], activation_order=settings.get("activation_order", True))
    with timed("quantize"):
        rounded = round_layers(
            view, calibration, names, Int4(), out / "rounding", SILENT,
            feedback=settings.get("feedback", True), options=options,
        )  # fmt: skip
    with timed("save"):
        int4 = Int4()
        found = {name: int4.decode(name, rounded.rows(name, 0, view.tensors[name].shape[0])) for name in names}
        save_file(found, out / "dequantized.safetensors")
    (out / "log.json").write_text(json.dumps(rounded.log.to_json()), encoding="utf-8")


METHODS = {"lora2edge": lora2edge, "gptqmodel": gptqmodel, "llm-compressor": llm_compressor}
CHECKS = {"gptqmodel": gptqmodel_check, "llm-compressor": llm_compressor_check}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("samples", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--settings", type=json.loads, default={})
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    if arguments.check:
        from safetensors.torch import save_file

        save_file(CHECKS[arguments.method](out), out / "library.safetensors")
        return
    samples = json.loads(arguments.samples.read_text(encoding="utf-8"))
    out.mkdir(parents=True)
    METHODS[arguments.method](str(arguments.checkpoint.resolve()), samples, out, arguments.settings)
    (out / "steps.json").write_text(json.dumps(STEPS), encoding="utf-8")


if __name__ == "__main__":
    main()
