"""The user's texts: read, split, rendered with the model's own chat template, tokenized once."""

from lora2edge.texts.coverage import describe_coverage
from lora2edge.texts.items import prompt_key, read_items, split_items
from lora2edge.texts.renderer import Renderer, check_template
from lora2edge.texts.samples import Texts, load_calibration, load_texts, read_samples, samples_digest, write_samples
from lora2edge.texts.template import ChatTemplate, Piece, pieces

__all__ = [
    "ChatTemplate",
    "Piece",
    "Renderer",
    "Texts",
    "check_template",
    "describe_coverage",
    "load_calibration",
    "load_texts",
    "pieces",
    "prompt_key",
    "read_items",
    "read_samples",
    "samples_digest",
    "split_items",
    "write_samples",
]
