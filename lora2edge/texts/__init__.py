"""The user's texts: read, split, rendered with the model's own chat template, tokenized once."""

from lora2edge.texts.classes import (
    check_classes,
    class_names,
    longest_text,
    padding_id,
    position_offset,
    segment_count,
)
from lora2edge.texts.coverage import describe_coverage
from lora2edge.texts.encoder import TextEncoder
from lora2edge.texts.items import prompt_key, read_items, split_items
from lora2edge.texts.labelled import (
    LabelledReader,
    labelled_digest,
    load_labelled,
    load_labelled_calibration,
    read_labelled,
    write_labelled,
)
from lora2edge.texts.renderer import Renderer, check_template
from lora2edge.texts.samples import Texts, load_calibration, load_texts, read_samples, samples_digest, write_samples
from lora2edge.texts.template import ChatTemplate, Piece, pieces

__all__ = [
    "ChatTemplate",
    "LabelledReader",
    "Piece",
    "Renderer",
    "TextEncoder",
    "Texts",
    "check_classes",
    "check_template",
    "class_names",
    "describe_coverage",
    "labelled_digest",
    "load_calibration",
    "load_labelled",
    "load_labelled_calibration",
    "load_texts",
    "longest_text",
    "padding_id",
    "pieces",
    "position_offset",
    "prompt_key",
    "read_items",
    "read_labelled",
    "read_samples",
    "samples_digest",
    "segment_count",
    "split_items",
    "write_labelled",
    "write_samples",
]
