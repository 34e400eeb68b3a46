"""Conversations to token ids, by the checkpoint's own tokenizer.json, chat template and stop tokens."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from lora2edge.checkpoint import read_tokenizer_file
from lora2edge.contracts import Item, Message, Sample, TokenizerFiles
from lora2edge.errors import DataError
from lora2edge.texts.template import ChatTemplate, TemplateLimitError, holds_marker, pieces
from lora2edge.texts.tokenizer import open_tokenizer

MEASURED_DATE = datetime(2025, 1, 1)
"""What a template that asks for today's date gets in a measured sample, so that a figure can be repeated."""


@dataclass(frozen=True, slots=True)
class _Marker:
    """A special token. `lstrip`, `rstrip`: it swallows the white space beside it."""

    id: int
    lstrip: bool
    rstrip: bool


class Renderer:
    """Token ids of conversations. Reads `tokenizer.json` as it stands, through the `tokenizers` library.

    (For some classes transformers 5 puts a built-in pre-tokenizer in the place of the file's; llama.cpp and other
    engines read the file.) Raises CheckpointError where the files are missing or broken.
    """

    def __init__(self, tokenizer: TokenizerFiles) -> None:
        self.tokenizer: Any
        """The tokenizers library's own object, without padding and truncation."""
        self._source, self.tokenizer = open_tokenizer(tokenizer)
        self._config = read_tokenizer_file(tokenizer, "tokenizer_config.json")
        self._generation = read_tokenizer_file(tokenizer, "generation_config.json")
        self._markers = {
            token["content"]: _Marker(int(token["id"]), bool(token.get("lstrip")), bool(token.get("rstrip")))
            for token in self._source.get("added_tokens") or []
            if token.get("special")
        }
        self._variables = _special_tokens(self._config, read_tokenizer_file(tokenizer, "special_tokens_map.json"))
        self.chat_template = _chat_template(tokenizer, self._config)
        """Source of the Jinja template, or None."""
        self._live = self._template(None)
        self._dated = self._template(MEASURED_DATE)

    @property
    def markers(self) -> tuple[str, ...]:
        """The special tokens' texts."""
        return tuple(self._markers)

    @property
    def variables(self) -> Mapping[str, str]:
        """What the template is rendered with: `bos_token`, `eos_token`, …"""
        return self._variables

    @property
    def nfc(self) -> bool:
        """Whether the tokenizer's normalizer applies Unicode's form C."""
        return any(part.get("type") == "NFC" for part in _parts(self._source.get("normalizer"), "normalizers"))

    @property
    def vocabulary(self) -> int:
        """Highest token id + 1."""
        return int(max(self.tokenizer.get_vocab(with_added_tokens=True).values())) + 1

    @functools.cached_property
    def end_ids(self) -> tuple[int, ...]:
        """Where generation stops: the marker that the template ends an assistant's turn with, the tokenizer's
        `eos_token`, and `eos_token_id` of generation_config.json. The first is the one that a response ends with.
        """
        found = [self._turn_end(), self.tokenizer.token_to_id(self._variables.get("eos_token", ""))]
        stored = self._generation.get("eos_token_id")
        found += stored if isinstance(stored, list) else [stored]
        return tuple(dict.fromkeys(int(token) for token in found if token is not None))

    def encode(self, messages: Sequence[Message], *, generation_prompt: bool = True) -> list[int]:
        """Token ids of the rendered conversation; of the bare text where there is no chat template.

        A special token's name inside a message is encoded as text. Where no message holds one, the ids are those
        of transformers' `apply_chat_template(tokenize=True)`.
        """
        return self._encode(self._live, messages, generation_prompt)

    def encode_text(self, text: str) -> list[int]:
        """Token ids of text that follows other text; special tokens' names are text, nothing is added."""
        return list(self._plain_inside.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of `ids`."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=skip_special))

    def sample(self, item: Item) -> Sample:
        """`item`, tokenized: the prompt with its generation prompt, then the response up to its end marker.

        The response is what the template's rendering of the whole conversation adds to that of the prompt. Where
        the one does not begin with the other (a template that writes a past turn differently from the turn being
        generated), it is the response's own text and the end marker: what the model is asked for at run time.
        Raises DataError where the tokenizer has no end marker.
        """
        if not self.end_ids:
            raise DataError(
                "no-end-marker",
                "it is not known where a response ends",
                why="neither tokenizer_config.json nor generation_config.json names an eos token",
                hint='add "eos_token" to tokenizer_config.json',
            )
        prompt = self._encode(self._dated, item.prompt, True)
        response: list[int] = []
        if self._dated:
            whole = self._encode(self._dated, item.messages, False)
            if whole[: len(prompt)] == prompt:
                response = whole[len(prompt) :]
        response = response or self.encode_text(item.response)
        end = next((index for index, token in enumerate(response) if token in self.end_ids), None)
        response = [*response, self.end_ids[0]] if end is None else response[: end + 1]
        return Sample(tuple(prompt + response), len(prompt), item)

    def _template(self, today: datetime | None) -> ChatTemplate | None:
        return ChatTemplate(self.chat_template, self._variables, today) if self.chat_template else None

    def _encode(self, template: ChatTemplate | None, messages: Sequence[Message], generation_prompt: bool) -> list[int]:
        if template is None:
            return self._encode_bare("\n".join(message["content"] for message in messages))
        if not holds_marker(messages, self.markers):
            text = template.render(messages, add_generation_prompt=generation_prompt)
            return list(self.tokenizer.encode(text, add_special_tokens=False).ids)
        return list(self._encode_pieces(template, messages, generation_prompt))

    def _encode_bare(self, text: str) -> list[int]:
        """Without a template: the text, and what the post-processor puts before it."""
        ids = list(self._plain.encode(text, add_special_tokens=True).ids)
        while ids and ids[-1] in self.end_ids:
            ids.pop()
        return ids

    def _encode_pieces(
        self, template: ChatTemplate, messages: Sequence[Message], generation_prompt: bool
    ) -> Iterator[int]:
        found = pieces(template, messages, self.markers, add_generation_prompt=generation_prompt)
        for index, piece in enumerate(found):
            if piece.special:
                yield self._markers[piece.text].id
                continue
            text = piece.text
            if index > 0 and self._markers[found[index - 1].text].rstrip:
                text = text.lstrip()
            if index + 1 < len(found) and self._markers[found[index + 1].text].lstrip:
                text = text.rstrip()
            tokenizer = self._plain if index == 0 else self._plain_inside
            yield from tokenizer.encode(text, add_special_tokens=False).ids

    @functools.cached_property
    def _plain(self) -> Any:
        """The tokenizer with special tokens' names taken as text."""
        import tokenizers

        plain = tokenizers.Tokenizer.from_str(json.dumps({**self._source, "padding": None, "truncation": None}))
        plain.encode_special_tokens = True
        return plain

    @functools.cached_property
    def _plain_inside(self) -> Any:
        """The same for text that is not the conversation's first: SentencePiece's leading space is not added."""
        import tokenizers

        splitter = self._source.get("pre_tokenizer")
        if not any(part.get("prepend_scheme") == "first" for part in _parts(splitter, "pretokenizers")):
            return self._plain
        source = json.loads(json.dumps({**self._source, "padding": None, "truncation": None}))
        for part in _parts(source["pre_tokenizer"], "pretokenizers"):
            if part.get("prepend_scheme") == "first":
                part["prepend_scheme"] = "never"
        plain = tokenizers.Tokenizer.from_str(json.dumps(source))
        plain.encode_special_tokens = True
        return plain

    def _turn_end(self) -> int | None:
        """The first special token that the template writes after an assistant's text, or None."""
        if self._dated is None:
            return None
        sentinel = "\ue0a0answer\ue0a1"
        turns = ({"role": "user", "content": "question"}, {"role": "assistant", "content": sentinel})
        try:
            rendered = self._dated.render(turns, add_generation_prompt=False)
        except DataError:
            return None
        after = rendered.partition(sentinel)[2]
        places = {after.find(marker): marker for marker in self._markers if marker in after}
        return self._markers[places[min(places)]].id if places else None


def check_template(tokenizer: TokenizerFiles) -> None:
    """Renders one conversation, or the part of it that the template takes. Raises TemplateLimitError.

    What else a template raises, it raises for those who give it a conversation.
    """
    config = read_tokenizer_file(tokenizer, "tokenizer_config.json")
    source = _chat_template(tokenizer, config)
    if source is None:
        return
    messages = [{"role": role, "content": "What is it?"} for role in ("system", "user", "assistant", "user")]
    variables = _special_tokens(config, read_tokenizer_file(tokenizer, "special_tokens_map.json"))
    try:
        template = ChatTemplate(source, variables)
    except TemplateLimitError:
        raise
    except DataError:
        return
    for part in (messages, messages[1:], messages[1:2]):
        try:
            template.render(part, add_generation_prompt=True)
        except TemplateLimitError:
            raise
        except DataError:
            continue
        return


def _special_tokens(config: Mapping[str, Any], legacy: Mapping[str, Any]) -> dict[str, str]:
    """`bos_token` and the like, as strings; older checkpoints keep them in special_tokens_map.json."""
    found = {}
    for name, value in {**legacy, **{key: value for key, value in config.items() if value is not None}}.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            found[name] = text
    return found


def _chat_template(tokenizer: TokenizerFiles, config: Mapping[str, Any]) -> str | None:
    """`chat_template.jinja`, else tokenizer_config's; of several named ones the default."""
    path = tokenizer.files.get("chat_template.jinja")
    if path is not None:
        return Path(path).read_text(encoding="utf-8")
    stored = config.get("chat_template")
    if isinstance(stored, list):
        stored = {entry.get("name"): entry.get("template") for entry in stored}.get("default")
    return stored if isinstance(stored, str) and stored else None


def _parts(step: Any, key: str) -> list[dict[str, Any]]:
    """A normalizer or pre-tokenizer and, where it is a sequence, its members."""
    if not isinstance(step, dict):
        return []
    return [step, *(part for inner in step.get(key) or [] for part in _parts(inner, key))]
