"""What the stages hand to each other. Imports no heavy library, so that every layer can use it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora2edge.contracts.artifact import MANIFEST, Artifact, Manifest, TensorDamage
from lora2edge.contracts.backend import Backend, BackendHealth, Estimate, Finalizing, Lowered, Machine, Progress
from lora2edge.contracts.calibration import QUANTILES, Calibration, ChannelStats
from lora2edge.contracts.checkpoint import (
    CLASSIFICATIONS,
    AdapterRef,
    Base,
    Checkpoint,
    CheckpointRef,
    StoredBytes,
    Task,
    TensorInfo,
    TokenizerFiles,
)
from lora2edge.contracts.session import GREEDY, Classifier, Sampling, Session, SessionFacts, SessionOptions
from lora2edge.contracts.texts import AnySample, Encoded, Item, LabelledItem, LabelledSample, Message, Sample

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    FloatArray = NDArray[np.float32]
    IntArray = NDArray[np.int64]

__all__ = [
    "CLASSIFICATIONS",
    "GREEDY",
    "MANIFEST",
    "QUANTILES",
    "AdapterRef",
    "AnySample",
    "Artifact",
    "Backend",
    "BackendHealth",
    "Base",
    "Calibration",
    "ChannelStats",
    "Checkpoint",
    "CheckpointRef",
    "Classifier",
    "Encoded",
    "Estimate",
    "Finalizing",
    "Item",
    "LabelledItem",
    "LabelledSample",
    "Lowered",
    "Machine",
    "Manifest",
    "Message",
    "Progress",
    "Sample",
    "Sampling",
    "Session",
    "SessionFacts",
    "SessionOptions",
    "StoredBytes",
    "Task",
    "TensorDamage",
    "TensorInfo",
    "TokenizerFiles",
]
