"""A plain checkpoint folder behind the Checkpoint contract."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora2edge.checkpoint.layers import find_missing
from lora2edge.checkpoint.modules import module_name
from lora2edge.checkpoint.quantized import DequantizedReader, dequantized
from lora2edge.checkpoint.reader import TensorReader
from lora2edge.checkpoint.source import Source, missing_source, read_json_file, resolve_source
from lora2edge.checkpoint.tokenizer import tokenizer_files, vocabulary_size
from lora2edge.checkpoint.tying import says_tied
from lora2edge.contracts import CheckpointRef, StoredBytes, Task, TensorInfo, TokenizerFiles
from lora2edge.errors import CheckpointError, InputError, refuse
from lora2edge.storage import sha256_file

if TYPE_CHECKING:
    from lora2edge.contracts import FloatArray

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

_TASKS: dict[str, Task] = {
    "ForCausalLM": "causal-lm",
    "LMHeadModel": "causal-lm",
    "ForMaskedLM": "masked-lm",
    "ForSequenceClassification": "sequence-classification",
    "ForTokenClassification": "token-classification",
}
_SEQ2SEQ = {"T5ForConditionalGeneration", "MT5ForConditionalGeneration"}
"""By their whole name: models that see or hear end in ForConditionalGeneration too."""
_SHARED = "shared.weight"
"""What T5's encoder, decoder and head share."""
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")
_HEADS = ("lm_head.weight", "embed_out.weight", "output.weight")
_CODE = ("*.py", "*.tiktoken")
_TO_SAFETENSORS = (
    "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW) writes safetensors; do it where you trust "
    "the file, because loading a pickle runs code"
)


class StoredCheckpoint:
    """A checkpoint folder as transformers writes it. Reads headers when opened, weights when asked.

    A quantized one looks like the plain one that it stands for: its config says nothing of quantization, and rows are
    dequantized when they are asked for.
    """

    def __init__(
        self,
        source: Source,
        config: dict[str, Any],
        task: Task,
        reader: TensorReader | DequantizedReader,
        *,
        trust_remote_code: bool = False,
    ) -> None:
        self.source = source
        self.path = source.folder
        self._config = config
        self._task = task
        self._trust_remote_code = trust_remote_code
        self._reader = reader
        self._tokenizer = TokenizerFiles({**tokenizer_files(source.folder), **_code_files(source.folder, config)})
        self._hashes: dict[str, str] | None = None

    @property
    def config(self) -> Mapping[str, Any]:
        return self._config

    @property
    def tokenizer(self) -> TokenizerFiles:
        return self._tokenizer

    @property
    def task(self) -> Task:
        return self._task

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._reader.tensors

    @property
    def is_quantized(self) -> bool:
        """Whether the files hold quantized weights, of which `rows` gives the values."""
        return not isinstance(self._reader, TensorReader)

    @property
    def ref(self) -> CheckpointRef:
        return CheckpointRef(str(self.path), trust_remote_code=self._trust_remote_code)

    def rows(self, name: str, start: int, stop: int) -> FloatArray:
        return self._reader.rows(name, start, stop)

    def delta(self, name: str, start: int, stop: int) -> FloatArray | None:
        return None

    def stored(self, name: str) -> StoredBytes | None:
        return self._reader.bytes_at(name)

    def module_names(self, name: str) -> list[str]:
        return [module_name(self._config, name)]

    def close(self) -> None:
        self._reader.close()

    def fingerprint(self) -> dict[str, Any]:
        """What the cache keys on: full hashes of small files; header hash, size, mtime and inode of each shard."""
        shards = {
            name: shard_fingerprint(self.path / name, header.sha256) for name, header in self._reader.headers.items()
        }
        return {"shards": shards, "files": {path.name: sha256_file(path) for path in self._small_files()}}

    def file_hashes(self) -> dict[str, str]:
        """File name → sha256 of every file that is used, weights included; each is read once, however often asked."""
        if self._hashes is None:
            paths = [*self._small_files(), *(self.path / name for name in self._reader.headers)]
            with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
                self._hashes = dict(zip((path.name for path in paths), pool.map(sha256_file, paths), strict=True))
        return dict(self._hashes)

    def _small_files(self) -> list[Path]:
        own = [self.path / name for name in ("config.json", INDEX) if (self.path / name).is_file()]
        return [*own, *self._tokenizer.files.values()]


