"""What the stages of a build do differently for a language model and for a classifier, decided in one place."""

from __future__ import annotations

from lora2edge.contracts import CLASSIFICATIONS, Task
from lora2edge.tasks.classification import Classification
from lora2edge.tasks.language import Language
from lora2edge.tasks.tools import Tools

__all__ = ["Tools", "tools_for"]


def tools_for(task: Task) -> Tools:
    """The tools for a checkpoint of that task. For one that cannot be measured, their `check` says so."""
    return Classification() if task in CLASSIFICATIONS else Language()
