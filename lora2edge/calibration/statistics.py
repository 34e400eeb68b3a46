"""The calibration pass: the merged model over the calibration text, one layer in memory at a time."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
from collections.abc import Sequence
from pathlib import Path

from lora2edge.calibration.hidden import HiddenStates, append_states
from lora2edge.calibration.layers import LayeredModel
from lora2edge.calibration.layout import Layout
from lora2edge.calibration.model import require
from lora2edge.calibration.recorder import Recorder
from lora2edge.calibration.stored import (
    Settings,
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
    settings = Settings(device, dtype, threads)
    return store(folder, samples, in_order, layout.prefix, model.count, settings, kept=layer_inputs)


def _give_back() -> None:
    """Freed memory that glibc keeps between blocks in use, more with every layer, goes back to the system."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _finished(journal: Journal, count: int, layer_inputs: bool) -> int:
    """How many layers need not be run again."""
    is_whole, done = journal.is_whole, 0
    while done < count and is_whole(stats_name(done)) and (not layer_inputs or is_whole(inputs_name(done))):
        done += 1
    return done if done in {0, count} or is_whole(hidden_name(done)) else 0


def _run_layer(
    model: LayeredModel, layer: int, recorder: Recorder, layout: Layout, journal: Journal, layer_inputs: bool
) -> None:
    """All batches through one layer: its statistics, and what the next one is given, are on the disk afterwards."""
    last, kept = layer == model.count - 1, layer_inputs and not model.is_whole
    before = journal.folder / hidden_name(layer)
    model.load(layer)
    with contextlib.ExitStack() as open_files:

        def grow(name: str, wanted: bool) -> list[GrowingFile]:
            return [open_files.enter_context(GrowingFile(journal, name, ()))] if wanted else []

        hidden_after = grow(hidden_name(layer + 1), not last)
        inputs = grow(inputs_name(layer), kept)
        head_inputs = grow(inputs_name(layer + 1), kept and last and model.causal and model.head is not None)
        states = open_files.enter_context(HiddenStates(before, model.dtype, model.width)) if layer else None
        prefix = None
        with recorder.watching(layer):
            for batch in layout.all_batches():
                first = batch is layout.first
                recorder.begin(batch)
                hidden = states.read(batch).to(model.device) if states else None
                given, following, cache = model.run(batch, hidden, prefix=prefix, keep=first)
                prefix = cache if first else prefix
                if following is not None and last:
                    recorder.add_head(following)
                for file in hidden_after:
                    append_states(file, following, batch)
                for file in inputs:
                    append_states(file, given.bfloat16(), batch)
                for file in head_inputs:
                    append_states(file, following.bfloat16(), batch)
        stats = recorder.results(layer)
        _check(stats, model)
        for file in (*hidden_after, *inputs, *head_inputs):
            file.finish()
    with GrowingFile(journal, stats_name(layer), ()) as file:
        file.append(memoryview(pack_stats(stats)))
        file.finish()
    before.unlink(missing_ok=True)


def _check(stats: dict[str, ChannelStats], model: LayeredModel) -> None:
    """An expert may see no token; any other layer sees all."""
    unseen = [name for name, found in stats.items() if not found.count and model.owners[name].expert is None]
    if unseen:
        raise _gap(f"{len(unseen)} layers", ", ".join(unseen[:5]))


def _gap(what: str, why: str) -> DataError:
    return DataError("calibration-gap", f"{what} saw no token", why=why, hint="give more calibration text")
