"""What the stages hand to each other. Imports no heavy library, so that every layer can use it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from lora2edge.target import Target

    FloatArray = NDArray[np.float32]
    IntArray = NDArray[np.int64]

Task = Literal["causal-lm", "masked-lm", "seq2seq-lm", "sequence-classification", "token-classification"]
CLASSIFICATIONS: tuple[Task, ...] = ("sequence-classification", "token-classification")
Message = Mapping[str, str]
"""`{"role": "user", "content": "…"}`"""

# ---------------------------------------------------------------- checkpoints


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One stored tensor, as its header gives it."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    """As safetensors writes it: "F32", "F16", "BF16", "I64", …"""
    shard: str
    """File name inside the checkpoint folder."""

    @property
    def size(self) -> int:
        """Number of elements."""
        total = 1
        for length in self.shape:
            total *= length
        return total


@dataclass(frozen=True, slots=True)
class StoredBytes:
    """A range of a file that can be copied as it stands."""

    path: Path
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class AdapterRef:
    """An adapter folder and the weight that it is added with."""

    path: str
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class CheckpointRef:
    """Opens the same view in another process: a base folder and the adapters merged into it."""

    base: str
    adapters: tuple[AdapterRef, ...] = ()
    requantized: Mapping[str, Any] | None = None
    """Settings of bitsandbytes where the base's weights are those that 4-bit training on it saw."""
    trust_remote_code: bool = False
    """Whether the user allowed to run the code that the base comes with, in PyTorch."""
    combine: Mapping[str, Any] | None = None
    """How the adapters become one change (`adapters.Combination`); None: their weighted sum."""

    @staticmethod
    def of(base: Path | str, *adapters: Path | str) -> CheckpointRef:
        """A base folder and adapter folders."""
        return CheckpointRef(str(base), tuple(AdapterRef(str(adapter)) for adapter in adapters))

    @property
    def is_combined(self) -> bool:
        """Whether it is more than one adapter as it was trained."""
        return len(self.adapters) > 1 or any(adapter.weight != 1 for adapter in self.adapters)

    @property
    def alone(self) -> CheckpointRef:
        """The same base without adapters."""
        return replace(self, adapters=())

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> CheckpointRef:
        adapters = tuple(AdapterRef(**item) for item in data["adapters"])
        return CheckpointRef(**{**data, "adapters": adapters})


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """Where a checkpoint's tokenizer, chat template and generation config come from.

    An adapter folder wins over the base folder, file by file, and the tokenizer files go together:
    `tokenizer.json` and `tokenizer_config.json` are never mixed from two folders.
    """

    files: Mapping[str, Path] = field(default_factory=dict)
    """File name → path: `tokenizer.json`, `tokenizer_config.json`, `chat_template.jinja`, …"""


class Checkpoint(Protocol):
    """Config, tokenizer and lazy tensors; plain or merged, consumers can't tell which."""

    @property
    def config(self) -> Mapping[str, Any]: ...
    @property
    def tokenizer(self) -> TokenizerFiles: ...
    @property
    def task(self) -> Task: ...
    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Names as in the files, in the files' order."""
        ...

    @property
    def ref(self) -> CheckpointRef: ...

    def rows(self, name: str, start: int, stop: int) -> FloatArray:
        """Rows `start:stop` (along the first axis) of `name`, float32, unrounded; `[stop - start, …]`.

        The array is the caller's own. Safe to call from several threads, as `delta` is. For a tensor whose stored
        dtype is not a float, raises CheckpointError.
        """
        ...

    def delta(self, name: str, start: int, stop: int) -> FloatArray | None:
        """Rows `start:stop` of the change ΔW that adapters make to `name`, float32; None where they make none."""
        ...

    def stored(self, name: str) -> StoredBytes | None:
        """Where the tensor's bytes lie on disk, unchanged; None where the view computes them."""
        ...

    def module_names(self, name: str) -> list[str]:
        """File name → the parameter name(s) of the same weight in transformers 5, which fuses experts."""
        ...

    def close(self) -> None: ...


class Base(Checkpoint, Protocol):
    """A checkpoint that adapters can be merged into: one that lies in a folder, and says what its files hold."""

    @property
    def path(self) -> Path: ...
    @property
    def is_quantized(self) -> bool:
        """Whether weights of it are made from quantized ones."""
        ...

    def fingerprint(self) -> dict[str, Any]:
        """What the cache keys on, JSON-ready: hashes of small files; header, size, mtime and inode of large ones."""
        ...

    def file_hashes(self) -> dict[str, str]:
        """File name → sha256 of every file that is used, weights included."""
        ...


# ---------------------------------------------------------------- text


