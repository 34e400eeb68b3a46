"""What a classifier's configuration says: its classes, what it may be asked, how long its texts may be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora2edge.checkpoint import read_tokenizer_file
from lora2edge.contracts import Checkpoint, TokenizerFiles
from lora2edge.errors import CheckpointError, UnsupportedError

_SEGMENTS = "token_type_embeddings.weight"
_OFFSET_POSITIONS = {
    "camembert", "data2vec-text", "ibert", "longformer", "mpnet", "roberta", "roberta-prelayernorm", "xlm-roberta",
    "xlm-roberta-xl", "xmod",
}  # fmt: skip
"""Their first token is at position pad_token_id + 1, so that their tables hold fewer tokens than rows."""
_HEADS = ("classifier.weight", "classifier.out_proj.weight", "score.weight")
"""Output layers of classifiers: a row a class."""
_MOST_TOKENS = 1_000_000
"""A larger `model_max_length` means that there is none."""


def class_names(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the classes in the order of the logits: `id2label`, else LABEL_0, LABEL_1, … as transformers has them.

    Raises CheckpointError where the indices are not 0, 1, 2, …, two classes have one name, or `label2id`, which
    training scripts number their data by, has a class at another index. Names that it alone has are a leftover.
    """
    stored = config.get("id2label")
    if not stored:
        return tuple(f"LABEL_{index}" for index in range(int(config.get("num_labels") or 2)))
    try:
        found = {int(index): str(name) for index, name in stored.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise _bad_labels("it is no mapping of indices to names") from error
    if sorted(found) != list(range(len(found))):
        raise _bad_labels(f"its indices are {', '.join(map(str, sorted(found)[:10]))}")
    names = tuple(found[index] for index in range(len(found)))
    if len(set(names)) < len(names):
        raise _bad_labels("two classes have the same name")
    numbered = config.get("label2id")
    for name, index in numbered.items() if isinstance(numbered, Mapping) else ():
        if name in names and str(index) != str(names.index(name)):
            raise _bad_labels(f"{name!r} is class {names.index(name)} there, and {index} in label2id")
    return names


def check_classes(view: Checkpoint) -> tuple[str, ...]:
    """`class_names` of a checkpoint that gives every text or token exactly one of several classes.

    Raises UnsupportedError for a regression and for independent labels, CheckpointError where the head has another
    number of classes, or texts of different length cannot be classified together because no padding token is named.
    """
    names, kind = class_names(view.config), view.config.get("problem_type")
    if kind == "multi_label_classification":
        raise UnsupportedError(
            "classifier-multi-label",
            "classifiers that give a text several labels cannot be measured",
            why="problem_type in config.json is multi_label_classification: accuracy, F1 and KL are taken over classes "
            "that exclude each other",
            hint="`lora2edge merge` without --prove writes the merged checkpoint",
        )
    if len(names) < 2 or kind == "regression":
        raise UnsupportedError(
            "classifier-regression",
            "models that give a number instead of a class cannot be measured",
            why=f"config.json has {len(names)} label{'s' * (len(names) != 1)}"
            + (f" and problem_type {kind}" if kind else ""),
            hint="`lora2edge merge` without --prove writes the merged checkpoint",
        )
    for head in _HEADS:
        if head in view.tensors and view.tensors[head].shape[0] != len(names):
            raise CheckpointError(
                "class-count",
                f"{head} has {view.tensors[head].shape[0]} rows, config.json names {len(names)} classes",
                why="which logit is which class cannot be told",
                hint="give id2label in the base's config.json one name for each row",
            )
    if "score.weight" in view.tensors and view.task == "sequence-classification" and padding_id(view) is None:
        raise CheckpointError(
            "no-pad-token",
            "the classifier names no padding token",
            why="it is a decoder: the class is read from the last token that is no padding, and neither config.json "
            "nor tokenizer_config.json says which that is",
            hint='add "pad_token_id" to config.json, the one that the adapter was trained with',
        )
    return names


def padding_id(view: Checkpoint) -> int | None:
    """The id that shorter texts are padded with: config.json's, else that of the tokenizer's padding token.

    None for a -1, as checkpoints of the first Llama have it: transformers takes it for a token that no text has, and
    reads the class of a padded text from its padding.
    """
    stored = view.config.get("pad_token_id")
    if stored is None:
        return tokenizer_padding(view.tokenizer)
    return int(stored) if int(stored) >= 0 else None


def tokenizer_padding(files: TokenizerFiles) -> int | None:
    """The id of `pad_token` in tokenizer_config.json; None where none is named, or not in tokenizer.json."""
    config, legacy = (read_tokenizer_file(files, name) for name in ("tokenizer_config.json", "special_tokens_map.json"))
    named = config.get("pad_token") or legacy.get("pad_token")
    token = named.get("content") if isinstance(named, Mapping) else named
    if not isinstance(token, str):
        return None
    source = read_tokenizer_file(files, "tokenizer.json")
    for added in source.get("added_tokens") or ():
        if added.get("content") == token:
            return int(added["id"])
    vocabulary = (source.get("model") or {}).get("vocab")
    found = vocabulary.get(token) if isinstance(vocabulary, Mapping) else None
    return int(found) if found is not None else None


def segment_count(view: Checkpoint) -> int:
    """How many kinds of segments the model tells apart: rows of its table of them; 0 where it has none."""
    return next((info.shape[0] for name, info in view.tensors.items() if name.endswith(_SEGMENTS)), 0)


def longest_text(view: Checkpoint) -> int | None:
    """Tokens that a text may have, special ones included; None where neither model nor tokenizer bounds it."""
    bounds = []
    positions = view.config.get("max_position_embeddings")
    if isinstance(positions, int):
        bounds.append(positions - position_offset(view.config))
    said = read_tokenizer_file(view.tokenizer, "tokenizer_config.json").get("model_max_length")
    if isinstance(said, int) and 0 < said < _MOST_TOKENS:
        bounds.append(said)
    return min(bounds, default=None)


def position_offset(config: Mapping[str, Any]) -> int:
    """Position of a text's first token: behind the padding token's id in RoBERTa and its kin, else 0.

    Without an id in config.json that is 1, transformers' default for all of them.
    """
    stored = config.get("pad_token_id")
    return (1 if stored is None else int(stored)) + 1 if config.get("model_type") in _OFFSET_POSITIONS else 0


def _bad_labels(why: str) -> CheckpointError:
    return CheckpointError(
        "bad-labels",
        "id2label in config.json cannot be used",
        why=why,
        hint='"id2label": {"0": "first class", "1": "second class"}',
    )
