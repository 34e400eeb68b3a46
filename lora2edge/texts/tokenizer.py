"""A checkpoint's tokenizer.json, opened by the tokenizers library."""

from __future__ import annotations

from typing import Any

from lora2edge.checkpoint import read_tokenizer_file
from lora2edge.contracts import TokenizerFiles
from lora2edge.errors import CheckpointError


def open_tokenizer(files: TokenizerFiles) -> tuple[dict[str, Any], Any]:
    """The file's own JSON, and the library's object without padding and truncation.

    Raises CheckpointError where there is no tokenizer.json, or a broken one.
    """
    import tokenizers

    source = read_tokenizer_file(files, "tokenizer.json")
    if not source:
        raise CheckpointError(
            "no-tokenizer-json",
            "the checkpoint has no tokenizer.json",
            hint="AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER) writes one",
        )
    try:
        tokenizer: Any = tokenizers.Tokenizer.from_file(str(files.files["tokenizer.json"]))
    except Exception as error:  # the Rust library raises plain Exception
        raise CheckpointError("broken-tokenizer", "tokenizer.json cannot be read", why=str(error)) from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return source, tokenizer
