"""A transformers model of which one decoder (or encoder) layer is in memory at a time."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora2edge.calibration.embedding import TokenEmbedding
from lora2edge.calibration.model import empty_model, fill, match, refuse_missing, tie
from lora2edge.calibration.relay import make_relay
from lora2edge.checkpoint import expert_place
from lora2edge.contracts import Checkpoint, TensorInfo


@dataclass(frozen=True, slots=True)
class Batch:
    """Samples that are run together: real tokens, and how they lie in a padded `[B, T]`."""

    rows: Sequence[Sequence[int]]
    """Token ids behind the shared prefix."""
    times: int = 1
    """How many samples each row stands for."""

    @property
    def tokens(self) -> int:
        return sum(map(len, self.rows))

    def seen(self) -> Any:
        """`[B, T]` bool: where tokens are."""
        import torch

        lengths = torch.tensor([len(row) for row in self.rows])
        return torch.arange(int(lengths.max()))[None] < lengths[:, None]


@dataclass(frozen=True, slots=True)
class Owner:
    """What multiplies with a tensor of the checkpoint."""

    layer: int
    """With which it is run."""
    path: str
    """Of a linear layer, or of the parameter that stacks experts."""
    expert: int | None
    part: int
    """Which part of the expert's rows the tensor is."""
    info: TensorInfo


class Reached(Exception):
    """Raised by a hook within a run that has what it wanted."""


