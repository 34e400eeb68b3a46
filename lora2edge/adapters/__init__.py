"""PEFT adapters: read and checked, then merged as a lazy view."""

from lora2edge.adapters.combine import has_live_form
from lora2edge.adapters.merge import MergedCheckpoint, merge, open_base, open_view
from lora2edge.adapters.methods import Combination
from lora2edge.adapters.read import Adapter, read_adapter
from lora2edge.adapters.written import written_config

__all__ = [
    "Adapter",
    "Combination",
    "MergedCheckpoint",
    "has_live_form",
    "merge",
    "open_base",
    "open_view",
    "read_adapter",
    "written_config",
]
