"""`peft_type` → what reads that kind of adapter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lora2edge.adapters.kinds import adalora, boft, ia3, loha, lokr, lora, oft, vera
from lora2edge.adapters.parts import Part
from lora2edge.checkpoint import TensorReader

Read = Callable[[Mapping[str, Any], TensorReader, Mapping[str, str]], list[Part]]


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of adapter."""

    label: str
    """What people call it."""
    read: Read
    """(configuration, tensors, path in the model → name in the file) → parts. Leaves other kinds' tensors alone."""
    keys: frozenset[str]
    """Settings that it handles or that have no effect after training."""


KINDS: Mapping[str, Kind] = {
    "LORA": Kind("LoRA", lora.read, lora.KEYS),
    "ADALORA": Kind("AdaLoRA", adalora.read, adalora.KEYS),
    "LOHA": Kind("LoHa", loha.read, loha.KEYS),
    "LOKR": Kind("LoKr", lokr.read, lokr.KEYS),
    "IA3": Kind("IA³", ia3.read, ia3.KEYS),
    "OFT": Kind("OFT", oft.read, oft.KEYS),
    "BOFT": Kind("BOFT", boft.read, boft.KEYS),
    "VERA": Kind("VeRA", vera.read, vera.KEYS),
}
