"""A made-up report with everything in it: passes, misses, an error, Chinese labels, figures that were not taken."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

KINDS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
         "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # fmt: skip
LAYERS = 24


def sample_report() -> dict[str, Any]:
    """A fresh copy each time, as a program reads it from report.json."""
    random = np.random.default_rng(3)
    targets = {
        "gguf/q8_0": _target(random, "pass", 531_068_480, 6.1e-4, (0.998, 0.994, 1.002), 0.004, 0.941, 1.62, "Q8_0"),
        "gguf/q4_k_m": _target(random, "pass", 397_808_192, 0.0231, (0.971, 0.958, 0.984), 0.034, 0.929, 2.31, "Q4_K"),
        "gguf/q2_k": _target(random, "fail", 338_607_680, 0.412, (0.583, 0.541, 0.622), 0.197, 0.702, 2.52, "Q2_K"),
        "edge-box": _failed(),
    }
    targets["gguf/q2_k"]["quality"]["accuracy_by"]["lang"] = {"en": 0.801, "zh": 0.603}
    targets["gguf/q2_k"]["speed"] = None
    targets["gguf/q2_k"]["speed_reason"] = "--skip bench was given"
    targets["gguf/q2_k"]["peak_rss_bytes"] = None
    targets["gguf/q2_k"]["tokenizer"] = {"own_texts": 1452, "probes": 41, "differences": []}
    targets["gguf/q8_0"]["reused"] = {"lower": True, "quality": True, "speed": False}
    targets["gguf/q8_0"]["measured_at"]["quality"] = "2026-11-20T17:02:11+00:00"
    report = {
        "schema": 1,
        "lora2edge": "0.1.0",
        "verdict": "fail",
        "exit_code": 3,
        "command": "lora2edge build --base ./qwen2.5-0.5b --adapter ./ward-adapter --data ward.jsonl "
        "--target gguf/q8_0 --target gguf/q4_k_m --target gguf/q2_k --target edge-box.yaml --out ward-build",
        "started_at": "2026-11-21T09:14:03+00:00",
        "seconds": 1834.2,
        "machine": {
            "cpu": "AMD EPYC 9474F 48-Core Processor",
            "architecture": "x86_64",
            "physical_cores": 16,
            "logical_cores": 32,
            "cpu_limit": 16.0,
            "cpu_flags": ["avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16"],
            "ram_bytes": 137_438_953_472,
            "ram_available_bytes": 120_259_084_288,
            "memory_limit_bytes": None,
            "gpus": [],
            "system": "Debian GNU/Linux 12 (bookworm)",
            "kernel": "Linux 6.18.44",
            "python": "CPython 3.11.7",
            "load_average": [0.21, 0.4, 0.4],
        },
        "inputs": {
            "base": {
                "name": "qwen2.5-0.5b",
                "architecture": "Qwen2ForCausalLM",
                "parameters": 494_032_768,
                "dtype": "bfloat16",
                "size_bytes": 988_097_824,
            },
            "adapters": [
                {
                    "name": "ward-adapter",
                    "kind": "rsLoRA",
                    "rank": 16,
                    "tensors": 336,
                    "adapted": 168,
                    "weight": 1.0,
                }
            ],
            "combine": None,
            "data": {
                "calibration": {"items": 812, "tokens": 65_536, "positions": 17_110, "too_long": 0, "also_in_test": 0},
                "test": {
                    "items": 640,
                    "tokens": 51_020,
                    "positions": 18_233,
                    "labels": {"lang": {"en": 420, "zh": 220}},
                },
            },
        },
        "merge": {
            "math_kl": 3.1e-12,
            "rounding_kl": 7.2e-6,
            "kl_mean": 2.2e-5,
            "floor_kl": 1.9e-5,
            "adapter_kl": 0.771,
            "top1_agreement": 0.9971,
            "top1_agreement_float32": 0.9989,
            "positions": 18_233,
            "bounds": {"math_kl": 1e-9, "rounding_kl": 3.8e-5, "kl_mean": 7.6e-5},
            "reused": False,
            "measured_at": "2026-11-21T09:16:40+00:00",
        },
        "baseline": {
            "facts": _facts("hf", "bfloat16", "PyTorch 2.13, PEFT 0.21.2, transformers 5.23"),
            "ppl": 4.21,
            "nll": 1.4375,
            "accuracy": 0.944,
            "accuracy_by": {
                "topic": {"drugs": 0.962, "guidelines": 0.921, "药物相互作用": 0.938},
                "lang": {"en": 0.951, "zh": 0.932},
                "ward": {"a\u0000b\u202ec": 0.9, "北": 0.95},
            },
            "gain": {"value": 0.842, "low": 0.811, "high": 0.874},
            "base": {"ppl": 9.77, "nll": 2.2795, "accuracy": 0.203},
            "reused": False,
            "measured_at": "2026-11-21T09:18:12+00:00",
        },
        "targets": targets,
        "stages": [
            {"name": "plan", "seconds": 0.8},
            {"name": "merge proof", "seconds": 151.0, "measured_at": "2026-11-21T09:16:40+00:00"},
            {"name": "calibrate", "seconds": 96.4},
            {"name": "lower gguf/q8_0", "seconds": 0.1, "reused": True, "measured_at": "2026-11-20T17:00:40+00:00"},
            {"name": "lower gguf/q4_k_m", "seconds": 41.7},
            {"name": "measure gguf/q4_k_m", "seconds": 212.0},
            {"name": "bench gguf/q4_k_m", "seconds": 588.0},
        ],
    }
    copy: dict[str, Any] = json.loads(json.dumps(report))
    return copy


def _target(
    random: np.random.Generator,
    verdict: str,
    size_bytes: int,
    kl: float,
    kept: tuple[float, float, float],
    flips: float,
    accuracy: float,
    speedup: float,
    kind: str,
) -> dict[str, Any]:
    passed = verdict == "pass"
    value, low, high = kept
    return {
        "verdict": verdict,
        "gates": [
            _gate("gain_kept", "≥ 0.95", kept, passed),
            _gate("kl_mean", "≤ 0.05", (kl, kl * 0.94, kl * 1.07), passed),
        ],
        "quality": {
            "ppl": 4.21 * (1 + kl),
            "nll": 1.4375 + 0.842 * (1 - value),
            "kl_mean": kl,
            "kl_p99": kl * 14,
            "flips": flips,
            "top1_agreement": 1 - flips,
            "accuracy": accuracy,
            "accuracy_by": {
                "topic": {"drugs": accuracy + 0.01, "guidelines": accuracy - 0.02, "药物相互作用": accuracy - 0.004},
                "lang": {"en": accuracy + 0.006, "zh": accuracy - 0.008},
            },
            "gain_kept": {"value": value, "low": low, "high": high},
            "gain_kept_reason": "",
            "intervals": {
                "kl_mean": {"low": kl * 0.94, "high": kl * 1.07},
                "flips": {"low": flips * 0.7, "high": flips * 1.3},
                "accuracy": {"low": accuracy - 0.018, "high": accuracy + 0.018},
            },
            "positions": 18_233,
            "items": 640,
        },
        "speed": _speed(random, speedup),
        "size_bytes": size_bytes,
        "size_ratio": 988_097_824 / size_bytes,
        "peak_rss_bytes": size_bytes + 160_000_000,
        "lowering": {"seconds": 41.7, "peak_rss_bytes": 912_000_000, "notes": {"imatrix": "168 of 168 weights"}},
        "tokenizer": {
            "own_texts": 1452,
            "probes": 41,
            "differences": [
                {
                    "kind": "control",
                    "texts": ["escape-codes", "direction-marks"],
                    "mended": False,
                    "consequence": "a prompt with control characters may be read in another way",
                },
                {"kind": "decomposed", "texts": ["jamo"], "mended": True, "consequence": "send NFC text"},
            ],
        },
        "damage": _damage(random, kind, kl),
        "artifact": f"artifacts/gguf-{kind.lower()}",
        "facts": _facts("gguf", kind, "xllamacpp 2026.10.11549 prebuilt (AVX512)"),
        "reused": {"lower": False, "quality": False, "speed": False},
        "measured_at": {"quality": "2026-11-21T09:25:00+00:00", "speed": "2026-11-21T09:36:00+00:00"},
    }


def _failed() -> dict[str, Any]:
    return {
        "verdict": "fail",
        "error": {
            "code": "not-enough-disk",
            "what": "the artifact needs 1.2 GB and the disk has 0.4 GB",
            "why": "the output folder is on /dev/vda1",
            "hint": "lora2edge build --out /data/ward-build",
        },
    }


def _gate(metric: str, bound: str, kept: tuple[float, float, float], passed: bool) -> dict[str, Any]:
    value, low, high = kept
    return {
        "metric": metric,
        "bound": bound,
        "action": "fail",
        "value": value,
        "low": low,
        "high": high,
        "verdict": "pass" if passed else "fail",
        "reason": "",
    }


def _facts(backend: str, dtype: str, build: str) -> dict[str, Any]:
    return {
        "backend": backend,
        "device": "cpu",
        "dtype": dtype,
        "slots": 4,
        "threads": 16,
        "max_length": 1088,
        "batching": "continuous: requests join and leave between steps",
        "build": build,
        "versions": {"xllamacpp": "2026.10.11549"} if backend == "gguf" else {"torch": "2.13.0", "peft": "0.21.2"},
    }


def _speed(random: np.random.Generator, speedup: float) -> dict[str, Any]:
    old = _side(random, 24.0, 118.0, 1_780_000_000, "hf")
    new = _side(random, 24.0 * speedup, 118.0 / (speedup * 0.6), 560_000_000, "gguf")
    return {
        **new,
        "scenario": "chat",
        "baseline": old,
        "decode_ratio": {"value": speedup, "low": speedup * 0.96, "high": speedup * 1.05},
        "ttft_ratio": {"value": speedup * 0.6, "low": speedup * 0.55, "high": speedup * 0.66},
        "itl_ratio": {"value": speedup * 1.01, "low": speedup * 0.95, "high": speedup * 1.06},
        "qps_ratio": {
            "1": {"value": speedup * 0.95, "low": speedup * 0.9, "high": speedup},
            "2": {"value": speedup * 0.8, "low": speedup * 0.75, "high": speedup * 0.86},
            "4": {"value": speedup * 0.4, "low": speedup * 0.36, "high": speedup * 0.42},
        },
        "memory_ratio": {"value": 3.18, "low": None, "high": None},
        "load_ratio": {"value": 5.4, "low": None, "high": None},
        "rounds": 6,
        "order": ["baseline artifact", "artifact baseline"] * 3,
        "warmup": 6,
        "failures": 0,
        "artifact_failures": 0,
        "requests": {"1": 24, "2": 24, "4": 24},
        "prompt_tokens": [18, 41, 96],
        "new_tokens": 64,
        "seconds": 588.0,
        "load_average": {"before": 0.21, "after": 14.2},
        "notes": [],
    }


def _side(random: np.random.Generator, tps: float, ttft: float, rss: int, backend: str) -> dict[str, Any]:
    itl = np.sort(1000 / tps * random.lognormal(0, 0.08, 300))
    first = np.sort(ttft * random.lognormal(0, 0.3, 24))
    return {
        "ttft_ms": _percentiles(first),
        "itl_ms": _percentiles(itl),
        "decode_tps": tps,
        "prefill_tps": 41_000 / ttft,
        "qps": {"1": tps / 68, "2": tps / 68 * 1.7, "4": tps / 68 * (2.9 if backend == "hf" else 1.2)},
        "output_tps": {"1": tps * 0.94, "2": tps * 1.6, "4": tps * 2.7},
        "load_s": 9.3 if backend == "hf" else 1.7,
        "peak_rss_bytes": rss,
        "start_rss_bytes": 61_000_000,
        "loaded_rss_bytes": rss - 90_000_000,
        "threads": 16,
        "facts": _facts(backend, "bfloat16" if backend == "hf" else "q4_k_m", ""),
        "failures": 0,
        "failure_reasons": [],
        "samples": {"itl_ms": itl.tolist(), "ttft_ms": first.tolist()},
    }


def _percentiles(values: Any) -> dict[str, Any]:
    p50, p95, p99 = (float(value) for value in np.percentile(values, [50, 95, 99]))
    return {"p50": p50, "p95": p95, "p99": p99, "n": len(values)}


def _damage(random: np.random.Generator, kind: str, kl: float) -> list[dict[str, Any]]:
    error = {"Q8_0": 0.0052, "Q4_K": 0.062, "Q2_K": 0.21}[kind]
    noise = {"Q8_0": 0.42, "Q4_K": 5.0, "Q2_K": 17.0}[kind]
    found = [
        {
            "name": f"model.layers.{layer}.{part}.weight",
            "type": kind,
            "layer": layer,
            "relative_error": error * float(random.lognormal(0, 0.12)) * (1.5 if layer in {0, LAYERS - 1} else 1),
            "delta_kept": 1 - float(random.exponential(0.3)) * kl,
            "delta_noise": noise * float(random.lognormal(0, 0.2)),
        }
        for layer in range(LAYERS)
        for part in KINDS
    ]
    found.append(
        {
            "name": "model.embed_tokens.weight",
            "type": "Q8_0",
            "layer": None,
            "relative_error": 0.0049,
            "delta_kept": None,
            "delta_noise": None,
        }
    )
    return found
