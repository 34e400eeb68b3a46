"""The bases that people really tune, as header-only checkpoints: names and shapes as published, a hole for the weights.

    from tests.public import make_public_adapter, make_public_checkpoint, public_models

    base = make_public_checkpoint(tmp_path / "base", "Qwen2.5-72B-Instruct")
    adapter = make_public_adapter(tmp_path / "adapter", base)

Each file of fixtures/models holds a published config.json and says where it was read. Names and shapes are those of
transformers' own model class for that configuration, made on the meta device and renamed back as transformers writes
checkpoints (experts one by one); for a model with code of its own they are read from that code. The files have their
full size and take no room on disk. The tokenizer is a small one: a plan's tokenizer part is not covered by this.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lora2edge.adapters.heads import LAYOUTS
from tests.tiny import bpe_tokenizer

MODELS = Path(__file__).parent / "fixtures" / "models"
TRAP = "raise RuntimeError('the checkpoint's own code was run')\n"
"""What stands in for a checkpoint's own code and its tokenizer."""
_DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
_WIDTHS = {"F16": 2, "BF16": 2, "F32": 4}
_SHARD_BYTES = 5_000_000_000
"""Of save_pretrained(), where the published number of files was not read."""
_NOT_LINEAR = re.compile(r"embed|wte|lm_head|norm|\bcls\b|vision_tower|multi_modal|\.gate\.weight$")
"""Embeddings, heads, norms, the parts of other modalities, and routers, which are no Linear in transformers."""


def public_models() -> list[str]:
    """Names of the fixtures, families together, small models first."""
    return sorted((path.stem for path in MODELS.glob("*.json")), key=_family)


def read_model(name: str) -> dict[str, Any]:
    """`id`, `source` (where the configuration was read), `config`, and what else the fixture says."""
    data: dict[str, Any] = json.loads((MODELS / f"{name}.json").read_text(encoding="utf-8"))
    return data


@functools.cache
def tensor_shapes(name: str) -> Mapping[str, tuple[int, ...]]:
    """Tensor name → shape, as the published checkpoint has them."""
    model = read_model(name)
    return _shapes_of_code(model) if "tensors" in model else _shapes_of_class(model["config"])


