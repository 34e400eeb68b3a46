"""What a calibration pass leaves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from lora2edge.contracts.texts import LabelledSample, Sample

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    FloatArray = NDArray[np.float32]


QUANTILES = (0.99, 0.999, 0.9999)
"""Of the magnitudes in one array that ChannelStats gives."""


@dataclass(frozen=True, slots=True)
class ChannelStats:
    """Statistics of the inputs and outputs of one linear layer, or of one expert's, over all calibration tokens."""

    mean_square: FloatArray
    """`[channels]` float32: mean of x² of the inputs, the importance matrix of llama.cpp; zeros where count is 0."""
    count: int
    """Tokens seen; 0 only for an expert that none was sent to."""
    input_maxima: FloatArray | None = None
    """`[channels]` float32: largest |x| of each input channel."""
    input_quantiles: FloatArray | None = None
    """`[3]` float32: QUANTILES of |x| over all inputs and channels, of every eighth token, at most 0.8 % too large."""
    output_maxima: FloatArray | None = None
    """`[outputs]` float32: largest |y| of each output channel, bias included; None for the output layer."""
    output_quantiles: FloatArray | None = None
    """`[3]` float32: QUANTILES of |y|; of an expert's fused gate and up projection, over both."""


class Calibration(Protocol):
    """A folder in the build cache."""

    @property
    def path(self) -> Path: ...
    @property
    def samples(self) -> Sequence[Sample]:
        """Empty where the task is a classification."""
        ...

    @property
    def classified(self) -> Sequence[LabelledSample]:
        """A classifier's samples; empty for a language model. There are no statistics beside them: whoever needs
        ranges runs `encoded` through what it made."""
        ...

    @property
    def names(self) -> Sequence[str]:
        """The weights (checkpoint tensor names) that statistics exist for."""
        ...

    def vectors(self, name: str) -> ChannelStats:
        """Statistics of the inputs of weight `name`; KeyError where none were taken."""
        ...

    def layer_inputs(self, layer: int) -> Iterator[FloatArray]:
        """What decoder layer `layer` is given, sample by sample: `[tokens, hidden]` float32, rounded to bfloat16.

        Token t of an array is at position t. Raises DataError where they were not kept.
        """
        ...