class LayeredModel:
    """The model's own forward pass, in which all layers but one are relays that pass on what they are given.

    Masks, windows, position embeddings and whatever else a layer is called with are thus the model's own business. The
    layer that is loaded gets the hidden states that are injected, whatever came out of the relays before it; what the
    model then hands to the next one is captured. A model whose layers share weights, keys or values, or which has no
    plain list of layers, is one single layer here: it is in memory whole.
    """

    def __init__(self, view: Checkpoint, *, dtype: str, device: str, ids: Iterable[int]) -> None:
        """`ids`: the tokens that will occur; only their rows of the embedding are ever read."""
        self.view = view
        self.device = device
        self.model = empty_model(view, dtype, device, meta=True).eval()
        self.causal = view.task == "causal-lm"
        _, self._homes, missing = match(view, self.model)
        tie(view, self.model, self._homes, missing)
        refuse_missing(missing)
        if self.model._can_set_experts_implementation():
            self.model.set_experts_implementation("eager")  # one product an expert, which can be told apart
        self.body = self.model.base_model if self.causal else self.model
        """What is run: of a causal model without the output layer, whose output is the largest array."""
        self.pad_id: int | None = self.model.config.get_text_config().pad_token_id
        self.modules: dict[str, Any] = dict(self.model.named_modules())
        """By path, those of layers that are not loaded too."""
        self.head = _path_of(self.modules, self.model.get_output_embeddings())
        """Path of the output layer; None where there is none."""
        head = self.modules[self.head].weight if self.head else None
        self.is_tied = head is not None and getattr(self.model.get_input_embeddings(), "weight", None) is head
        """Whether the output layer is the token embedding."""
        self._path, self._list = _find_layers(self.model)
        self.layers: list[Any] = list(self._list) if self._list is not None else []
        self.owners = self._find_owners()
        """Of each linear layer's and expert's tensor, by name: what multiplies with it."""
        self._relays = [make_relay(self, index, layer) for index, layer in enumerate(self.layers)]
        for index, relay in enumerate(self._relays):
            self._list[index] = relay
        self.cache: Any = None
        """Keys and values of the run that is under way."""
        self._injected: Any = None
        self._first: Any = None
        self.captured: Any = None
        """What the relay behind the loaded layer was given."""
        self.outputs: int | None = None
        """How many values a layer returns; 0: one, and no tuple; None: no layer has run yet."""
        self.loaded: int | None = None
        self.embedding = TokenEmbedding(view, self.model, self._homes, [self.pad_id or 0, *ids], device)
        self._load_ends()
        self.shares_prefix = self.causal and _has_plain_cache(self.model)
        """Whether the keys and values of a prefix can be kept, layer by layer."""

    @property
    def count(self) -> int:
        """Layers; at least one."""
        return len(self.layers) or 1

    @property
    def dtype(self) -> Any:
        """torch's, of the weights and hidden states."""
        return self.model.dtype

    @property
    def width(self) -> int:
        """Of a hidden state."""
        return int(self.model.config.get_text_config().hidden_size)

    @property
    def is_whole(self) -> bool:
        """Whether the model is one single layer here."""
        return not self.layers

    def load(self, index: int) -> None:
        """Brings layer `index` into memory, in the place of its relay; the one before goes."""
        self.drop()
        if self.is_whole:
            return
        if index and self.outputs is None:  # a pass that goes on: nobody has seen what a layer returns
            self.load(0)
            self.run(Batch([[int(self.embedding.ids[0])]]), None)
            self.drop()
        if index and self.causal:
            self.embedding.forget()
        self._fill_module(self.layers[index], f"{self._path}.{index}")
        self._list[index] = self.layers[index]
        self.loaded = index

    def home(self, name: str) -> str:
        """Path of the parameter that the tensor fills, whole or in part."""
        return self._homes[name][0]

    def drop(self) -> None:
        """Puts the relay in the place of the layer that is loaded, and its memory aside for the next one."""
        if self.loaded is None:
            return
        self._list[self.loaded] = self._relays[self.loaded]
        for module in self.layers[self.loaded].modules():
            for key, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[key] = _parameter(parameter.to("meta"))
                    self._spare.setdefault((parameter.shape, parameter.dtype), []).append(parameter.data)
        self.loaded = None

    def run(self, batch: Batch, hidden: Any, *, prefix: Any = None, keep: bool = False) -> tuple[Any, Any, Any]:
        """One padded batch through the loaded layer, behind the tokens whose keys and values are in `prefix`.

        `hidden`: `[B, T, hidden]`, what the layer is given; None for the first layer, which gets the embedding.
        Returns what the layer was given, what the next one (or, after the last, the output layer) is given, and, with
        `keep`, the keys and values of all. Where a hook raises Reached, the rest is not run. Padding is on the right,
        where no token sees it; of an encoder it is masked.
        """
        import torch

        width = max(map(len, batch.rows))
        ids = torch.full((len(batch.rows), width), self.pad_id or 0, dtype=torch.long)
        for row, tokens in enumerate(batch.rows):
            ids[row, : len(tokens)] = torch.tensor(tokens)
        arguments: dict[str, Any] = {"input_ids": ids.to(self.device)}
        if self.causal:
            self.cache = None
            if prefix is not None:
                self.cache = copy.deepcopy(prefix)
                self.cache.batch_repeat_interleave(len(batch.rows))
            elif keep:
                self.cache = _new_cache(self.model)
            arguments |= {"past_key_values": self.cache, "use_cache": self.cache is not None}
        else:
            arguments["attention_mask"] = batch.seen().long().to(self.device)
        self._injected, self._first, self.captured, done = hidden, None, None, None
        with contextlib.ExitStack() as hooks:
            if self.loaded is not None:
                layer = self.layers[self.loaded]
                hooks.callback(layer.register_forward_pre_hook(self._inject, with_kwargs=True).remove)
                hooks.callback(layer.register_forward_hook(self._note_outputs).remove)
            hooks.enter_context(torch.inference_mode())
            hooks.enter_context(contextlib.suppress(Reached))
            done = self.body(**arguments)
        last = self.loaded is None or self.loaded == self.count - 1
        given = self.captured
        if last and self.causal and done is not None:
            given = done.last_hidden_state
        first, cache = self._first, self.cache if keep else None
        self._injected = self._first = self.captured = self.cache = None
        return first, given, cache

    def _inject(self, layer: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        self._first = arguments[0] if arguments else named["hidden_states"]
        if self._injected is None:
            return None
        self._first = self._injected
        if arguments:
            return (self._injected, *arguments[1:]), named
        return arguments, {**named, "hidden_states": self._injected}

    def _note_outputs(self, layer: Any, arguments: Any, output: Any) -> None:
        self.outputs = len(output) if isinstance(output, tuple) else 0

    def _find_owners(self) -> dict[str, Owner]:
        import torch

        tied = self.model.get_parameter(f"{self.head}.weight") if self.head else None
        modules = {}
        for at, module in self.modules.items():
            if isinstance(module, torch.nn.Linear):
                modules[f"{at}.weight"] = at
            elif self.head and isinstance(module, torch.nn.Embedding) and module.weight is tied:
                modules[f"{at}.weight"] = self.head
        found = {}
        for name, info in self.view.tensors.items():
            if place := expert_place(self.view.config, name):
                found[name] = Owner(self._layer_of(place.parameter), place.parameter, place.expert, place.part, info)
                continue
            path = next((modules[home] for home in self.view.module_names(name) if home in modules), None)
            if path is not None:
                found[name] = Owner(self._layer_of(path), path, None, 0, info)
        return found

    def _layer_of(self, path: str) -> int:
        """The layer that `path` is in; of what is in none of them the last, with which it is run."""
        if self.is_whole or not path.startswith(f"{self._path}."):
            return self.count - 1
        return int(path[len(self._path) + 1 :].partition(".")[0])

    # ------------------------------------------------------------ weights

    def _load_ends(self) -> None:
        """All that is in no layer; of the embedding the rows that occur, of a causal model no output layer."""
        self._spare: dict[Any, list[Any]] = {}
        """Memory of the layer before, by shape and dtype: given back and asked for again it would scatter."""
        kept = set()
        if self.embedding.can_be_compact and (self.causal or not self.is_tied):
            self.embedding.compact()
            kept = {f"{_path_of(self.modules, self.model.get_input_embeddings())}.weight"}
        if self.causal and self.head:
            kept |= {f"{self.head}.weight", f"{self.head}.bias"}
        self._fill_module(self.model, "", kept)

    def _fill_module(self, module: Any, path: str, but: Container[str] = ()) -> None:
        """Makes the module's parameters real, and fills them and its stored buffers from the view."""
        import torch

        start = f"{path}." if path else ""
        real: dict[int, Any] = {}  # what is tied stays so
        targets: dict[str, Any] = {}
        for below, part in module.named_modules(prefix=path):
            for key, parameter in part._parameters.items():
                name = f"{below}.{key}" if below else key
                if parameter is None or name in but:
                    continue
                if parameter.is_meta:
                    fresh = real.get(id(parameter))
                    if fresh is None:
                        spare = self._spare.get((parameter.shape, parameter.dtype))
                        fresh = _parameter(spare.pop() if spare else torch.empty_like(parameter, device=self.device))
                        real[id(parameter)] = fresh
                    part._parameters[key] = fresh
                targets[name] = part._parameters[key]
            targets.update((f"{below}.{key}" if below else key, buffer) for key, buffer in part._buffers.items())
        homes = {
            name: [targets[home] for home in found if home.startswith(start) and home in targets]
            for name, found in self._homes.items()
        }
        fill(self.view, {name: found for name, found in homes.items() if found}, rounded=False)


def _parameter(values: Any) -> Any:
    import torch

    return torch.nn.Parameter(values, requires_grad=False)


def _path_of(modules: Mapping[str, Any], wanted: Any) -> str | None:
    return next((path for path, module in modules.items() if module is wanted), None)


def _new_cache(model: Any) -> Any:
    from transformers import DynamicCache

    return DynamicCache(config=model.config)


def _has_plain_cache(model: Any) -> bool:
    """Whether all that a layer keeps of earlier tokens are keys and values."""
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    layers = _new_cache(model).layers
    return bool(layers) and all(type(layer) in {DynamicLayer, DynamicSlidingWindowLayer} for layer in layers)


def _find_layers(model: Any) -> tuple[str, Any]:
    """Path and list of the model's layers, where they are independent of each other; "" and None otherwise."""
    import torch

    config = model.config.get_text_config()
    count = getattr(config, "num_hidden_layers", None)
    if getattr(config, "is_encoder_decoder", False) or getattr(config, "num_kv_shared_layers", None):
        return "", None
    found: list[tuple[str, Any]] = []
    for path, module in model.named_modules():
        if not isinstance(module, torch.nn.ModuleList) or len(module) != count:
            continue
        if not any(path.startswith(f"{outer}.") for outer, _ in found):
            found.append((path, module))
    if len(found) != 1:
        return "", None
    path, layers = found[0]
    named = [(name, id(parameter)) for name, parameter in model.named_parameters(remove_duplicate=False)]
    inside = {name: owner for name, owner in named if name.startswith(f"{path}.")}
    outside = {owner for name, owner in named if name not in inside}
    if not inside or len(set(inside.values())) < len(inside) or outside & set(inside.values()):
        return "", None
    return path, layers
