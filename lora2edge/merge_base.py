"""Which base an adapter is merged into: the original, or what training in 4 bits made of it.

A QLoRA adapter (arXiv 2305.14314) learned on the dequantized weights of a quantized base. Merged into those it is
the model that was trained; merged into the original it is another one, often no worse. Both can be had, and measured.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora2edge.adapters import Adapter
from lora2edge.checkpoint import BnbSettings, StoredCheckpoint, open_checkpoint, requantized
from lora2edge.contracts import Base
from lora2edge.errors import CheckpointError, InputError
from lora2edge.forecast import stored_dtype
from lora2edge.recipe import PLAIN_TRAINING, QUANTIZED_TRAININGS, QuantizedTraining, Recipe

ORIGINAL, DEQUANTIZED, MEASURE = "original", "dequantized", "measure"

_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_QUANTIZED_NAME = re.compile(
    r"(?<![a-z0-9])(?P<method>bnb|[48][-_]?bit|nf4|int[48]|gptq|awq|fp8|w[48]a16)(?![a-z0-9])", re.IGNORECASE
)
_4BIT = {"bnb", "4bit", "4-bit", "4_bit", "nf4"}
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True, slots=True)
class MergeBases:
    """The bases that the adapters can be merged into, and how one of them is chosen."""

    trained: Base
    """What the adapters were trained on: the live model that everything is measured against has it."""
    candidates: Mapping[str, Base]
    """By name, `original` or `dequantized`; both where one is measured against the other."""
    method: str
    """`measure`, or the name of the only candidate."""

    @property
    def quantized(self) -> bool:
        """Whether the adapters were trained on a quantized base."""
        return DEQUANTIZED in self.candidates or self.trained is not self.candidates[ORIGINAL]

    @property
    def trained_on(self) -> dict[str, Any]:
        """Settings of bitsandbytes, or the folder's name, of the quantized base; JSON-ready."""
        ref = self.trained.ref
        return {"settings": ref.requantized, "folder": None if ref.requantized else self.trained.path.name}

    def record(self, chosen: str) -> dict[str, Any] | None:
        """What the manifest says of it; None where there was no quantized base. Reads the files of a packed one."""
        if not self.quantized:
            return None
        files = None if self.trained.ref.requantized else self.trained.file_hashes()
        return {"chosen": chosen, "method": self.method, "trained_on": {**self.trained_on, "files": files}}


def find_bases(recipe: Recipe, base: StoredCheckpoint, adapters: Sequence[Adapter]) -> MergeBases:
    """The bases for `adapters`, from the recipe and from what the adapters say. Reads headers only.

    Raises InputError where the recipe asks for what is not there, and where an adapter names a quantized base that
    is neither given nor denied: its baseline would silently be another model.
    """
    trained = _trained_base(recipe, base, adapters)
    asked = recipe.merge_base
    if trained is base and not base.is_quantized:
        if asked:
            raise InputError(
                "merge-base",
                f"--merge-base {asked}: there is one base only",
                why="the base is not quantized, and nothing says that the adapter was trained on a quantized one",
                hint="--trained-on nf4-double (or nf4, fp4, fp4-double, or the folder of the quantized base)",
            )
        return MergeBases(base, {ORIGINAL: base}, ORIGINAL)
    if trained is base:
        if asked in (ORIGINAL, MEASURE):
            raise InputError(
                "merge-base",
                f"--merge-base {asked}: the original base is not given",
                why=f"{base.path} holds quantized weights",
                hint=f"--base ORIGINAL --trained-on {base.path}",
            )
        return MergeBases(base, {DEQUANTIZED: base}, DEQUANTIZED)
    both: dict[str, Base] = {DEQUANTIZED: trained, ORIGINAL: base}
    if asked in both:
        return MergeBases(trained, {asked: both[asked]}, asked)
    return MergeBases(trained, both, MEASURE)


def refuse_unmeasured(bases: MergeBases) -> None:
    """Raises InputError where a base would have to be chosen by measuring: for verbs that were given no text."""
    if bases.method == MEASURE:
        raise InputError(
            "merge-base-unmeasured",
            "the adapter was trained on a quantized base, and no text is given to choose the base of the merge by",
            why="merged into the dequantized base it is the model that was trained; the original may serve as well",
            hint="--data FILE.jsonl, or --merge-base dequantized",
        )


def as_built(recipe: Recipe, recorded: Mapping[str, Any] | None) -> Recipe:
    """`recipe` with the base of the merge that a manifest records, and its training where the recipe says nothing."""
    if not recorded:
        return recipe
    update: dict[str, Any] = {"merge_base": recorded["chosen"]}
    settings = recorded["trained_on"]["settings"]
    if recipe.trained_on is None and settings:
        names = {value: key for key, value in _DTYPES.items()}
        update["trained_on"] = QuantizedTraining.model_validate({**settings, "dtype": names[settings["dtype"]]})
    return recipe.model_copy(update=update)


