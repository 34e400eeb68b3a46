"""lora2edge: from a LoRA adapter to a measured artifact for on-prem servers."""

__version__ = "0.1.0"
