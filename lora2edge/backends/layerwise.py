"""GPTQ over a whole model, for every backend: layer by layer, each matrix for what the layers before it now give.

Within a layer, too, matrices are rounded in the order in which they run (query, key and value; output; gate and up;
down), each for the inputs that those before it give after rounding, and aimed back at the 16-bit model's outputs. The
bytes wait in files of their own, since a format's order is rarely that of the layers; a run that was stopped goes on
with the first layer that is not finished, and ends with the same bytes.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from lora2edge.calibration import Inputs, LabelledCalibration, Replay, StoredCalibration, open_calibration
from lora2edge.checkpoint import embedding_name, in_order
from lora2edge.contracts import Calibration, Checkpoint, Machine, Progress
from lora2edge.errors import DataError, UnsupportedError
from lora2edge.journal import GrowingFile, Journal
from lora2edge.quantize import Factor, GptqOptions, Gram, Rounded, RoundingLog, corrected, factorize

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lora2edge.contracts import FloatArray

    Bytes = NDArray[np.uint8]
    Shift = Callable[[int, FloatArray], NDArray[Any]]

OPTIONS = GptqOptions(sampling=1.0)
"""Measured on the medical example, from 154 calibration tokens to 12 thousand: docs/method.md."""
_CHUNK_WEIGHTS = 1 << 24
"""Rounded at a time, all rows at once: memory beside is some 30 bytes for each."""
_READ_WEIGHTS = 1 << 20
"""Read or merged at a time, by a core."""
_CHUNK_ROWS = 512
"""The least rows of a chunk: fewer make the walk over the columns slow."""
_GRAM_BYTES, _CHUNK_BYTES = 20, 30
"""Memory for each element of XᵀX and of a chunk, with all that is made of them."""
_BASE_RAM = 600 << 20
"""PyTorch and one batch."""
_FORWARD_SHARE = 3
"""Forward passes: a layer's matrices run again for each group of them."""
_HIDDEN = 5
"""Arrays as wide as the hidden state: before and after a layer, and three of its matrices' inputs."""
_OPERATIONS_PER_SECOND = 100e9
"""Of a core with AVX-512, in float32 products."""
_LAYER = re.compile(r".*?\.\d+\.")


class Encoder(Protocol):
    """What a backend's format makes of weights."""

    def encode(self, name: str, weights: FloatArray, factor: Factor, log: RoundingLog) -> Bytes:
        """The bytes of rows of tensor `name`: `[rows, columns]` float32 → `[rows, bytes]` uint8."""
        ...

    def decode(self, name: str, data: Bytes) -> FloatArray:
        """The weights that such bytes stand for: `[rows, columns]` float32."""
        ...

    def embedding(self, rows: FloatArray) -> FloatArray:
        """What becomes of rows of an embedding that is not rounded here: `[ids, hidden]` float32."""
        ...


@dataclass(frozen=True, slots=True)
class _Place:
    """Where the bytes of a tensor lie."""

    file: str
    offset: int
    row_bytes: int


class RoundedTensors:
    """What `round_layers` left in a folder. Safe to be read from several threads."""

    def __init__(self, folder: Path, files: Collection[str], places: Mapping[str, _Place], log: RoundingLog) -> None:
        self._folder, self._files, self._places = folder, files, places
        self.log = log
        """What was done to each tensor."""

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def rows(self, name: str, start: int, stop: int) -> Bytes:
        """The bytes of rows `start:stop`: `[stop - start, bytes]` uint8."""
        place = self._places[name]
        data = np.fromfile(
            self._folder / place.file,
            np.uint8,
            (stop - start) * place.row_bytes,
            offset=place.offset + start * place.row_bytes,
        )
        return data.reshape(stop - start, place.row_bytes)

    def remove(self) -> None:
        """Removes the files."""
        for file in self._files:  # one without a tensor, too
            (self._folder / file).unlink(missing_ok=True)
            (self._folder / _log_name(file)).unlink(missing_ok=True)


