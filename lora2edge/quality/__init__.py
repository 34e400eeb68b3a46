"""Whether the fine-tune survived: merge proof, perplexity, divergence, gain kept, accuracy, gates."""

from lora2edge.quality.choice import choose_nearest
from lora2edge.quality.classifier import (
    CLASSIFIER,
    measure_classifier,
    open_classifier_reference,
    record_classifier,
)
from lora2edge.quality.gates import judge
from lora2edge.quality.measure import measure_quality
from lora2edge.quality.proof import MergeProof, join_proofs, verify_merge
from lora2edge.quality.reference import Reference, open_reference, record_reference

__all__ = [
    "CLASSIFIER",
    "MergeProof",
    "Reference",
    "choose_nearest",
    "join_proofs",
    "judge",
    "measure_classifier",
    "measure_quality",
    "open_classifier_reference",
    "open_reference",
    "record_classifier",
    "record_reference",
    "verify_merge",
]
