"""A checkpoint view as a PyTorch model, filled row by row: never in memory twice, nothing written to disk."""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import logging
import re
import warnings
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from lora2edge.adapters.ends import same_rows
from lora2edge.checkpoint import expert_place, one_blas_thread
from lora2edge.contracts import Checkpoint, Task, TensorInfo
from lora2edge.errors import CheckpointError, InputError, MissingExtraError, UnsupportedError

_SLAB_ELEMENTS = 1 << 22
_FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
AUTO_CLASSES: Mapping[Task, str] = {
    "causal-lm": "AutoModelForCausalLM",
    "masked-lm": "AutoModelForMaskedLM",
    "seq2seq-lm": "AutoModelForSeq2SeqLM",
    "sequence-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
}


def build_model(view: Checkpoint, *, dtype: str, device: str, rounded: bool) -> Any:
    """A transformers model in evaluation mode with the view's weights, in `dtype` ("float32", "bfloat16", …).

    `rounded`: weights go through their stored dtype first, as they would be written; otherwise the view's float32
    rows are used as they are. Raises CheckpointError where a tensor has no place in the model, has another shape,
    or a parameter of the model is not in the checkpoint; UnsupportedError for an unknown architecture.
    """
    require("torch", "transformers")

    model = empty_model(view, dtype, device)
    places, homes, missing = match(view, model)
    fill(view, {name: [places[place] for place in found] for name, found in homes.items()}, rounded=rounded)
    # transformers' own rule: what is missing is tied to what is there; what is there twice and differs, not.
    model.tie_weights(missing_keys=missing)
    refuse_missing(missing)
    return model.eval()


def match(view: Checkpoint, model: Any) -> tuple[dict[str, Any], dict[str, list[str]], set[str]]:
    """Where the view's tensors go: the model's parameters and stored buffers by name, of each tensor the names of those
    that it fills, and the parameters that no tensor fills whole.

    Raises CheckpointError where a tensor has no place in the model.
    """
    places: dict[str, Any] = dict(model.named_parameters(remove_duplicate=False))
    parameters = set(places)
    places.update((name, buffer) for name, buffer in model.named_buffers() if name in model.state_dict())
    homes = {name: _homes(view, name, places) for name in view.tensors}
    _refuse_homeless(model, [name for name, found in homes.items() if not found])
    sizes = Counter[str]()
    for name, found in homes.items():
        sizes.update(dict.fromkeys(found, view.tensors[name].size))
    return places, homes, {place for place in parameters if sizes[place] < places[place].numel()}


def tie(view: Checkpoint, model: Any, homes: Mapping[str, Sequence[str]], missing: set[str]) -> None:
    """Ties what `build_model` ties, in a model whose parameters hold no values yet: what is missing, and an output
    layer that is stored beside the embedding and equals it. `homes` and `missing`: as `match` returns them."""
    places = dict(model.named_parameters(remove_duplicate=False))
    stored: list[str] = []
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        weight = getattr(module, "weight", None)
        filled = (name for name, found in homes.items() if any(places.get(home) is weight for home in found))
        stored += [] if weight is None else list(filled)[:1]
    copies: set[str] = set()
    if len(set(stored)) == 2 and getattr(model.config, "tie_word_embeddings", False):
        shapes = {view.tensors[name].shape for name in stored}
        rows = [partial(view.rows, name) for name in stored]
        if len(shapes) == 1 and same_rows(shapes.pop(), *rows):
            copies = set(homes[stored[1]])
    missing |= copies
    model.tie_weights(missing_keys=missing)
    missing -= copies


def fill(view: Checkpoint, targets: Mapping[str, Sequence[Any]], *, rounded: bool) -> None:
    """Copies tensors of the view into parameters: tensor name → what it fills, whole or the part that is its own."""
    import torch

    def copy_one(name: str) -> None:
        for place in targets[name]:
            _fill(part_of(place, view, name), view, view.tensors[name], rounded=rounded)

    with one_blas_thread(), ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for _ in pool.map(copy_one, targets):
            pass


def refuse_missing(missing: Collection[str]) -> None:
    """Raises CheckpointError where parameters of the model are in no file, and tied to nothing that is."""
    if missing:
        raise CheckpointError(
            "missing-tensors",
            f"the checkpoint lacks {len(missing)} of the model's parameters",
            why=_listed(sorted(missing)),
            hint="the folder is incomplete, or config.json names another architecture: fetch the checkpoint again",
        )


def require(*modules: str) -> None:
    """Raises MissingExtraError where one of PyTorch, transformers and PEFT is installed and does not load."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # where installed: it tells of kernels that it lacks
    for name in modules:
        try:
            importlib.import_module(name)
        except Exception as error:  # a broken install raises anything
            raise MissingExtraError(
                "broken-extra",
                f"{name} does not load",
                why=f"{type(error).__name__}: {error}",
                hint="pip install --force-reinstall 'lora2edge[torch]'",
            ) from error


@contextlib.contextmanager
def torch_errors(what: str) -> Iterator[None]:
    """Turns what PyTorch and transformers raise for unusable input into errors with a code."""
    try:
        yield
    except ImportError as error:
        raise MissingExtraError(
            "missing-extra", f"cannot {what}", why=str(error), hint="pip install 'lora2edge[torch]'"
        ) from error
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError("unreadable-checkpoint", f"cannot {what}", why=str(error)) from error
    except RuntimeError as error:
        if "out of memory" not in str(error) and "not enough memory" not in str(error):
            raise
        raise InputError(
            "memory", f"cannot {what}: out of memory", why=str(error), hint="--device cpu, or a larger machine"
        ) from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps the libraries' notes, warnings and bars off the terminal: their errors still come through."""
    from transformers.utils import logging as transformers_logging

    before = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(before)
        if bars:
            transformers_logging.enable_progress_bar()