def round_layers(
    view: Checkpoint,
    calibration: Calibration,
    names: Collection[str],
    encoder: Encoder,
    folder: Path,
    progress: Progress,
    *,
    feedback: bool = True,
    options: GptqOptions = OPTIONS,
) -> RoundedTensors:
    """Rounds tensors of the view (linear layers, experts, the output layer) with GPTQ, into files of `folder`.

    With `feedback` each is rounded for the inputs that the layers give which were rounded before it, and aimed at the
    16-bit model's outputs; without, for the 16-bit model's inputs, in less than half the time. Of an embedding that is
    the output layer, codes are chosen before all else, for the 16-bit model's inputs. Memory: two layers in the dtype
    of the calibration pass, and of the widest matrix 20 bytes for each element of XᵀX. In a folder with a journal a run
    that was stopped goes on. Raises DataError where the calibration kept no layer inputs.
    """
    log = RoundingLog()
    if not names:
        return RoundedTensors(folder, (), {}, log)
    stored = calibration if isinstance(calibration, StoredCalibration) else open_calibration(calibration.path)
    if isinstance(stored, LabelledCalibration):
        raise UnsupportedError(
            "classifier-gptq",
            "GPTQ does not round classifiers",
            why="of their texts no layer inputs are kept",
            hint="choose plain rounding in the target's options",
        )
    with Journal(folder) as journal:
        replay = Replay(view, stored, folder, feedback=journal if feedback else None)
        work = _Work(view, replay, set(names), encoder, journal, progress, options)
        _refuse_gap(set(names) - set(replay.model.owners))
        order = work.order()
        progress.start("round", sum(view.tensors[name].size for name in names), "weights")
        done = work.finished(order)
        for unit in order:
            if unit in done:
                progress.advance(sum(view.tensors[name].size for name in work.names_of(unit)))
            else:
                work.run(unit)
        progress.finish()
        places: dict[str, _Place] = {}
        for unit in order:
            found, entries = _read_log(folder / _log_name(_file_name(unit)))
            places.update(found)
            log.extend(entries)
        replay.remove_files()
    _refuse_gap(set(names) - set(places))
    return RoundedTensors(folder, list(map(_file_name, order)), places, log)


@dataclass(frozen=True, slots=True)
class RoundingCost:
    """What `round_layers` needs at most."""

    ram_bytes: int
    disk_bytes: int
    """Of the hidden states between two layers, and the inputs of one layer's matrices."""
    seconds: float


def rounding_cost(view: Checkpoint, names: Collection[str], tokens: int, machine: Machine) -> RoundingCost:
    """Told from shapes: `tokens` of calibration text through float32 layers, one matrix' inputs after another's."""
    tensors = [view.tensors[name] for name in names]
    layers: Counter[str] = Counter()
    for tensor in tensors:
        layers[found[0] if (found := _LAYER.match(tensor.name)) else tensor.name] += tensor.size
    weights, widest = sum(layers.values()), max((tensor.shape[1] for tensor in tensors), default=0)
    largest_layer = max((size for name, size in layers.items() if _LAYER.match(name)), default=0)
    embedding = embedding_name(view.tensors)
    hidden = view.tensors[embedding].shape[1] if embedding else 0
    inputs = sum(tensor.shape[1] ** 2 for tensor in tensors)
    operations = 2.0 * _FORWARD_SHARE * weights * tokens + 3 * inputs * tokens
    operations += sum(6.0 * tensor.size * tensor.shape[1] + tensor.shape[1] ** 3 for tensor in tensors)
    return RoundingCost(
        ram_bytes=_BASE_RAM + 8 * largest_layer + _GRAM_BYTES * widest**2 + _CHUNK_BYTES * _CHUNK_WEIGHTS,
        disk_bytes=4 * tokens * (_HIDDEN * hidden + widest),
        seconds=operations / (machine.operations_per_second or _OPERATIONS_PER_SECOND * max(1, machine.cores)),
    )


