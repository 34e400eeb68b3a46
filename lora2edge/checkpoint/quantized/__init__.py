"""Quantized base checkpoints, read as the 16-bit checkpoints that they stand for. numpy only, no GPU."""

from lora2edge.checkpoint.quantized.requantize import (
    BnbSettings,
    RequantizedCheckpoint,
    linear_names,
    requantized,
)
from lora2edge.checkpoint.quantized.view import DequantizedReader, dequantized

__all__ = [
    "BnbSettings",
    "DequantizedReader",
    "RequantizedCheckpoint",
    "dequantized",
    "linear_names",
    "requantized",
]