def empty_model(view: Checkpoint, dtype: str, device: str, *, meta: bool = False) -> Any:
    """The architecture with uninitialised parameters (no page of them is touched yet) and its own buffers.

    With `meta` the parameters are on PyTorch's meta device and take no memory at all; buffers are real.
    """
    import torch
    import transformers
    from transformers import CONFIG_MAPPING, AutoConfig
    from transformers.initialization import no_init_weights

    kind = str(view.config.get("model_type"))
    trusted = view.ref.trust_remote_code
    if kind not in CONFIG_MAPPING and not trusted:
        raise UnsupportedError(
            "unknown-architecture",
            f"transformers does not know model_type {kind!r}",
            hint="pip install --upgrade transformers, or, where you trust its own code, --trust-remote-code",
        )
    makers = contextlib.ExitStack()
    with torch_errors(f"build a {kind} model"), quiet(), no_init_weights(), torch.device(device), makers:
        if kind in CONFIG_MAPPING:
            config = make_config(view)
        else:
            config = AutoConfig.from_pretrained(view.ref.base, trust_remote_code=True, local_files_only=True)
            config.update(_config_data(view))
        if meta:
            makers.enter_context(_parameters_on_meta())
        auto = getattr(transformers, AUTO_CLASSES[view.task])
        return auto.from_config(config, dtype=getattr(torch, dtype), trust_remote_code=trusted)


def make_config(view: Checkpoint) -> Any:
    """The view's config.json as transformers' object, of a kind that transformers knows."""
    from transformers import CONFIG_MAPPING

    data = _config_data(view)
    return CONFIG_MAPPING[str(data.get("model_type"))].from_dict(data)


def _config_data(view: Checkpoint) -> dict[str, Any]:
    data = copy.deepcopy(dict(view.config))
    data.pop("quantization_config", None)
    return data


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Every parameter that a module registers goes to the meta device at once; buffers, computed ones too, stay."""
    import torch

    register = torch.nn.Module.register_parameter

    def register_on_meta(module: Any, name: str, parameter: Any) -> None:
        register(module, name, parameter)
        if parameter is not None and not parameter.is_meta:  # one that is tied comes by again
            module._parameters[name] = torch.nn.Parameter(parameter.to("meta"), requires_grad=False)

    torch.nn.Module.register_parameter = register_on_meta
    try:
        yield
    finally:
        torch.nn.Module.register_parameter = register


def _homes(view: Checkpoint, name: str, places: Mapping[str, Any]) -> list[str]:
    """The model's own names of the tensor; older classes keep those of the file."""
    return [place for place in (*view.module_names(name), name) if place in places][:1]


def part_of(place: Any, view: Checkpoint, name: str) -> Any:
    """The slice of a stack of experts that the tensor is, or the parameter itself."""
    found = expert_place(view.config, name)
    if found is None or place.dim() != 3:
        return place
    rows = view.tensors[name].shape[0]
    return place[found.expert, found.part * rows : (found.part + 1) * rows]


def _fill(place: Any, view: Checkpoint, info: TensorInfo, *, rounded: bool) -> None:
    import torch

    if tuple(place.shape) != tuple(info.shape):
        raise CheckpointError(
            "tensor-shape",
            f"{info.name} has another shape than the model",
            why=f"the file says {list(info.shape)}, config.json makes it {list(place.shape)}",
        )
    if info.dtype not in _FLOATS:
        return
    stored = getattr(torch, _FLOATS[info.dtype])
    length = info.shape[0] if info.shape else 1
    step = max(1, _SLAB_ELEMENTS // max(1, info.size // max(1, length)))
    with torch.no_grad():
        target = place if info.shape else place.view(1)
        for start in range(0, length, step):
            stop = min(length, start + step)
            values = torch.from_numpy(view.rows(info.name, start, stop))
            if rounded:
                values = values.to(stored)
            target[start:stop].copy_(values.view(target[start:stop].shape))


def _refuse_homeless(model: Any, names: list[str]) -> None:
    """Tensors that the model's own class ignores (old rotary tables) are left out; any other is an error."""
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    ignored.append(re.compile(r"rotary_emb\.inv_freq$"))
    left = [name for name in names if not any(pattern.search(name) for pattern in ignored)]
    if left:
        raise CheckpointError(
            "unknown-tensors",
            f"{len(left)} tensors of the checkpoint have no place in the model",
            why=_listed(left),
            hint="config.json names another architecture than the weights are of",
        )


def _listed(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
