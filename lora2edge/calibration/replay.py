"""One layer run again on what it was given: for matrices such as XᵀX, made layer by layer on request and dropped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lora2edge.calibration.layers import Batch, LayeredModel
from lora2edge.calibration.recorder import Recorder
from lora2edge.calibration.stored import StoredCalibration
from lora2edge.contracts import Checkpoint

Visit = Callable[[str, Any, int], None]
"""Called with a checkpoint tensor's name, what is multiplied with it (torch, `[tokens, channels]`, no padding), and how
many times that counts."""


class Replay:
    """The merged model's layers, each on its stored inputs. The model is never in memory whole."""

    def __init__(
        self, view: Checkpoint, calibration: StoredCalibration, *, device: str, dtype: str = "float32"
    ) -> None:
        self._calibration = calibration
        ids = {token for sample in calibration.samples for token in sample.ids}
        self.model = LayeredModel(view, dtype=dtype, device=device, ids=ids)
        self._recorder = Recorder(self.model)

    def visit(self, layer: int, visit: Visit) -> None:
        """Calls `visit` for every linear layer and expert that runs with `layer`, batch by batch, in one order.

        Tensors that are given the same (q, k and v; gate and up) are visited one after another with the same object.
        The inputs are those of the pass, rounded to bfloat16 where they enter the layer. Raises DataError where they
        were not kept.
        """
        import torch

        rows = self._calibration.layer_rows(layer)
        layout = self._calibration.layout
        self.model.load(layer)
        prefix, start = None, 0
        first: Batch | None = layout.first
        with self._recorder.watching(layer, visit):
            for batch in (first, *layout.batches()):
                if batch is None:
                    continue
                raw = torch.from_numpy(rows[start : start + batch.tokens].astype("int16", casting="unsafe"))
                start += batch.tokens
                seen = batch.seen()
                hidden = torch.zeros(*seen.shape, raw.shape[1], dtype=self.model.model.dtype)
                hidden[seen] = raw.view(torch.bfloat16).to(hidden.dtype)
                self._recorder.begin(batch)
                done = self.model.run(batch, hidden.to(self.model.device), prefix=prefix, keep=batch is first)
                prefix = done[2] if batch is first else prefix
                if self.model.causal and layer == self.model.count - 1:
                    self._recorder.add_head(done[1])
        self.model.drop()
