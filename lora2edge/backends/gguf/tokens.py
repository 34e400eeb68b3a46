"""The tokenizer inside a GGUF file, as llama.cpp runs it."""

from __future__ import annotations

import ctypes
import functools
import threading
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lora2edge.backends.gguf.llama_cpp import Kind, Library, load_library
from lora2edge.errors import InputError

if TYPE_CHECKING:
    from lora2edge.contracts import Message
    from lora2edge.texts import ChatTemplate

NORMALIZER_KEY = "lora2edge.tokenizer.normalizer"
"""Metadata key that says "NFC" where the checkpoint's tokenizer normalizes so; llama.cpp itself does not."""

UNKNOWN, CONTROL = 1 << 0, 1 << 3
"""`llama_token_attr`: the tokens that are matched in a text only with special parsing on."""

LSTRIP, RSTRIP = 1 << 7, 1 << 8
"""`llama_token_attr`: the token swallows the white space before it, after it."""

SPACES = " \t\n\v\f\r"
"""What C's isspace() takes for white space."""

VARIABLE_KEYS = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
}
"""Variable of a chat template → metadata key. llama.cpp's own defaults are not asked: it invents missing ones."""


class Vocabulary:
    """Tokenizes like the runtime does. Thread-safe. `nfc`: texts are NFC-normalized first.

    `model`: a `llama_model *`, which this object owns and frees in `close`.
    """

    def __init__(self, library: Library, model: int) -> None:
        self._c = library.c
        self._model: int | None = model
        self._vocab = self._c.llama_model_get_vocab(model)
        self._lock = threading.Lock()
        self.size: int = self._c.llama_vocab_n_tokens(self._vocab)
        self.nfc = self.metadata(NORMALIZER_KEY) == "NFC"
        self.adds_bos = self.metadata("tokenizer.ggml.add_bos_token") == "true"

    @property
    def model(self) -> int:
        """The `llama_model *`; InputError after `close`."""
        if self._model is None:
            raise InputError("session-closed", "the GGUF model was closed already")
        return self._model

    def metadata(self, key: str) -> str | None:
        """The value of a scalar metadata key as text; None where the file lacks it."""
        with self._lock:
            length = self._c.llama_model_meta_val_str(self.model, key.encode(), None, 0)
            if length < 0:
                return None
            buffer = ctypes.create_string_buffer(length + 1)
            self._c.llama_model_meta_val_str(self.model, key.encode(), buffer, length + 1)
            return buffer.value.decode("utf-8", "replace")

    def tokenize(self, text: str, *, special: bool) -> list[int]:
        """Ids of `text`, no BOS or EOS added. `special`: markers such as `<|im_end|>` become their ids."""
        return self.tokenize_raw(unicodedata.normalize("NFC", text) if self.nfc else text, special=special)

    def tokenize_raw(self, text: str, *, special: bool) -> list[int]:
        """What llama.cpp makes of `text` as it stands: no normalization."""
        try:
            data = text.encode()
        except UnicodeEncodeError as error:
            raise InputError("not-unicode", "a text holds half a surrogate pair", why=str(error)) from error
        room = len(data) + 16
        with self._lock:
            _ = self.model
            while True:
                buffer = (ctypes.c_int32 * room)()
                count = self._c.llama_tokenize(self._vocab, data, len(data), buffer, room, False, special)
                if count >= 0:
                    return list(buffer[:count])
                room = -count

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, control tokens left out; bytes that are no UTF-8 become U+FFFD."""
        self.require_ids(ids)
        tokens = (ctypes.c_int32 * len(ids))(*ids)
        room = 16 * len(ids) + 16
        with self._lock:
            _ = self.model
            while True:
                buffer = ctypes.create_string_buffer(room)
                count = self._c.llama_detokenize(self._vocab, tokens, len(ids), buffer, room, False, False)
                if count >= 0:
                    return buffer.raw[:count].decode("utf-8", "replace")
                room = -count

    def token_id(self, text: str) -> int | None:
        """The id of the token whose vocabulary text is `text`; None where there is none."""
        return self._ids.get(text)

    @property
    def markers(self) -> tuple[str, ...]:
        """Texts of the control tokens: what only a chat template may write."""
        return tuple(self._markers)

    @functools.cached_property
    def _markers(self) -> dict[str, tuple[int, int]]:
        """Text → id and attributes of the control tokens."""
        _ = self.model
        attributes_of = self._c.llama_vocab_get_attr
        attributes = ((index, attributes_of(self._vocab, index)) for index in range(self.size))
        return {self._text(index): (index, found) for index, found in attributes if found & (CONTROL | UNKNOWN)}

    @functools.cached_property
    def _ids(self) -> dict[str, int]:
        _ = self.model
        return {self._text(index): index for index in range(self.size)}

    def _text(self, index: int) -> str:
        text: bytes = self._c.llama_vocab_get_text(self._vocab, index)
        return text.decode("utf-8", "replace")

    @functools.cached_property
    def chat_template(self) -> ChatTemplate | None:
        """The template in the file's metadata, with the special tokens that it may name; None without one."""
        from lora2edge.texts import ChatTemplate

        source = self.metadata("tokenizer.chat_template")
        return None if source is None else ChatTemplate(source, self._variables())

    def encode(self, messages: Sequence[Message], *, generation_prompt: bool = True) -> list[int]:
        """Ids of the rendered conversation: the template's markers by id, all other text with special parsing off.

        So a `<|im_end|>` that a user wrote stays text. Without a chat template: the contents, a line each, after
        the BOS token where the file asks for one.
        """
        from lora2edge.texts import pieces

        template = self.chat_template
        if template is None:
            text = "\n".join(message["content"] for message in messages)
            begin = self.metadata("tokenizer.ggml.bos_token_id") if self.adds_bos else None
            return ([] if begin is None else [int(begin)]) + self.tokenize(text, special=False)
        ids: list[int] = []
        found = pieces(template, messages, self.markers, add_generation_prompt=generation_prompt)
        attributes = [self._markers[piece.text][1] if piece.special else 0 for piece in found] + [0]
        for index, piece in enumerate(found):
            if piece.special:
                ids.append(self._markers[piece.text][0])
                continue
            text = piece.text
            if index and attributes[index - 1] & RSTRIP:
                text = text.lstrip(SPACES)
            if attributes[index + 1] & LSTRIP:
                text = text.rstrip(SPACES)
            ids.extend(self.tokenize(text, special=False))
        return ids

    def require_ids(self, ids: Sequence[int]) -> None:
        """Raises InputError for an id outside the vocabulary: llama.cpp would end the process."""
        if ids and (min(ids) < 0 or max(ids) >= self.size):
            wrong = next(index for index in ids if not 0 <= index < self.size)
            raise InputError("token-id", f"token id {wrong} is outside the vocabulary of {self.size} tokens")

    def close(self) -> None:
        """Frees the model; harmless when done twice."""
        with self._lock:
            model, self._model = self._model, None
            if model is not None:
                self._c.llama_model_free(model)

    def __enter__(self) -> Vocabulary:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _variables(self) -> dict[str, str]:
        found = {name: self.metadata(key) for name, key in VARIABLE_KEYS.items()}
        return {
            name: self._text(int(index))
            for name, index in found.items()
            if index is not None and 0 <= int(index) < self.size
        }


