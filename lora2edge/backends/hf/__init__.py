"""Hugging Face safetensors: the baseline, the merged checkpoint, what vLLM and TGI serve."""

from lora2edge.backends.hf.backend import HfBackend
from lora2edge.backends.hf.session import HfSession, open_baseline, open_merged
from lora2edge.backends.hf.write import write_checkpoint

__all__ = ["HfBackend", "HfSession", "open_baseline", "open_merged", "write_checkpoint"]
