"""Classifiers that were trained on a language model: the base's own head goes, the adapter's comes.

`AutoModelForSequenceClassification.from_pretrained(BASE)` takes the layers of any language model and starts a new
head at random, which PEFT trains and saves whole (modules_to_save). The base's folder knows nothing of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora2edge.errors import AdapterError

if TYPE_CHECKING:
    from lora2edge.adapters.read import Adapter
    from lora2edge.contracts import Base, Task

_SEQUENCE: Task = "sequence-classification"
_TOKEN: Task = "token-classification"
_PARTS = {_SEQUENCE: "ForSequenceClassification", _TOKEN: "ForTokenClassification"}
_LANGUAGE_MODELS = ("ForCausalLM", "LMHeadModel", "ForMaskedLM")


@dataclass(frozen=True, slots=True)
class HeadLayout:
    """Where a kind of model has its layers and its classification heads, as transformers' classes name them."""

    layers: str
    """What the names of all but the head begin with."""
    heads: Mapping[Task, tuple[str, ...]]
    """Modules that the language model lacks; each has a weight and, unless it is `score` of a sequence, a bias."""
    unused: Mapping[Task, str]
    """A module among the layers that this classifier does not have."""
    stem: str | None = None
    """The classes' first word, where it is not that of the language model."""


def _encoder(layers: str, sequence: tuple[str, ...], unused: Mapping[Task, str] | None = None) -> HeadLayout:
    return HeadLayout(layers, {_SEQUENCE: sequence, _TOKEN: ("classifier",)}, unused or {})


def _decoder(layers: str = "model.", token: str | None = "score", stem: str | None = None) -> HeadLayout:
    heads: dict[Task, tuple[str, ...]] = {_SEQUENCE: ("score",)}
    if token:
        heads[_TOKEN] = (token,)
    return HeadLayout(layers, heads, {}, stem)


_TWO_LAYERS = ("classifier.dense", "classifier.out_proj")
LAYOUTS: Mapping[str, HeadLayout] = {
    "bert": _encoder("bert.", ("bert.pooler.dense", "classifier"), {_TOKEN: "bert.pooler."}),
    "roberta": _encoder("roberta.", _TWO_LAYERS, {_SEQUENCE: "roberta.pooler.", _TOKEN: "roberta.pooler."}),
    "xlm-roberta": _encoder("roberta.", _TWO_LAYERS, {_SEQUENCE: "roberta.pooler.", _TOKEN: "roberta.pooler."}),
    "electra": _encoder("electra.", _TWO_LAYERS),
    "deberta-v2": _encoder("deberta.", ("pooler.dense", "classifier")),
    "distilbert": _encoder("distilbert.", ("pre_classifier", "classifier")),
    **dict.fromkeys(
        ("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma", "gemma2", "phi3"), _decoder()
    ),
    "gemma3_text": _decoder(token=None, stem="Gemma3Text"),
    "gpt2": _decoder("transformer.", "classifier"),
    "gpt_neox": _decoder("gpt_neox.", "classifier"),
}
"""model_type → layout (transformers 5)."""


@dataclass(frozen=True, slots=True)
class NewHead:
    """The classifier that an adapter makes of a language model."""

    task: Task
    names: tuple[str, ...]
    """Tensors of the head that the base lacks; the adapter has all of them."""
    dropped: frozenset[str]
    """Tensors of the base that the classifier has no place for."""
    config: Mapping[str, Any]


def find_new_head(base: Base, adapter: Adapter, task: Task) -> NewHead | None:
    """The head that `adapter`, trained for `task`, brings for the language model `base`.

    None where the base is no language model, or of a kind whose heads are not known. Raises AdapterError where a
    part of the head is in neither: PEFT would start it at random each time the model is loaded.
    """
    layout = LAYOUTS.get(str(base.config.get("model_type")))
    stem = _stem(base.config)
    if task not in _PARTS or base.task not in ("causal-lm", "masked-lm") or not layout or not stem:
        return None
    modules = layout.heads.get(task)
    if modules is None or not any(name.startswith(layout.layers) for name in base.tensors):
        return None
    unused = layout.unused.get(task)
    dropped = frozenset(
        name
        for name in base.tensors
        if name.removesuffix(name.rpartition(".")[2]).removesuffix(".") not in modules
        and (not name.startswith(layout.layers) or (unused and name.startswith(unused)))
    )
    wanted = [name for module in modules for name in _tensors(module, task)]
    lost = [name for name in wanted if name not in adapter.saved and (name not in base.tensors or name in dropped)]
    if lost:
        saved = dict.fromkeys(module.removeprefix(layout.layers).split(".")[0] for module in modules)
        raise AdapterError(
            "adapter-random-head",
            f"the classifier needs {', '.join(lost[:3])}, which neither base nor adapter holds",
            why="transformers starts it at random each time: the adapter was not saved with the head that it was "
            "trained with",
            hint=f"train with modules_to_save={list(saved)}, and save again",
        )
    classes = adapter.reader.tensors[adapter.saved[wanted[-1]]].shape[0] if wanted[-1] in adapter.saved else None
    config: dict[str, Any] = {"architectures": [f"{layout.stem or stem}{_PARTS[task]}"]}
    if classes is not None and classes != len(base.config.get("id2label") or (0, 1)):
        labels = {str(index): f"LABEL_{index}" for index in range(classes)}
        config |= {"id2label": labels, "label2id": {label: int(index) for index, label in labels.items()}}
    return NewHead(task, tuple(name for name in wanted if name not in base.tensors), dropped, config)


def _tensors(module: str, task: Task) -> tuple[str, ...]:
    """The head's output layer comes last, and its first axis is the classes."""
    weight_only = module == "score" and task == _SEQUENCE
    return (f"{module}.weight",) if weight_only else (f"{module}.bias", f"{module}.weight")


def _stem(config: Mapping[str, Any]) -> str | None:
    """ "Bert" of "BertForMaskedLM"."""
    names = config.get("architectures") or [""]
    found = (str(names[0]).removesuffix(ending) for ending in _LANGUAGE_MODELS if str(names[0]).endswith(ending))
    return next(found, None)
