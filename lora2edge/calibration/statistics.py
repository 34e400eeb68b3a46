"""The calibration pass: the merged model over the calibration text, one layer in memory at a time."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lora2edge.calibration.layers import Batch, LayeredModel
from lora2edge.calibration.layout import Layout
from lora2edge.calibration.model import require
from lora2edge.calibration.recorder import Recorder
from lora2edge.calibration.stored import (
    StoredCalibration,
    hidden_name,
    inputs_name,
    pack_stats,
    stats_name,
    store,
    unpack_stats,
)
from lora2edge.contracts import ChannelStats, Checkpoint, Progress, Sample
from lora2edge.errors import DataError
from lora2edge.journal import GrowingFile, Journal

_TRIM_LAYERS = 4
"""After so many layers memory is given back; touching it again costs a little."""


def calibrate(
    view: Checkpoint,
    samples: Sequence[Sample],
    folder: Path,
    progress: Progress,
    *,
    device: str,
    threads: int,
    dtype: str = "float32",
    layer_inputs: bool = False,
) -> StoredCalibration:
    """Statistics of the inputs and outputs of every linear layer, over all tokens of `samples`; written into `folder`.

    The mean of x² per input channel is what llama.cpp calls the importance matrix (`llama-imatrix`). The model runs in
    `dtype`: in float32 on the unrounded merged weights, or in bfloat16, which is faster on processors that multiply it.
    Squares are float32, their sums float64. What all samples begin with is run once and counted for each. The output
    layer is covered too. With `layer_inputs` what each layer is given is kept, in bfloat16.

    One layer's weights and one batch's activations are in memory; the activations between two layers are on the disk.
    In a folder from `resumable_folder` a pass that was stopped goes on with the first layer that is not finished, and
    ends with the same bytes. Raises DataError where a layer saw no token or a value is not finite.
    """
    require("torch", "transformers")
    import torch

    torch.set_num_threads(threads)
    if not any(sample.ids for sample in samples):
        raise _gap("the calibration", f"there are {len(samples)} samples, and no token in them")
    samples = [sample for sample in samples if sample.ids]
    ids = itertools.chain.from_iterable(sample.ids for sample in samples)
    model = LayeredModel(view, dtype=dtype, device=device, ids=ids)
    layout = Layout.of(samples, shares_prefix=model.shares_prefix)
    recorder = Recorder(model)
    progress.start("calibrate", model.count, "layers")
    with Journal(folder) as journal:
        done = _finished(journal, model.count, layer_inputs)
        progress.advance(done)
        for layer in range(done, model.count):
            _run_layer(model, layer, recorder, layout, journal, layer_inputs)
            progress.advance()
            if layer % _TRIM_LAYERS == _TRIM_LAYERS - 1:
                _give_back()
        model.drop()
    progress.finish()
    places: dict[str, tuple[int, int]] = {}
    for layer in range(model.count):
        stats = unpack_stats(folder / stats_name(layer))
        places.update((name, (layer, stats[name].count)) for name in stats)
    in_order = {name: places[name] for name in view.tensors if name in places}
    return store(folder, samples, in_order, layout.prefix, model.count, kept=layer_inputs)


def _give_back() -> None:
    """Freed memory that glibc keeps between blocks in use, more with every layer, goes back to the system."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _finished(journal: Journal, count: int, layer_inputs: bool) -> int:
    """How many layers need not be run again."""

    def is_whole(name: str) -> bool:
        return name in journal.marks and journal.is_whole(name, journal.marks[name].size)

    done = 0
    while done < count and is_whole(stats_name(done)) and (not layer_inputs or is_whole(inputs_name(done))):
        done += 1
    return done if done in {0, count} or is_whole(hidden_name(done)) else 0


def _run_layer(
    model: LayeredModel, layer: int, recorder: Recorder, layout: Layout, journal: Journal, layer_inputs: bool
) -> None:
    """All batches through one layer: its statistics, and what the next one is given, are on the disk afterwards."""
    last = layer == model.count - 1
    model.load(layer)
    before = _Rows(journal.folder / hidden_name(layer)) if layer else None
    after = None if last else GrowingFile(journal, hidden_name(layer + 1), ())
    kept = GrowingFile(journal, inputs_name(layer), ()) if layer_inputs and not model.is_whole else None
    try:
        with recorder.watching(layer):
            prefix = None
            for batch in (layout.first, *layout.batches()):
                if batch is None:
                    continue
                first = layout.first is not None and prefix is None
                recorder.begin(batch)
                hidden = before.read(batch, model) if before else None
                given, following, cache = model.run(batch, hidden, prefix=prefix, keep=first)
                prefix = cache if first else prefix
                if following is not None and last:
                    recorder.add_head(following)
                if after:
                    _append(after, following, batch)
                if kept:
                    _append(kept, given.bfloat16(), batch)
        stats = recorder.results(layer)
        _check(stats, model)
        for file in (after, kept):
            if file:
                file.finish()
    finally:
        for file in (after, kept):
            if file:
                file.__exit__(None, None, None)
        if before:
            before.close()
    with GrowingFile(journal, stats_name(layer), ()) as file:
        file.append(memoryview(pack_stats(stats)))
        file.finish()
    (journal.folder / hidden_name(layer)).unlink(missing_ok=True)


class _Rows:
    """What a layer is given, read in the order in which it was written."""

    def __init__(self, path: Path) -> None:
        self._handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._offset = 0

    def read(self, batch: Batch, model: LayeredModel) -> Any:
        """`[B, T, hidden]` in the model's dtype; zeros where padding is."""
        import torch

        dtype, seen = model.model.dtype, batch.seen()
        width = model.model.config.get_text_config().hidden_size
        raw = np.empty(batch.tokens * width * dtype.itemsize, np.uint8)
        if os.preadv(self._handle, [raw.data], self._offset) != len(raw):
            raise OSError(f"a file of the calibration pass is too short at {self._offset}")
        self._offset += len(raw)
        hidden = torch.zeros(*seen.shape, width, dtype=dtype)
        hidden[seen] = torch.from_numpy(raw).view(dtype).view(-1, width)
        return hidden.to(model.device)

    def close(self) -> None:
        os.close(self._handle)


def _append(file: GrowingFile, values: Any, batch: Batch) -> None:
    """The rows of `values`, `[B, T, hidden]`, that are tokens."""
    import torch

    rows = values.cpu()[batch.seen()].contiguous()
    file.append(memoryview(rows.view(torch.uint8).numpy()).cast("B"))


def _check(stats: dict[str, ChannelStats], model: LayeredModel) -> None:
    """An expert may see no token; any other layer sees all."""
    unseen = [name for name, found in stats.items() if not found.count and model.owners[name].expert is None]
    if unseen:
        raise _gap(f"{len(unseen)} layers", ", ".join(unseen[:5]))


def _gap(what: str, why: str) -> DataError:
    return DataError("calibration-gap", f"{what} saw no token", why=why, hint="give more calibration text")
