"""Checkpoint and adapter folders through transformers' and PEFT's own readers."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from lora2edge.adapters import MergedCheckpoint, open_base, open_view
from lora2edge.backends.hf.headed import Headed
from lora2edge.calibration.model import AUTO_CLASSES, build_model, make_config, quiet, require, torch_errors
from lora2edge.checkpoint import merge_tokenizer_files, read_json_file, tokenizer_files
from lora2edge.contracts import AdapterRef, Checkpoint, CheckpointRef, Task, TokenizerFiles
from lora2edge.errors import AdapterError, CheckpointError


def load_live(ref: CheckpointRef, *, dtype: str, device: str) -> Any:
    """The model in evaluation mode; a PeftModel where an adapter is live on it. Reads local safetensors only.

    A quantized base computes with its dequantized weights, as bitsandbytes does, and needs no kernels of its own.
    Of a sequence the last adapter is live, on the merge of those before it; where several have no live form
    (`MergedCheckpoint.reference`), it is their merge, unrounded.
    """
    require("torch", "transformers", "peft")
    if ref.is_combined:
        return _load_combined(ref, dtype=dtype, device=device).to(device).eval()
    return _load_base(ref, dtype=dtype, device=device, adapters=ref.adapters).to(device).eval()


def load_live_classifier(ref: CheckpointRef, view: Checkpoint, *, dtype: str, device: str) -> Any:
    """The same as a classifier. `view`: base and adapters, merged, which says what head there is, and whose.

    In a base of another task the head that an adapter brings is random until PEFT puts the trained one in its place.
    """
    require("torch", "transformers", "peft")
    adapters: Sequence[AdapterRef] = ref.adapters
    merged = view if isinstance(view, MergedCheckpoint) else None
    if merged and merged.reference:
        return build_model(merged, dtype=dtype, device=device, rounded=False).to(device).eval()
    if merged and len(merged.steps) > 1:
        adapters = adapters[-1:]
        model = build_model(Headed(view, merged.steps[-2]), dtype=dtype, device=device, rounded=False)
    elif is_quantized(ref):
        model = build_model(Headed(view, open_base(ref)), dtype=dtype, device=device, rounded=True)
    else:
        model = _load_plain_classifier(ref, view, dtype)
    return (_with_adapters(model, adapters) if adapters else model).to(device).eval()


def _load_plain_classifier(ref: CheckpointRef, view: Checkpoint, dtype: str) -> Any:
    base = open_base(ref)
    try:
        brought = view.task != base.task
        return _load_plain(
            Path(ref.base),
            dtype,
            trust_remote_code=ref.trust_remote_code,
            task=view.task,
            config=make_config(view) if brought else None,
            new=view.tensors.keys() - base.tensors.keys() if brought else (),
        )
    finally:
        base.close()


def _load_combined(ref: CheckpointRef, *, dtype: str, device: str) -> Any:
    view = open_view(ref)
    try:
        if view.reference:
            return build_model(view, dtype=dtype, device=device, rounded=False)
        if len(view.steps) == 1:
            return _load_base(ref, dtype=dtype, device=device, adapters=ref.adapters)
        model = build_model(view.steps[-2], dtype=dtype, device=device, rounded=False)
        return _with_adapters(model, ref.adapters[-1:])
    finally:
        view.close()


def _load_base(ref: CheckpointRef, *, dtype: str, device: str, adapters: Sequence[AdapterRef]) -> Any:
    if is_quantized(ref):
        model = build_model(open_base(ref), dtype=dtype, device=device, rounded=True)
    else:
        model = _load_plain(Path(ref.base), dtype, trust_remote_code=ref.trust_remote_code)
    return _with_adapters(model, adapters) if adapters else model


def find_reference(ref: CheckpointRef) -> str:
    """What the baseline is where the adapters have no live form; else ""."""
    if not ref.is_combined:
        return ""
    view = open_view(ref)
    view.close()
    return view.reference


def is_quantized(ref: CheckpointRef) -> bool:
    """Whether the base has quantized weights, which are dequantized when it is loaded."""
    stored = read_json_file(Path(ref.base) / "config.json", "bad-config")
    return ref.requantized is not None or bool(stored.get("quantization_config"))


def _load_plain(
    base: Path,
    dtype: str,
    *,
    trust_remote_code: bool,
    task: Task = "causal-lm",
    config: Any = None,
    new: Collection[str] = (),
) -> Any:
    """`config`: in the place of the base's own. `new`: tensors that the base need not have."""
    import torch
    import transformers

    own_config = {} if config is None else {"config": config}
    with torch_errors(f"load {base}"), quiet():
        model, report = getattr(transformers, AUTO_CLASSES[task]).from_pretrained(
            base,
            **own_config,
            dtype=getattr(torch, dtype),
            local_files_only=True,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
        )
    broken = sorted(set(report["missing_keys"]) - set(new)) + sorted(str(key) for key in report["mismatched_keys"])
    if broken:
        raise CheckpointError(
            "missing-tensors",
            f"{base} lacks {len(broken)} of the model's tensors, or has them in another shape",
            why=", ".join(broken[:5]),
            hint="fetch the checkpoint again",
        )
    return model


