"""Several adapters placed on one base: what is done exactly, and a refusal by name for what cannot be."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from lora2edge.adapters.ends import Change, Placement
from lora2edge.adapters.joint import Joint, Member
from lora2edge.adapters.kinds.lora import AddedBias, ExpertStack, LowRank
from lora2edge.adapters.kinds.tokens import TokenRows, TokensBelow
from lora2edge.adapters.methods import FACTORED, SEQUENCE, SUM, TRUNCATED, Combination
from lora2edge.adapters.places import place_adapter
from lora2edge.adapters.read import Adapter
from lora2edge.checkpoint import embedding_name, tokenizer_files
from lora2edge.contracts import Base, TensorInfo
from lora2edge.errors import AdapterError, InputError, refuse
from lora2edge.storage import sha256_file

NO_LIVE_FORM = "no live reference, only the float32 formula"
"""What the report says of a baseline that PEFT cannot compute."""


def combine_placements(
    base: Base, adapters: Sequence[Adapter], combination: Combination
) -> tuple[Placement, list[frozenset[str]]]:
    """The placements of all adapters as one, and the names of the tensors that each changes.

    Raises AdapterError, or Refusals, for what the method cannot do exactly. Reads no weight of an adapter.
    """
    placed = [place_adapter(base, adapter) for adapter in adapters]
    if any(placement.task for placement in placed):
        raise AdapterError(
            "combine-whole",
            "an adapter makes a classifier of the language model, with a head that has no share in a sum",
            why=f"its head is saved whole; --combine {combination.method}",
            hint="--combine sequence, the classifier last",
        )
    added = _added(placed)
    changes: list[dict[str, Change]] = [dict(placement.changes) for placement in placed]
    _untie_all(base, placed, changes)
    names = list(dict.fromkeys(name for each in changes for name in each))
    groups = {name: _members(name, adapters, changes) for name in names}
    rank = _rank(adapters, combination)
    refuse(_problems(groups, adapters, combination))
    joined: dict[str, Change] = {}
    for name, members in groups.items():
        if not members:  # an untied copy, or a new bias of zeros
            joined[name] = next(each[name] for each in changes if name in each)
        elif len(members) == 1 and (_is_whole(members[0].change) or _is_as_it_is(members[0], combination)):
            joined[name] = members[0].change
        else:
            shape = (added.get(name) or base.tensors[name]).shape
            joint = Joint(base, name, shape, tuple(members), combination, rank)
            joined[name] = replace(members[0].change, part=joint, transposed=False)
    config = {key: value for placement in placed for key, value in placement.config.items()}
    touched = [frozenset(name for name, change in each.items() if change.whole or change.part) for each in changes]
    return Placement(joined, tuple(added.values()), config), touched


def has_live_form(adapters: Sequence[Adapter], combination: Combination) -> bool:
    """Whether PEFT, with these adapters live, computes what the merged weights do.

    It does for one adapter as it was trained, and for a weighted sum of plain LoRA adapters, all active at once. One of
    them may be a DoRA of weight 1, where it is the first that is active: its forward takes what the ones before it
    added for the base's own output. Nothing live equals what add_weighted_adapter makes of rsLoRA, biases or DoRA.
    """
    if not adapters or (len(adapters) == 1 and adapters[0].weight == 1):
        return True
    doras = [adapter for adapter in adapters if adapter.config.get("use_dora")]
    return (
        combination.method == SUM
        and not doras[1:]
        and all(
            adapter.config["peft_type"] == "LORA"
            and not adapter.saved
            and not adapter.replaced
            and (adapter not in doras or adapter.weight == 1)
            and all(
                isinstance(part, AddedBias) or (isinstance(part, LowRank) and part.start is None)
                for part in adapter.parts.values()
            )
            for adapter in adapters
        )
    )


def check_together(adapters: Sequence[Adapter], combination: Combination) -> None:
    """Refuses weights, folders and tokenizers that make no sense together. All refusals at once."""
    errors: list[InputError] = []
    for adapter in adapters:
        if not math.isfinite(adapter.weight) or adapter.weight == 0:
            errors.append(bad_weight(adapter.path.name, adapter.weight))
        elif combination.method == SEQUENCE and adapter.weight != 1:
            errors.append(
                AdapterError(
                    "adapter-weight", f"{adapter.path.name} has the weight {adapter.weight} in a sequence",
                    why="there each adapter acts on the model that it was trained on, as it was trained",
                    hint="leave the weight out, or take --combine sum",
                )
            )  # fmt: skip
    if len(adapters) < 2 and combination.method not in {SUM, SEQUENCE}:
        errors.append(
            AdapterError(
                "combine-method", f"{combination.method} needs several adapters, {len(adapters)} given",
                why="PEFT ignores the method where there is one, and adds it as it is",
                hint="give another --adapter, or leave --combine out",
            )
        )  # fmt: skip
    paths = [adapter.path.resolve() for adapter in adapters]
    for path in dict.fromkeys(path for path in paths if paths.count(path) > 1):
        errors.append(
            AdapterError(
                "adapter-twice", f"{path.name} was given {paths.count(path)} times",
                why="it would be applied that often",
                    hint=f"name it once, as --adapter {path.name}=2 where that is meant",
            )
        )  # fmt: skip
    if combination.method != SEQUENCE:
        errors.extend(_other_tokenizers(adapters))
    refuse(errors)


def bad_weight(name: str, weight: object) -> AdapterError:
    return AdapterError(
        "adapter-weight",
        f"{name} has the weight {weight}",
        why="a weight is a finite number, and not 0",
        hint="--adapter PATH=0.5; an adapter of weight 0 is left out",
    )


def _added(placed: Iterable[Placement]) -> dict[str, TensorInfo]:
    """Of two that add a tensor, one may have resized it: the longer."""
    added: dict[str, TensorInfo] = {}
    for placement in placed:
        for info in placement.added:
            known = added.get(info.name)
            added[info.name] = info if known is None or info.shape > known.shape else known
    return added


def _untie_all(base: Base, placed: Sequence[Placement], changes: Sequence[dict[str, Change]]) -> None:
    """Where one adapter unties the output head, what another did to the one tied weight it did to both."""
    embedding = embedding_name(base.tensors)
    untied = {
        name
        for placement in placed
        for name, change in placement.changes.items()
        if name not in base.tensors and embedding is not None and change.source == embedding
    }
    for each in changes:
        for name in untied - each.keys():
            if embedding in each:
                each[name] = each[embedding]


def _members(name: str, adapters: Sequence[Adapter], changes: Sequence[Mapping[str, Change]]) -> list[Member]:
    return [
        Member(index, adapter.weight, each[name])
        for index, (adapter, each) in enumerate(zip(adapters, changes, strict=True))
        if name in each and (each[name].whole or each[name].part)
    ]


def _is_whole(change: Change) -> bool:
    """Whether the adapter says what the tensor, or rows of it, are, and not what is added."""
    return change.whole is not None or isinstance(change.part, TokenRows | TokensBelow)


def _is_plain(part: LowRank) -> bool:
    return part.magnitude is None and part.start is None


def _is_as_it_is(member: Member, combination: Combination) -> bool:
    return combination.method == SUM and member.weight == 1


def _problems(
    groups: Mapping[str, Sequence[Member]], adapters: Sequence[Adapter], combination: Combination
) -> list[InputError]:
    """What cannot be done exactly: each kind of problem once, with the first tensors that have it."""
    method = combination.method
    found: dict[Callable[[str], AdapterError], list[str]] = {}
    twice, weighted = partial(_whole_twice, method), partial(_whole_weighted)
    factors, ranks, ends = partial(_not_plain, method), partial(_other_ranks, method), partial(_other_way, method)
    for name, members in groups.items():
        wholes = [member for member in members if _is_whole(member.change)]
        parts = [member.change.part for member in members]
        if wholes and len(members) > 1:
            found.setdefault(twice, []).append(name)
        elif wholes and wholes[0].weight != 1:
            found.setdefault(weighted, []).append(name)
        elif method != SUM and any(isinstance(part, TokensBelow) for part in parts):
            found.setdefault(factors, []).append(name)
        elif not wholes and method in FACTORED:
            pairs = [part for part in parts if isinstance(part, LowRank) and _is_plain(part)]
            if any(part not in pairs and not isinstance(part, AddedBias) for part in parts):
                found.setdefault(factors, []).append(name)
            elif len({part.rank for part in pairs}) > 1:
                found.setdefault(ranks, []).append(name)
            elif len({part.shape for part in pairs}) > 1:
                found.setdefault(ends, []).append(name)
    return [make(_listed(names)) for make, names in found.items()]


def _whole_twice(method: str, names: str) -> AdapterError:
    return AdapterError(
        "combine-whole",
        f"an adapter replaces weights that another one changes too: {names}",
        why=f"modules_to_save and trained tokens are whole weights; {method} has no rule for two of them",
        hint="--combine sequence, where the second was trained on the first; else train with one of them",
    )


def _whole_weighted(names: str) -> AdapterError:
    return AdapterError(
        "combine-whole",
        f"an adapter with a weight other than 1 replaces weights of the base: {names}",
        why="modules_to_save and trained tokens are whole weights, no changes that can be scaled",
        hint="leave its weight out",
    )


def _not_plain(method: str, names: str) -> AdapterError:
    return AdapterError(
        "combine-kind",
        f"{method} combines the factors of plain LoRA pairs, and these are adapted otherwise: {names}",
        why="PEFT drops DoRA's magnitudes without a word, and refuses experts' stacks and other kinds",
        hint=f"--combine sum and --combine {'svd' if method == 'linear' else f'{method}_svd'} take any change",
    )


def _other_ranks(method: str, names: str) -> AdapterError:
    return AdapterError(
        "combine-rank",
        f"{method} adds factors, and the adapters' ranks differ: {names}",
        why="factors of different ranks have different shapes",
        hint="--combine sum, or svd with --svd-rank, take any ranks",
    )


def _other_way(method: str, names: str) -> AdapterError:
    return AdapterError(
        "combine-kind",
        f"{method} adds factors, and one adapter has them as the embedding's, one as the head's: {names}",
        why="embedding and output head are one weight in the base",
        hint="--combine sum takes both",
    )


def _rank(adapters: Sequence[Adapter], combination: Combination) -> int:
    """What a truncated decomposition keeps: as asked for, else the largest rank of the adapters, as in PEFT."""
    if combination.svd_rank is not None or combination.method not in TRUNCATED:
        return combination.svd_rank or 0
    ranks = []
    for adapter in adapters:
        for part in adapter.parts.values():
            if isinstance(part, LowRank | ExpertStack):
                ranks.append(part.rank)
            elif not isinstance(part, AddedBias | TokenRows):
                raise AdapterError(
                    "combine-option",
                    f"{combination.method} needs --svd-rank: {adapter.path.name} is no LoRA",
                    why="the changes that its kind makes have no rank of their own",
                    hint="--svd-rank 64",
                )
    return max(ranks, default=1)


def _other_tokenizers(adapters: Sequence[Adapter]) -> list[InputError]:
    """Two adapters that bring different tokenizers or templates: only one of them could be right."""
    seen: dict[str, tuple[str, str]] = {}
    errors: list[InputError] = []
    for adapter in adapters:
        for name, path in tokenizer_files(adapter.path).items():
            here = (sha256_file(path), adapter.path.name)
            before = seen.setdefault(name, here)
            if before[0] != here[0]:
                errors.append(
                    AdapterError(
                        "combine-tokenizer",
                        f"{before[1]} and {here[1]} each bring a {name}, and they differ",
                        why="the merged model can have one tokenizer and one chat template",
                        hint=f"remove {name} from the adapter whose prompts will not be used",
                    )
                )
    return errors


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