def open_checkpoint(where: str | Path, *, trust_remote_code: bool = False) -> StoredCheckpoint:
    """The checkpoint in the folder `where`, or of the hub id `org/name[@REV]`. Reads no weight, runs no code.

    `trust_remote_code`: whether its own code may be run, by whoever computes with it in PyTorch.
    Raises CheckpointError, or Refusals with all of them.
    """
    source = resolve_source(where)
    folder = source.folder
    if not (folder / "config.json").is_file():
        why = "it has an adapter_config.json: that is an adapter" if _is_adapter(folder) else "config.json is missing"
        raise missing_source("checkpoint", where, why, "give the folder that save_pretrained() wrote the base model to")
    config = read_json_file(folder / "config.json", "bad-config")
    places = _weight_map(folder)
    reader = TensorReader(folder, _shards(folder, places))
    try:
        _check_index(places or {}, reader)
        plain, weights, quantization = _dequantized(config, reader)
        problems = [
            quantization,
            _no_tokenizer(folder, config),
            _vocabulary(folder, config, weights.tensors),
            None if quantization else find_missing(config, weights.tensors),
        ]
        refuse([problem for problem in problems if problem])
        checkpoint = StoredCheckpoint(source, plain, _task(config), weights, trust_remote_code=trust_remote_code)
        _check_head(checkpoint)
    except BaseException:
        reader.close()
        raise
    return checkpoint


def embedding_name(tensors: Iterable[str]) -> str | None:
    """Name of the token embedding's weight among `tensors`."""
    names = list(tensors)
    return _SHARED if _SHARED in names else next((name for name in names if name.endswith(_EMBEDDINGS)), None)


def head_name(tensors: Iterable[str]) -> str | None:
    """Name of the output head's own weight among `tensors`; None where there is none, as in a tied checkpoint."""
    return next((name for name in tensors if name in _HEADS), None)


def check_vocabulary(path: Path, rows: int) -> CheckpointError | None:
    """The refusal where tokenizer.json has ids that an embedding of `rows` rows lacks."""
    needed = vocabulary_size(path)
    if needed <= rows:
        return None
    return CheckpointError(
        "vocabulary-too-large",
        f"the tokenizer has {needed} ids, the embedding {rows} rows",
        why=f"ids {rows} to {needed - 1} have no weights; the tokenizer is {path}",
        hint="use the tokenizer that belongs to the weights, or resize_token_embeddings() and save the base again",
    )


def shard_fingerprint(path: Path, header_sha256: str) -> dict[str, Any]:
    """Cheap identity of a large file: a hub blob by its name (its hash), else header, size, mtime and inode."""
    real = path.resolve()
    if path.is_symlink() and real.parent.name == "blobs":
        return {"blob": real.name}
    stat = real.stat()
    return {
        "header": header_sha256,
        "size": stat.st_size,
        "mtime_ns": stat.st_mtime_ns,
        "inode": stat.st_ino,
    }


def _weight_map(folder: Path) -> dict[str, str] | None:
    """Tensor → its file, as the index has it; None where there is no index."""
    if not (folder / INDEX).is_file():
        return None
    weight_map = read_json_file(folder / INDEX, "bad-index").get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError("bad-index", f"{INDEX} has no weight_map", why="it maps each tensor to its file")
    return weight_map


def _shards(folder: Path, weight_map: Mapping[str, str] | None) -> list[str]:
    if weight_map is not None:
        names = sorted(set(weight_map.values()))
        outside = [name for name in names if Path(name).name != name]
        missing = [name for name in names if name not in outside and not (folder / name).is_file()]
        if outside or missing:
            absent = outside or missing
            more = f" and {len(absent) - 3:,} more" if len(absent) > 3 else ""
            raise CheckpointError(
                "missing-shard",
                f"not in {folder}, of {len(names):,} weight files: {', '.join(absent[:3])}{more}",
                why=f"{INDEX} names it",
                hint="finish the download, or save the checkpoint again",
            )
        return names
    if (folder / SINGLE).is_file():
        return [SINGLE]
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickles:
        raise CheckpointError(
            "pickle-only",
            f"{folder} has its weights only as a pickle, {pickles[0]}",
            why="opening a pickle runs whatever code is in it",
            hint=_TO_SAFETENSORS,
        )
    raise CheckpointError(
        "no-weights", f"{folder} has no weights", why=f"neither {SINGLE} nor {INDEX} is there",
        hint="give the folder that save_pretrained() wrote; weights under other names are not looked for",
    )  # fmt: skip