@dataclass(frozen=True, slots=True)
class Item:
    """One line of the user's data."""

    messages: tuple[Message, ...]
    """Ends with the assistant's message, the reference response."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """Other short string fields of the line, e.g. `topic` and `lang`."""

    @property
    def prompt(self) -> tuple[Message, ...]:
        return self.messages[:-1]

    @property
    def response(self) -> str:
        return self.messages[-1]["content"]


@dataclass(frozen=True, slots=True)
class Sample:
    """One rendered and tokenized item: prompt, then response with its end marker."""

    ids: tuple[int, ...]
    prompt_length: int
    item: Item

    @property
    def positions(self) -> range:
        """The positions whose next token is a response token: what perplexity and KL are taken over."""
        return range(self.prompt_length - 1, len(self.ids) - 1)

    @property
    def targets(self) -> tuple[int, ...]:
        """The response tokens: what each of `positions` predicts."""
        return self.ids[self.prompt_length :]


@dataclass(frozen=True, slots=True)
class Encoded:
    """A text, or a pair of texts, as a classifier takes it."""

    ids: tuple[int, ...]
    types: tuple[int, ...] = ()
    """Segment ids (`token_type_ids`), one for each id; empty: all are 0."""


@dataclass(frozen=True, slots=True)
class LabelledItem:
    """One line of a classifier's data: a text (or a pair) of one class, or words of one class each."""

    gold: tuple[int | None, ...]
    """Class index of the text, or of each word; None: the word is not scored."""
    text: str = ""
    pair: str | None = None
    words: tuple[str, ...] = ()
    """Not empty where tokens are classified; then there is no text."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """Other short string fields of the line."""


@dataclass(frozen=True, slots=True)
class LabelledSample:
    """One encoded item of a classifier's data."""

    encoded: Encoded
    positions: tuple[int, ...]
    """Tokens whose logits are scored, the first one of each word; `(0,)` where the whole text is classified, whose
    logits are one row."""
    targets: tuple[int, ...]
    """The class index of each of `positions`."""
    item: LabelledItem

    @property
    def ids(self) -> tuple[int, ...]:
        return self.encoded.ids


AnySample = Sample | LabelledSample
"""Both have `ids`, and `targets` at `positions`."""

# ---------------------------------------------------------------- calibration


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


# ---------------------------------------------------------------- artifacts


MANIFEST = "manifest.json"
"""The manifest's file name in an artifact's folder."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """What an artifact is made of: deterministic; no time, absolute path, host name or figure."""

    schema: int
    target: str
    backend: str
    task: Task
    key: str
    """Hash of everything that determines the files: what the cache looks for."""
    inputs: Mapping[str, Any]
    """Names and sha256 of base shards, adapter files, tokenizer files, calibration set."""
    options: Mapping[str, Any]
    """The resolved target."""
    versions: Mapping[str, str]
    files: Mapping[str, str]
    """File name → sha256."""
    notes: Mapping[str, Any] = field(default_factory=dict)
    """Facts of the lowering that are not figures: tensor types, tokenizer differences by class, …"""
    account: Mapping[str, Mapping[str, Sequence[str]]] = field(default_factory=dict)
    """What became of every tensor of base and adapter (`MergedCheckpoint.account`)."""

    def to_json(self) -> str:
        """Canonical JSON: sorted keys, two spaces, a final newline."""
        return json.dumps(asdict(self), sort_keys=True, indent=2, ensure_ascii=False) + "\n"

    @staticmethod
    def from_json(text: str) -> Manifest:
        return Manifest(**json.loads(text))


@dataclass(frozen=True, slots=True)
class Artifact:
    """A folder that a backend wrote, with its manifest."""

    path: Path
    manifest: Manifest

    @property
    def size_bytes(self) -> int:
        return sum((self.path / name).stat().st_size for name in self.manifest.files)


@dataclass(frozen=True, slots=True)
class TensorDamage:
    """What lowering did to one tensor, computed from the finished file."""

    name: str
    """Name in the checkpoint."""
    type: str
    """Stored type in the artifact, e.g. "Q4_K"."""
    layer: int | None
    relative_error: float
    """‖Q − W‖ / ‖W‖, Frobenius."""
    delta_kept: float | None
    """⟨Q − W_base, ΔW⟩ / ‖ΔW‖²: 1 = all of the adapter's change is still there; None where nothing was adapted."""
    delta_noise: float | None
    """‖Q − W‖ / ‖ΔW‖: above 1 the rounding is larger than the change that the adapter made."""


# ---------------------------------------------------------------- backends and sessions