def make_public_checkpoint(folder: Path, name: str) -> Path:
    """The checkpoint folder of fixture `name`: config.json, sparse weight files with their index, a small tokenizer."""
    model = read_model(name)
    folder.mkdir(parents=True)
    _write_json(folder / "config.json", model["config"])
    dtype = model.get("dtype") or _DTYPES[model["config"].get("torch_dtype", "float32")]
    shapes = tensor_shapes(name)
    total = sum(_size(shape) for shape in shapes.values()) * _WIDTHS[dtype]
    shards = _split(shapes, model.get("shards") or -(-total // _SHARD_BYTES), total / _WIDTHS[dtype])
    if len(shards) == 1:
        write_header(folder / "model.safetensors", shapes, dtype)
    else:
        weight_map = {}
        for number, shard in enumerate(shards, 1):
            file = f"model-{number:05}-of-{len(shards):05}.safetensors"
            write_header(folder / file, {key: shapes[key] for key in shard}, dtype)
            weight_map.update(dict.fromkeys(shard, file))
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(folder / "model.safetensors.index.json", index)
    files = dict.fromkeys(model["files"], TRAP) if "files" in model else _tokenizer()
    for file, text in files.items():
        (folder / file).write_text(text, encoding="utf-8")
    return folder


def make_public_adapter(folder: Path, base: Path, name: str, rank: int = 16) -> Path:
    """A LoRA of `rank` on every linear layer of fixture `name`, in float32, all zeros and no room on disk.

    Of a masked language model it is a classifier's, with a head for two classes: what such models are tuned for.
    """
    shapes = {key: shape for key, shape in tensor_shapes(name).items() if is_linear(key, shape)}
    head = _head(read_model(name)["config"])
    if head:
        shapes = {key: shape for key, shape in shapes.items() if ".encoder." in key}
    folder.mkdir(parents=True)
    config = {
        "base_model_name_or_path": str(base),
        "bias": "none",
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": sorted({key.split(".")[-2] for key in shapes}),
        "modules_to_save": ["classifier", "pooler"] if head else None,
        "task_type": "SEQ_CLS" if head else "CAUSAL_LM",
    }
    _write_json(folder / "adapter_config.json", config)
    tensors = {f"base_model.model.{key}": shape for key, shape in head.items()}
    for key, (rows, columns) in shapes.items():
        module = f"base_model.model.{key.removesuffix('.weight')}"
        tensors[f"{module}.lora_A.weight"] = (rank, columns)
        tensors[f"{module}.lora_B.weight"] = (rows, rank)
    write_header(folder / "adapter_model.safetensors", tensors, "F32")
    return folder


def _head(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name → shape of a classification head on a masked language model; empty for others."""
    if "MaskedLM" not in config["architectures"][0]:
        return {}
    width, found = config["hidden_size"], {}
    *inner, last = LAYOUTS[config["model_type"]].heads["sequence-classification"]
    for module, rows in {**dict.fromkeys(inner, width), last: 2}.items():
        found |= {f"{module}.weight": (rows, width), f"{module}.bias": (rows,)}
    return found


def is_linear(name: str, shape: tuple[int, ...]) -> bool:
    """Whether the tensor is the weight of a linear layer that people adapt."""
    return len(shape) == 2 and name.endswith(".weight") and not _NOT_LINEAR.search(name)


def write_header(path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str) -> None:
    """A safetensors file with a valid header, and a hole of the right size behind it."""
    header, at = {}, 0
    for name, shape in shapes.items():
        length = _size(shape) * _WIDTHS[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + length]}
        at += length
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + at)


def _shapes_of_class(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    import torch
    import transformers
    from transformers.core_model_loading import revert_weight_conversion

    settings = transformers.AutoConfig.for_model(**config)
    with torch.device("meta"):
        model = getattr(transformers, config["architectures"][0])(settings)
    tensors = model.state_dict()
    for name in model.all_tied_weights_keys:
        tensors.pop(name, None)
    return {name: tuple(tensor.shape) for name, tensor in revert_weight_conversion(model, tensors).items()}


def _shapes_of_code(model: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    config, layer, shapes = model["config"], {}, {}
    for name, words in model["tensors"].items():
        shape = tuple(config[word] if isinstance(word, str) else word for word in words)
        (layer if "*" in name else shapes)[name] = shape
    for number in range(config["num_hidden_layers"]):
        shapes.update({name.replace("*", str(number)): shape for name, shape in layer.items()})
    return shapes


def _split(shapes: Mapping[str, tuple[int, ...]], shards: int, total: float) -> list[list[str]]:
    """Names in `shards` runs of about the same size; fewer where single tensors are larger than that."""
    runs: list[list[str]] = [[]]
    held = 0
    for name, shape in shapes.items():
        if held >= total * len(runs) / shards:
            runs.append([])
        runs[-1].append(name)
        held += _size(shape)
    return runs


@functools.cache
def _tokenizer() -> dict[str, str]:
    tokenizer = bpe_tokenizer()
    settings = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>", "chat_template": tokenizer.chat_template}
    return {"tokenizer.json": tokenizer.backend_tokenizer.to_str(), "tokenizer_config.json": json.dumps(settings)}


def _family(name: str) -> tuple[Any, ...]:
    """Llama, DeepSeek, Qwen, Mistral, Gemma, Phi, encoders; then by the numbers in the name."""
    order = ("Llama", "Meta-Llama", "deepseek", "Qwen-", "Qwen", "Mi", "gemma", "Phi", "")
    rank = next(i for i, start in enumerate(order) if name.startswith(start))
    version = [float(number) for number in re.findall(r"\d+(?:\.\d+)?", name)]
    return max(rank, 1), version, name


def _size(shape: Iterable[int]) -> int:
    total = 1
    for length in shape:
        total *= length
    return total


def _write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