def resolve_tokenizer(ref: CheckpointRef) -> TokenizerFiles:
    """The base's tokenizer files with the adapters' over them, as the merged view has them."""
    files = TokenizerFiles(tokenizer_files(Path(ref.base)))
    for adapter in ref.adapters:
        files = merge_tokenizer_files(files, Path(adapter.path))
    return files


def _with_adapters(model: Any, adapters: Sequence[AdapterRef]) -> Any:
    """The model with all adapters active at once, each scale multiplied by the adapter's weight."""
    live: Any = None
    names = ["default", *(f"adapter{index}" for index in range(1, len(adapters)))]
    for name, adapter in zip(names, adapters, strict=True):
        live = _with_adapter(model, live, Path(adapter.path), name)
        if adapter.weight != 1:
            _scale(live, name, adapter.weight)
    if len(adapters) > 1:
        names.sort(key=lambda name: not getattr(live.peft_config[name], "use_dora", False))  # `has_live_form` says why
        live.base_model.set_adapter(names)
    return live


def _scale(live: Any, name: str, weight: float) -> None:
    from peft.tuners.lora import LoraLayer

    for module in live.modules():
        if isinstance(module, LoraLayer) and name in module.scaling:
            module.scaling[name] *= weight


def _with_adapter(model: Any, live: Any, adapter: Path, name: str) -> Any:
    """`model` with the adapter on it, or, where one is `live` on it already, that with one more."""
    from peft import PeftModel

    rows = _saved_vocabulary(adapter)
    if rows is not None and rows != int(model.get_input_embeddings().weight.shape[0]):
        model.resize_token_embeddings(rows, mean_resizing=False)
    try:
        with quiet(), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if live is None:
                live = PeftModel.from_pretrained(model, str(adapter), adapter_name=name, is_trainable=False)
            else:
                live.load_adapter(str(adapter), adapter_name=name, is_trainable=False)
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        raise AdapterError(
            "adapter-not-loaded", f"PEFT cannot put {adapter} on the base", why=str(error)[:2000]
        ) from error
    # PEFT starts a layer whose tensors are missing as if it had never been trained, and only warns.
    missing = [str(warning.message) for warning in caught if "missing adapter keys" in str(warning.message)]
    if missing:
        raise AdapterError(
            "adapter-incomplete",
            f"{adapter} lacks tensors that its adapter_config.json promises",
            why=missing[0][:2000],
            hint="copy the adapter again; adapter_model.safetensors and adapter_config.json must be of one training",
        )
    return live


def _saved_vocabulary(adapter: Path) -> int | None:
    """Rows of the embedding or head that the adapter saved whole: training may have added tokens."""
    from safetensors import safe_open

    weights = adapter / "adapter_model.safetensors"
    if not weights.exists():
        raise AdapterError("no-adapter-weights", f"{adapter} holds no adapter_model.safetensors")
    endings = ("embed_tokens.weight", "lm_head.weight", "wte.weight", "embed_in.weight", "embed_out.weight")
    with safe_open(weights, "numpy") as file:
        for name in file.keys():  # noqa: SIM118  (a safetensors handle is no mapping)
            if name.replace(".modules_to_save", "").replace(".base_layer", "").endswith(endings):
                return int(file.get_slice(name).get_shape()[0])
    return None
