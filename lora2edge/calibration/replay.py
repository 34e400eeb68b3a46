"""Layers run again on what they were given: for matrices such as XᵀX, made layer by layer on request and dropped.

Beside the merged model there can be a second one: the layers that a backend has quantized so far. It is given what
these layers give (the feedback stream), which is each target's own.
"""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora2edge.calibration.hidden import HiddenStates, append_states
from lora2edge.calibration.layers import Batch, LayeredModel, Reached
from lora2edge.calibration.model import part_of, require
from lora2edge.calibration.recorder import Recorder
from lora2edge.calibration.stored import StoredCalibration, hidden_name
from lora2edge.contracts import Checkpoint
from lora2edge.journal import GrowingFile, Journal

if TYPE_CHECKING:
    from lora2edge.calibration.embedding import Change
    from lora2edge.contracts import FloatArray


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a tensor is multiplied with, of some tokens."""

    values: FloatArray
    """`[tokens, channels]` float32, no padding: of the quantized layers where there are any."""
    reference: FloatArray | None
    """The same tokens in the merged model; None where `values` are that already, and of experts, to which the two
    models may send other tokens."""
    times: int
    """How many times they count: what all samples begin with is run once."""


class Replay:
    """The merged model's layers, each on its stored inputs; with `feedback` the quantized ones beside them.

    To be used layer by layer: `open`, then for one group after the other `inputs` and, with feedback, `put`, then
    `close`. One layer is in memory, with feedback two. Both models are run with the settings of the calibration pass.
    """

    def __init__(
        self, view: Checkpoint, calibration: StoredCalibration, scratch: Path, *, feedback: Journal | None = None
    ) -> None:
        """`scratch`: a folder on a disk with room for the inputs of one layer's matrices, in files without a name.
        `feedback`: the journal of the folder in which hidden states lie between two layers. Raises DataError where the
        pass did not keep what each layer was given."""
        require("torch", "transformers")
        import torch

        calibration.inputs_path(0)  # before a model is made
        self._view, self._calibration, self._scratch, self._feedback = view, calibration, scratch, feedback
        torch.set_num_threads(calibration.settings.threads)
        ids = {token for sample in calibration.samples for token in sample.ids}
        device, dtype = calibration.settings.device, calibration.settings.dtype
        self.model = LayeredModel(view, dtype=dtype, device=device, ids=ids)
        for layer in range(calibration.layers + (self.model.causal and self.model.head is not None)):
            calibration.check_inputs(layer, self.model.width)
        self._recorder = Recorder(self.model)
        self._kept: dict[str, _KeptInputs] = {}
        """What the merged model's groups of the open layer are given, by their first tensor."""
        self._changed: dict[str, Any] = {}
        """Parameters of the open layer that are quantized, by path."""

    @property
    def count(self) -> int:
        """Layers."""
        return self.model.count

    @property
    def has_feedback(self) -> bool:
        """Whether there is a quantized model beside the merged one."""
        return self._feedback is not None

    @property
    def is_tied(self) -> bool:
        """Whether the output layer is the embedding."""
        return self.model.is_tied

    @property
    def head(self) -> list[str]:
        """The output layer's tensor, which may be the embedding's; empty where there is none."""
        return [name for name, owner in self.model.owners.items() if owner.path == self.model.head]

    def finished(self) -> int:
        """Of how many layers the quantized outputs are on the disk."""
        assert self._feedback
        layers = range(self.count, 0, -1)
        return next((layer for layer in layers if self._feedback.is_whole(hidden_name(layer))), 0)

    def change_embedding(self, change: Change) -> None:
        """Gives the quantized model its embedding. `change(ids, rows)`: rows of the merged one for the ids that occur,
        ascending, to those of the quantized one; `[ids, hidden]` float32."""
        self.model.embedding.change(change)

    def open(self, layer: int) -> list[list[str]]:
        """Brings the layer into memory. Returns its tensors, in the order in which they are multiplied with something;
        those that are given the same (q, k and v; gate and up) are one group, as are an expert's gate and up.
        """
        self.model.load(layer)
        self._layer = layer
        groups: dict[str, list[str]] = {}
        number, shared, first = 0, None, ""

        def note(name: str, inputs: Any, times: int) -> None:
            nonlocal shared, first
            if inputs is not shared:
                shared, first = inputs, name
                if name not in groups:
                    groups[name], self._kept[name] = [], _KeptInputs(self._scratch)
                if self._is_compared(name):
                    self._kept[name].append(number, inputs)
            if name not in groups[first]:
                groups[first].append(name)

        run = _Run()
        with self._stored(layer) as states, self._recorder.watching(layer, note):
            for number, batch in enumerate(self._calibration.layout.all_batches()):  # noqa: B007
                self._run(batch, states, run)
        unseen: dict[tuple[str, int | None], list[str]] = {}
        for name, owner in self.model.owners.items():
            if (
                owner.layer == layer
                and owner.expert is not None
                and not any(name in group for group in groups.values())
            ):
                unseen.setdefault((owner.path, owner.expert), []).append(name)
        return [*groups.values(), *unseen.values()]

    def inputs(self, group: Sequence[str]) -> Iterator[Inputs]:
        """What the tensors of a group of the open layer are given, batch by batch, in one order."""
        kept = self._kept.get(group[0], _KeptInputs(self._scratch))
        if not self._feedback:
            for number, batch in enumerate(self._calibration.layout.all_batches()):
                if (values := kept.read(number)) is not None:
                    yield Inputs(values, None, batch.times)
            return
        run = _Run()
        with self._given() as given, self._quantized():
            for number, batch in enumerate(self._calibration.layout.all_batches()):
                if (values := self._until(group, batch, given, run)) is not None:
                    yield Inputs(values, kept.read(number), batch.times)

    def head_inputs(self) -> Iterator[Inputs]:
        """What the output layer is given: in the merged model, and in the quantized one once its layers are closed."""
        closed = self._feedback is not None and self.finished() == self.count
        with contextlib.ExitStack() as stack:
            stored = stack.enter_context(self._stored(self.count))
            given = stack.enter_context(self._hidden(self.count)) if closed else None
            for batch in self._calibration.layout.all_batches():
                found = stored.read_rows(batch.tokens).float().numpy()
                if given is None:
                    yield Inputs(found, None, batch.times)
                else:
                    yield Inputs(given.read_rows(batch.tokens).float().numpy(), found, batch.times)

    def put(self, name: str, start: int, rows: FloatArray) -> None:
        """From here on the quantized model has these rows of a tensor of the open layer."""
        import torch

        path = self.model.home(name)
        module, _, key = path.rpartition(".")
        if path not in self._changed:
            self._changed[path] = self.model.modules[module]._parameters[key].detach().clone()
        part_of(self._changed[path], self._view, name)[start : start + len(rows)] = torch.from_numpy(rows)

    def close(self, *, follow: bool = True) -> None:
        """Drops the layer; where anything is to `follow` it, what the quantized one gives is on the disk before."""
        if self._feedback and follow:
            name, run = hidden_name(self._layer + 1), _Run()
            with self._given() as given, self._quantized(), GrowingFile(self._feedback, name, ()) as file:
                for batch in self._calibration.layout.all_batches():
                    append_states(file, self._run(batch, given, run), batch)
                file.finish()
            (self._feedback.folder / hidden_name(self._layer)).unlink(missing_ok=True)
        for kept in self._kept.values():
            kept.close()
        self._kept.clear()
        self._changed.clear()
        self.model.drop()

    def remove_files(self) -> None:
        """Nothing is to follow any more: the hidden states go."""
        if self._feedback:
            for layer in range(self.count + 1):
                (self._feedback.folder / hidden_name(layer)).unlink(missing_ok=True)

    def _is_compared(self, name: str) -> bool:
        """Whether the merged model's inputs of a tensor are of use: of experts only without a second model."""
        return not self._feedback or self.model.owners[name].expert is None

    def _until(self, group: Sequence[str], batch: Batch, states: HiddenStates | None, run: _Run) -> FloatArray | None:
        """What a group is given by one batch; None where that is nothing."""
        found: list[FloatArray] = []
        ends = batch is not self._calibration.layout.first
        """Of the prefix all is run: the length of the layers' caches is the position of the tokens behind it."""

        def take(name: str, inputs: Any, times: int) -> None:
            if name == group[0]:
                found.append(inputs.float().cpu().numpy())
                if ends:
                    raise Reached

        with self._recorder.watching(self._layer, take):
            self._run(batch, states, run)
        return found[0] if found else None

    def _run(self, batch: Batch, states: HiddenStates | None, run: _Run) -> Any:
        """One batch through the open layer. `states`: what it is given; None: the embedding."""
        first = batch is self._calibration.layout.first
        hidden = states.read(batch).to(self.model.dtype).to(self.model.device) if states else None
        self._recorder.begin(batch)
        _, following, cache = self.model.run(batch, hidden, prefix=run.prefix, keep=first)
        run.prefix = cache if first else run.prefix
        return following

    def _stored(self, layer: int) -> HiddenStates:
        """What the merged model's layer is given."""
        import torch

        return HiddenStates(self._calibration.inputs_path(layer), torch.bfloat16, self.model.width)

    def _hidden(self, layer: int) -> HiddenStates:
        """What the quantized model's layer is given."""
        assert self._feedback
        return HiddenStates(self._feedback.folder / hidden_name(layer), self.model.dtype, self.model.width)

    def _given(self) -> contextlib.AbstractContextManager[HiddenStates | None]:
        """The same of the open layer; None for the first, which is given the embedding."""
        return self._hidden(self._layer) if self._feedback and self._layer else contextlib.nullcontext()

    @contextlib.contextmanager
    def _quantized(self) -> Iterator[None]:
        """Within the block the open layer has its quantized weights."""
        import torch

        kept = {}
        for path, values in self._changed.items():
            module, _, key = path.rpartition(".")
            parameters = self.model.modules[module]._parameters
            kept[path] = parameters, key, parameters[key]
            parameters[key] = torch.nn.Parameter(values, requires_grad=False)
        try:
            yield
        finally:
            for parameters, key, values in kept.values():
                parameters[key] = values