def open_vocabulary(path: Path, library: Kind = "auto") -> Vocabulary:
    """The tokenizer of the GGUF file `path`; no weight is read. Raises InputError where it cannot be read."""
    loaded = load_library(library)
    return Vocabulary(loaded, load_model(loaded, path, vocab_only=True))


def load_model(library: Library, path: Path, *, vocab_only: bool = False, offload: bool = False) -> int:
    """A `llama_model *` of the GGUF file `path`. `offload`: all layers on the GPU, else none.

    Raises InputError with llama.cpp's own reason where it cannot be loaded.
    """
    if not path.is_file():
        raise InputError("gguf-missing", f"there is no GGUF file {path}")
    params = library.c.llama_model_default_params()
    params.vocab_only = vocab_only
    params.n_gpu_layers = -1 if offload else 0
    no_devices = (ctypes.c_void_p * 1)(None)  # an empty list, where NULL would mean all
    if not offload:
        params.devices = ctypes.addressof(no_devices)
    library.take_errors()
    model = library.c.llama_model_load_from_file(str(path).encode(), params)
    if not model:
        raise InputError(
            "gguf-unreadable",
            f"llama.cpp {library.facts['llama_cpp']} cannot load {path.name}",
            why=library.take_errors() or "no reason was given",
        )
    return int(model)