def same_choice(one: Mapping[str, Any] | None, other: Mapping[str, Any] | None) -> bool:
    """Whether two records are of the same training and the same base of the merge, however that was chosen."""
    if not one or not other:
        return not one and not other
    return (one["chosen"], one["trained_on"]) == (other["chosen"], other["trained_on"])


def _trained_base(recipe: Recipe, base: StoredCheckpoint, adapters: Sequence[Adapter]) -> Base:
    said = recipe.trained_on
    if said is None:
        return _named_base(recipe, base, adapters)
    if said == PLAIN_TRAINING:
        if base.is_quantized:
            raise _contradiction(base, "it was trained on a base that was not quantized")
        return base
    if isinstance(said, str) and said.lower() in QUANTIZED_TRAININGS:
        said = QUANTIZED_TRAININGS[said.lower()]
    if isinstance(said, QuantizedTraining):
        if base.is_quantized:
            raise _contradiction(base, "a base is quantized for training from the original")
        return requantized(base, _settings(said, base))
    if said == "int8":
        raise InputError(
            "trained-on",
            "--trained-on int8 is not known",
            why="LLM.int8() rounds activations too; of its weights only a saved base tells the exact values",
            hint="--trained-on FOLDER, a base that was saved with load_in_8bit=True",
        )
    if "/" not in said and not Path(said).exists():
        raise InputError(
            "trained-on",
            f"--trained-on {said} is neither a folder nor known",
            why=f"known: {', '.join(QUANTIZED_TRAININGS)}, {PLAIN_TRAINING}",
            hint="--trained-on nf4-double, or the folder or hub id of a quantized base",
        )
    trained = open_checkpoint(said, trust_remote_code=recipe.trust_remote_code)
    if not trained.is_quantized:
        raise InputError(
            "trained-on",
            f"{said} is not quantized",
            why="--trained-on is the quantized base that training saw; a plain one is the base itself",
            hint=f"--base {said}",
        )
    return _fitting(trained, base)


def _named_base(recipe: Recipe, base: StoredCheckpoint, adapters: Sequence[Adapter]) -> Base:
    """The base that the adapters name, where that is quantized and --base is not; else `base`."""
    if recipe.base is None or base.is_quantized:
        return base
    for name in dict.fromkeys(filter(None, (adapter.base_model_name_or_path for adapter in adapters))):
        if Path(name).is_dir():
            if Path(name).resolve() == base.path:
                continue
            try:
                named = open_checkpoint(name, trust_remote_code=recipe.trust_remote_code)
            except InputError:
                continue  # it is not asked for, and what is wrong with it is no matter of this build
            if named.is_quantized:
                return _fitting(named, base)
        elif (found := _QUANTIZED_NAME.search(name)) and not _QUANTIZED_NAME.search(base.path.name):
            raise _unknown(name, found["method"].lower())
    return base


def _unknown(name: str, method: str) -> InputError:
    """The refusal where an adapter names a quantized base that is not at hand."""
    known = [name] if _HUB_ID.fullmatch(name) else []
    known += ["nf4-double", "nf4"] if method in _4BIT else [] if known else ["FOLDER"]
    return InputError(
        "trained-on-unknown",
        f"the adapter names {name}, by its name a quantized base, and --base is not quantized",
        why="the live adapter on the base that it was trained on is what the build is measured against",
        hint=f"--trained-on {' or '.join(known)}; or {PLAIN_TRAINING} where training did not quantize",
    )


def _fitting(trained: StoredCheckpoint, base: StoredCheckpoint) -> StoredCheckpoint:
    """`trained`, where it has the same weights as `base`."""
    differing = [
        name
        for name in {**base.tensors, **trained.tensors}
        if name not in base.tensors
        or name not in trained.tensors
        or base.tensors[name].shape != trained.tensors[name].shape
    ]
    if not differing:
        return trained
    raise CheckpointError(
        "other-base",
        f"{trained.path} is not {base.path}, quantized",
        why=f"{len(differing)} tensors are in one only or differ in shape, such as {differing[0]}",
        hint="give the original of the quantized base with --base",
    )


def _settings(said: QuantizedTraining, base: StoredCheckpoint) -> BnbSettings:
    names = None if said.names is None else tuple(said.names)
    dtype = _DTYPES[said.dtype or stored_dtype(base)]
    return BnbSettings(said.quant_type, said.double_quant, dtype, said.blocksize, said.kernel, names)


def _contradiction(base: StoredCheckpoint, why: str) -> InputError:
    return InputError(
        "trained-on",
        f"{base.path} is quantized itself",
        why=why,
        hint="leave --trained-on out, or give the original with --base",
    )