@dataclass(slots=True)
class _Run:
    """All batches, one after the other."""

    prefix: Any = None
    """Keys and values of what all samples begin with."""


class _KeptInputs:
    """What one group is given, batch by batch, in a file without a name: gone with the process, however it ends."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file: Any = None
        self._places: dict[int, tuple[int, tuple[int, ...]]] = {}
        """Of each batch, by number: where it lies, and its shape."""
        self._dtype: Any = None

    def append(self, number: int, values: Any) -> None:
        """Keeps `[tokens, channels]` of a batch."""
        import torch

        self._file = self._file or tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115
        rows = values.cpu().contiguous()
        self._places[number], self._dtype = (self._file.tell(), tuple(rows.shape)), rows.dtype
        self._file.write(memoryview(rows.view(torch.uint8).numpy()).cast("B"))

    def read(self, number: int) -> FloatArray | None:
        """The same as float32; None where there is nothing."""
        import torch

        if number not in self._places:
            return None
        offset, shape = self._places[number]
        self._file.seek(offset)
        raw = bytearray(self._file.read(math.prod(shape) * self._dtype.itemsize))
        found: FloatArray = torch.frombuffer(raw, dtype=self._dtype).view(shape).float().numpy()
        return found

    def close(self) -> None:
        """Gives the file back."""
        if self._file:
            self._file.close()