@dataclass(frozen=True, slots=True)
class Machine:
    """What the plan must know of the machine."""

    cores: int
    ram_bytes: int
    """Available now, not installed."""
    disk_bytes: int
    """Free on the output's file system."""
    cuda: str | None
    """Name of the first GPU, where torch sees one."""
    operations_per_second: float | None = None
    """In float32 matrix products, on all cores; None: measured where it is needed."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a lowering will need, stated in the plan."""

    ram_bytes: int
    disk_bytes: int
    """Of the artifact."""
    seconds: float
    scratch_bytes: int = 0
    """On the disk besides, while it is written."""
    max_length: int | None = None
    """Longest sequence that the artifact can hold, where it is shorter than the checkpoint's."""
    layer_inputs: bool = False
    """Whether the calibration pass has to keep what each layer is given: GPTQ's rounding needs it."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class SessionOptions:
    """How a session is opened, JSON-ready with `asdict`."""

    device: str
    """"cpu" or "cuda"."""
    threads: int
    slots: int
    """Requests that are served together."""
    max_length: int
    """Tokens of prompt and response together, per slot."""
    trust_remote_code: bool = False
    """Whether code that comes with a checkpoint may be run."""


@dataclass(frozen=True, slots=True)
class SessionFacts:
    """What a session runs on: printed beside every figure that it gives."""

    backend: str
    device: str
    dtype: str
    slots: int
    """Requests that are decoded together."""
    threads: int
    max_length: int
    """Tokens of prompt and response together, per slot."""
    batching: str
    """How concurrent requests are served, in words."""
    build: str
    """The kernels' build, e.g. "xllamacpp 2026.10.11549 prebuilt (AVX2)"."""
    versions: Mapping[str, str] = field(default_factory=dict)
    reference: str = ""
    """Of a baseline: what it is, where PEFT cannot compute the combination of adapters live."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen. Greedy is what measurements use."""

    temperature: float = 0.0


GREEDY = Sampling()


class Session(Protocol):
    """An opened artifact, or the baseline."""

    @property
    def facts(self) -> SessionFacts: ...

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of the rendered conversation, with the generation prompt: the runtime's own tokenizer."""
        ...

    def logits(self, batch: Sequence[Sequence[int]], keep: Sequence[Sequence[int]]) -> Iterator[FloatArray]:
        """For each sequence of `batch`, in order: `[len(keep[i]), V]` float32, logits at the kept positions."""
        ...

    def generate(
        self, ids: Sequence[int], *, max_new: int, stop: Sequence[int], sampling: Sampling = GREEDY
    ) -> Iterator[int]:
        """New token ids, one by one, without the stop token. Thread-safe: queues beyond the slots.

        Closing the iterator cancels the request. An empty `stop` generates `max_new` tokens, whatever they are.
        """
        ...

    def close(self) -> None: ...


class Classifier(Protocol):
    """An opened artifact, or the baseline, where the task is a classification."""

    @property
    def facts(self) -> SessionFacts: ...
    @property
    def labels(self) -> Sequence[str]:
        """Names of the classes, in the order of the logits."""
        ...

    def encode(self, text: str, pair: str | None = None) -> Encoded:
        """Token ids with the special tokens that the model was trained with: the runtime's own tokenizer."""
        ...

    def classify(self, batch: Sequence[Encoded]) -> list[FloatArray]:
        """For each text, in order, float32 logits: `[labels]`, or `[tokens, labels]` where tokens are classified.

        The batch runs at once, padded on the right; which texts are in it changes a logit by rounding only.
        """
        ...

    def close(self) -> None: ...


class Backend(Protocol):
    """Lowers a checkpoint to one runtime's format and opens the result."""

    name: str
    extra: str
    """pip install 'lora2edge[<extra>]'; "" where the core is enough."""

    def check(self, checkpoint: Checkpoint, target: Target, machine: Machine) -> Estimate:
        """What lowering will need. Reads no weight; raises all refusals at once."""
        ...

    def lower(
        self,
        checkpoint: Checkpoint,
        target: Target,
        calibration: Calibration | None,
        out: Path,
        progress: Progress,
    ) -> Lowered:
        """Writes the artifact's files into the existing folder `out` (the caller renames it whole).

        It is empty, or holds what a killed call with equal arguments finished, as `journal.Journal(out)` tells.
        """
        ...

    def open(self, path: Path, target: Target, options: SessionOptions) -> Session | Classifier:
        """Opens the files that `lower` wrote: a Classifier where the checkpoint's task is a classification."""
        ...

    def damage(self, checkpoint: Checkpoint, path: Path, progress: Progress) -> list[TensorDamage]:
        """Reads the finished file back and compares it with the checkpoint, tensor by tensor."""
        ...

    def doctor(self) -> BackendHealth:
        """Whether this backend works here, and why not. Never raises."""
        ...


@runtime_checkable
class Finalizing(Protocol):
    """What a backend may offer besides: work that can only be done on the machine that runs the artifact."""

    def finalize(self, path: Path, target: Target, progress: Progress) -> Mapping[str, Any]:
        """Writes into the artifact's folder what `open` then prefers, with a stamp of what it is for; whole or not at
        all. The artifact's own files stay as they are.

        Returns at least `folder` (where it was written), `size_bytes`, and `reused`: whether it was there already.
        """
        ...


@dataclass(frozen=True, slots=True)
class Lowered:
    """What a lowering has to say for the manifest."""

    versions: Mapping[str, str]
    notes: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class BackendHealth:
    """One line of `lora2edge doctor`."""

    name: str
    works: bool
    detail: str
    """Versions and the kernels' build where it works, the reason where it does not."""
    hint: str = ""


class Progress(Protocol):
    """Where long work says how far it is. Silent in a pipe, a bar on a terminal, JSON lines in a stage process."""

    def start(self, what: str, total: int, unit: str = "") -> None: ...
    def advance(self, amount: int = 1) -> None: ...
    def finish(self) -> None: ...