def _check_index(weight_map: Mapping[str, str], reader: TensorReader) -> None:
    for name, shard in weight_map.items():
        found = reader.tensors.get(name)
        if found is None or found.shard != shard:
            raise CheckpointError(
                "missing-tensor",
                f"{shard} does not hold the tensor {name!r}",
                why=f"{INDEX} says it does" + (f"; it is in {found.shard}" if found else ""),
                hint="index and weight files are from different saves: download or save all of them again",
            )


def _dequantized(
    config: dict[str, Any], reader: TensorReader
) -> tuple[dict[str, Any], TensorReader | DequantizedReader, InputError | None]:
    """The error is returned, so that it comes together with others."""
    try:
        return *dequantized(config, reader), None
    except CheckpointError as error:
        return config, reader, error


def _no_tokenizer(folder: Path, config: Mapping[str, Any]) -> InputError | None:
    """A checkpoint with code of its own may have its tokenizer in code too: nothing but merging can be done then."""
    if (folder / "tokenizer.json").is_file() or config.get("auto_map"):
        return None
    return CheckpointError(
        "no-tokenizer",
        f"{folder} has no tokenizer.json",
        why="token ids are checked against it in every backend",
        hint="AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER) writes it",
    )


def _code_files(folder: Path, config: Mapping[str, Any]) -> dict[str, Path]:
    """The code that config.json's auto_map names, and what it reads: copied along, never run."""
    if not config.get("auto_map"):
        return {}
    found = sorted(path for pattern in _CODE for path in folder.glob(pattern) if path.is_file())
    return {path.name: path for path in found}


def _vocabulary(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> InputError | None:
    if not (folder / "tokenizer.json").is_file():
        return None
    name = embedding_name(tensors)
    rows = tensors[name].shape[0] if name else config.get("vocab_size")
    return check_vocabulary(folder / "tokenizer.json", rows) if isinstance(rows, int) else None


def _task(config: Mapping[str, Any]) -> Task:
    architectures = config.get("architectures") or []
    for architecture in architectures if isinstance(architectures, list) else []:
        if architecture in _SEQ2SEQ:
            return "seq2seq-lm"
        for suffix, task in _TASKS.items():
            if str(architecture).endswith(suffix):
                return task
    raise CheckpointError(
        "unknown-task",
        "config.json does not say what the model is for",
        why=f"architectures is {architectures}; known endings: {', '.join(_TASKS)}; {' and '.join(sorted(_SEQ2SEQ))}",
        hint="text models only: language models, T5, and sequence or token classifiers",
    )


def _check_head(checkpoint: StoredCheckpoint) -> None:
    """A checkpoint that is not tied, by config.json or its class, and has no head would be loaded with another one."""
    tensors = checkpoint.tensors
    if checkpoint.task == "seq2seq-lm" and _SHARED not in tensors:
        raise CheckpointError(
            "missing-tensor",
            f"the checkpoint has no {_SHARED}",
            why="which weight encoder, decoder and head share cannot be told without it",
            hint="AutoModelForSeq2SeqLM.from_pretrained(FOLDER).save_pretrained(NEW) writes it",
        )
    config = checkpoint.config
    untied = says_tied(config) is False
    if checkpoint.task in ("causal-lm", "seq2seq-lm") and untied and embedding_name(tensors) and not head_name(tensors):
        said = (
            'config.json says "tie_word_embeddings": false'
            if "tie_word_embeddings" in config
            else f"config.json has no tie_word_embeddings, which is false for {config.get('model_type')}"
        )
        raise CheckpointError(
            "missing-tensor",
            "the checkpoint has no output head",
            why=f"{said}, and there is no lm_head.weight: it would be started at random at each load",
            hint='restore the missing file, or set "tie_word_embeddings": true where the head is the embedding',
        )


def _is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file()