class _Work:
    """One run. A unit of work is a layer, by its number, or behind the last the output layer."""

    def __init__(
        self,
        view: Checkpoint,
        replay: Replay,
        names: set[str],
        encoder: Encoder,
        journal: Journal,
        progress: Progress,
        options: GptqOptions,
    ) -> None:
        self._view, self._replay, self._names, self._encoder = view, replay, names, encoder
        self._journal, self._progress, self._options = journal, progress, options

    def order(self) -> list[int]:
        """The units; an output layer that is the embedding comes first, since it is what the first layer is given."""
        layers, head = list(range(self._replay.count)), [self._replay.count] * bool(self.names_of(self._replay.count))
        return [*head, *layers] if self._replay.is_tied else [*layers, *head]

    def names_of(self, unit: int) -> list[str]:
        """The tensors to be rounded in it."""
        if unit == self._replay.count:
            return [name for name in self._replay.head if name in self._names]
        owners, head = self._replay.model.owners, set(self._replay.head)
        return [name for name in self._names - head if owners[name].layer == unit]

    def finished(self, order: list[int]) -> set[int]:
        """Units that an earlier run finished."""
        is_whole = self._journal.is_whole
        whole = {unit for unit in order if is_whole(_file_name(unit)) and is_whole(_log_name(_file_name(unit)))}
        if whole == set(order) or not self._replay.has_feedback:
            return whole
        passed = self._replay.finished()  # what the next layer is given has to be there as well
        if not whole >= set(range(passed)):
            passed = 0
        return set(range(passed)) | whole & {self._replay.count} if self._replay.is_tied else set(range(passed))

    def run(self, unit: int) -> None:
        """Rounds what is in the unit."""
        log, places = RoundingLog(), dict[str, _Place]()
        with GrowingFile(self._journal, _file_name(unit), ()) as file:
            if unit == self._replay.count:
                self._round(self.names_of(unit), self._replay.head_inputs(), file, places, log)
            else:
                if unit == 0 and self._replay.has_feedback:
                    self._replay.change_embedding(self._embedding)
                for group in self._replay.open(unit):
                    wanted = [name for name in group if name in self._names]
                    if wanted:
                        self._round(wanted, self._replay.inputs(group), file, places, log)
            file.finish()
        told = {
            "places": {name: asdict(place) for name, place in places.items()},
            "log": list(map(asdict, log.entries)),
        }
        with GrowingFile(self._journal, _log_name(_file_name(unit)), ()) as file:
            file.append(memoryview(json.dumps(told, sort_keys=True).encode()))
            file.finish()
        if unit < self._replay.count:
            self._replay.close(follow=unit != self.order()[-1])

    def _round(
        self,
        names: list[str],
        batches: Iterable[Inputs],
        file: GrowingFile,
        places: dict[str, _Place],
        log: RoundingLog,
    ) -> None:
        """Tensors that are given the same, one after another."""
        factor, shift = self._factor(names, batches)
        for name in names:
            rows, columns = self._view.tensors[name].shape
            step = max(_CHUNK_WEIGHTS // columns // _CHUNK_ROWS, 1) * _CHUNK_ROWS
            offset = file.size
            for start in range(0, rows, step):
                weights = self._read(name, start, min(start + step, rows))
                if shift:
                    weights = _corrected(weights, start, shift, factor)
                data = self._encoder.encode(name, weights, factor, log)
                file.append(data.reshape(-1).data)
                places[name] = _Place(file.name, offset, data.shape[1])
                if self._replay.has_feedback and name not in self._replay.head:
                    self._replay.put(name, start, self._encoder.decode(name, data))
                self._progress.advance(weights.size)

    def _factor(self, names: list[str], batches: Iterable[Inputs]) -> tuple[Factor, Shift | None]:
        """XᵀX of the inputs, factored; and, where there is a reference R, what makes W (R − X)ᵀX of rows of W."""
        rows, columns = self._view.tensors[names[0]].shape
        # The product with a matrix of few rows is less work to add up than what it is a product with.
        weights = self._read(names[0], 0, rows) if len(names) == 1 and 2 * rows < columns else None
        gram: Gram | None = None
        for batch in batches:
            if gram is None and batch.reference is None:
                gram = Gram(columns)
            gram = gram or Gram(columns, paired=True, weights=weights)
            gram.add(batch.values, batch.reference, batch.times)
        gram = gram or Gram(columns)  # an expert that no token was sent to
        factor = factorize(gram.mean(), gram.tokens, self._options, rows=gram.rows, dropped_tokens=gram.dropped_tokens)
        difference = gram.mean_difference()
        if difference is None:
            return factor, None
        if weights is not None:
            return factor, lambda start, part: difference[start : start + len(part)]
        return factor, lambda start, part: _product(part, difference)

    def _read(self, name: str, start: int, stop: int) -> FloatArray:
        columns = self._view.tensors[name].shape[1]
        weights = np.empty((stop - start, columns), np.float32)
        step = max(_READ_WEIGHTS // columns, 1)

        def read(first: int) -> None:
            weights[first - start : first - start + step] = self._view.rows(name, first, min(first + step, stop))

        for _ in in_order(read, range(start, stop, step)):
            pass
        return weights

    def _embedding(self, ids: NDArray[np.int64], rows: FloatArray) -> FloatArray:
        """The quantized model's rows of the embedding."""
        if self.order()[0] != self._replay.count:
            return self._encoder.embedding(rows)
        (name,) = self.names_of(self._replay.count)
        places, _ = _read_log(self._journal.folder / _log_name(_file_name(self._replay.count)))
        stored = RoundedTensors(self._journal.folder, (), places, RoundingLog())
        return self._encoder.decode(name, np.concatenate([stored.rows(name, row, row + 1) for row in ids.tolist()]))


def _refuse_gap(missed: Collection[str]) -> None:
    if missed:
        raise DataError(
            "rounding-gap",
            f"{len(missed)} matrices were never multiplied with anything",
            why=", ".join(sorted(missed)[:5]),
        )


def _corrected(weights: FloatArray, start: int, shift: Shift, factor: Factor) -> FloatArray:
    """`quantize.corrected` of rows from `start` on: some at a time, each on one core, so that the bits do not depend on
    how many there are."""

    def correct(first: int) -> FloatArray:
        part = weights[first : first + _CHUNK_ROWS]
        return corrected(part, shift(start + first, part), factor)

    return np.concatenate([part for _, part in in_order(correct, range(0, len(weights), _CHUNK_ROWS))])


def _product(weights: FloatArray, difference: NDArray[Any]) -> NDArray[Any]:
    with np.errstate(over="ignore", invalid="ignore"):  # a correction that is not finite is not made
        return np.asarray(weights @ difference)


def _file_name(unit: int) -> str:
    return f"rounded-{unit:04}.bin"


def _log_name(file: str) -> str:
    return file.removesuffix(".bin") + ".json"


def _read_log(path: Path) -> tuple[dict[str, _Place], list[Rounded]]:
    """Where the tensors of a unit lie, and what was done to them."""
    told = json.loads(path.read_text(encoding="utf-8"))
    return {name: _Place(**place) for name, place in told["places"].items()}, [Rounded(**e) for e in told["log"]]
