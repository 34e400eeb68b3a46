"""Hugging Face safetensors: the baseline, the merged checkpoint, what vLLM and TGI serve."""

from lora2edge.backends.hf.backend import HfBackend
from lora2edge.backends.hf.classifier import HfClassifier, open_live_classifier, open_merged_classifier
from lora2edge.backends.hf.session import HfSession, open_baseline, open_merged
from lora2edge.backends.hf.write import write_checkpoint

__all__ = [
    "HfBackend",
    "HfClassifier",
    "HfSession",
    "open_baseline",
    "open_live_classifier",
    "open_merged",
    "open_merged_classifier",
    "write_checkpoint",
]
