"""Base checkpoints as they lie on disk: header, weights by rows, config, tokenizer files. No torch, no mmap."""

from lora2edge.checkpoint.blas import one_blas_thread
from lora2edge.checkpoint.floats import FLOAT_DTYPES, all_finite, decode, encode_finite, encode_rows, not_finite
from lora2edge.checkpoint.header import Header, StoredTensor, read_header
from lora2edge.checkpoint.modules import ExpertPlace, expert_place
from lora2edge.checkpoint.quantized import BnbSettings, RequantizedCheckpoint, linear_names, requantized
from lora2edge.checkpoint.readahead import read_ahead, reading_ahead, window_bytes
from lora2edge.checkpoint.reader import TensorReader
from lora2edge.checkpoint.slabs import cores, in_order
from lora2edge.checkpoint.source import Source, missing_source, read_json_file, resolve_source
from lora2edge.checkpoint.stored import (
    StoredCheckpoint,
    check_vocabulary,
    embedding_name,
    head_name,
    open_checkpoint,
    shard_fingerprint,
)
from lora2edge.checkpoint.tokenizer import (
    GENERATION_FILES,
    TOKENIZER_GROUP,
    merge_tokenizer_files,
    read_tokenizer_file,
    tokenizer_files,
    vocabulary_size,
)
from lora2edge.checkpoint.tying import check_tied, says_tied

__all__ = [
    "FLOAT_DTYPES",
    "GENERATION_FILES",
    "TOKENIZER_GROUP",
    "BnbSettings",
    "ExpertPlace",
    "Header",
    "RequantizedCheckpoint",
    "Source",
    "StoredCheckpoint",
    "StoredTensor",
    "TensorReader",
    "all_finite",
    "check_tied",
    "check_vocabulary",
    "cores",
    "decode",
    "embedding_name",
    "encode_finite",
    "encode_rows",
    "expert_place",
    "head_name",
    "in_order",
    "linear_names",
    "merge_tokenizer_files",
    "missing_source",
    "not_finite",
    "one_blas_thread",
    "open_checkpoint",
    "read_ahead",
    "read_header",
    "read_json_file",
    "read_tokenizer_file",
    "reading_ahead",
    "requantized",
    "resolve_source",
    "says_tied",
    "shard_fingerprint",
    "tokenizer_files",
    "vocabulary_size",
    "window_bytes",
]
