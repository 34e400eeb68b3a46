"""Chat templates: rendered in a sandbox the way transformers renders them, and split at their own markers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from lora2edge.contracts import Message
from lora2edge.errors import DataError

_TEMPLATE_FAILURES = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError, MemoryError)


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of a rendered conversation."""

    text: str
    special: bool
    """True: a special token that the template wrote. False: text, in which a special token's name is text too."""


class ChatTemplate:
    """A Jinja chat template in an immutable sandbox, set up as transformers sets it up.

    `variables` are the special tokens (`bos_token`, `eos_token`, …). `today` fixes the date that templates such
    as Llama 3.1's write into the system prompt; None is the real one. Raises DataError where the template cannot
    be parsed.
    """

    def __init__(self, source: str, variables: Mapping[str, str], today: datetime | None = None) -> None:
        self.source = source
        self.variables = dict(variables)
        self._today = today
        self._template = _compile(source, self._now)

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        """The conversation as one string. Raises DataError where the template refuses it or fails."""
        import jinja2

        try:
            return str(
                self._template.render(
                    messages=[dict(message) for message in messages],
                    tools=None,
                    documents=None,
                    add_generation_prompt=add_generation_prompt,
                    **self.variables,
                )
            )
        except (jinja2.TemplateError, *_TEMPLATE_FAILURES) as error:
            roles = ", ".join(message["role"] for message in messages)
            raise DataError(
                "chat-template-refused",
                f"the chat template cannot render a conversation of {roles}",
                why=f"{type(error).__name__}: {error}",
                hint="change the roles in the data, or the adapter's chat_template.jinja",
            ) from error

    def _now(self, layout: str) -> str:
        return (self._today or datetime.now()).strftime(layout)


def pieces(
    template: ChatTemplate, messages: Sequence[Message], markers: Sequence[str], *, add_generation_prompt: bool
) -> list[Piece]:
    """The rendered conversation, split at the special tokens (`markers`) that the template itself wrote.

    A marker inside a message's content stays text: nobody opens an assistant turn by typing one. The texts of the
    pieces add up to `template.render(…)`. Raises DataError where a content holds a marker and its place in the
    rendering cannot be told.
    """
    rendered = template.render(messages, add_generation_prompt=add_generation_prompt)
    if not holds_marker(messages, markers):
        return _split(rendered, markers)
    spans = _content_spans(template, messages, rendered, add_generation_prompt=add_generation_prompt)
    found: list[Piece] = []
    position = 0
    for start, stop in spans:
        found += _split(rendered[position:start], markers)
        found.append(Piece(rendered[start:stop], special=False))
        position = stop
    return _joined(found + _split(rendered[position:], markers))


def holds_marker(messages: Sequence[Message], markers: Sequence[str]) -> bool:
    """Whether any message's content holds the text of a special token."""
    return any(marker in message["content"] for message in messages for marker in markers)


def _content_spans(
    template: ChatTemplate, messages: Sequence[Message], rendered: str, *, add_generation_prompt: bool
) -> list[tuple[int, int]]:
    """Where the contents lie in `rendered`: found with sentinels in their place, and proved by substitution."""
    sentinels = [f"\ue0a0content{index}\ue0a1" for index in range(len(messages))]
    swapped = [{**message, "content": sentinel} for message, sentinel in zip(messages, sentinels, strict=True)]
    outline = template.render(swapped, add_generation_prompt=add_generation_prompt)
    parts = re.split("(" + "|".join(map(re.escape, sentinels)) + ")", outline)
    if not rendered.startswith(parts[0]):
        raise _lost()
    spans = []
    position = len(parts[0])
    for sentinel, literal in zip(parts[1::2], parts[2::2], strict=True):
        content = messages[sentinels.index(sentinel)]["content"]
        for variant in (content, content.strip(), content.rstrip(), content.lstrip()):
            if rendered.startswith(variant + literal, position):
                spans.append((position, position + len(variant)))
                position += len(variant) + len(literal)
                break
        else:
            raise _lost()
    if position != len(rendered):
        raise _lost()
    return spans


def _lost() -> DataError:
    return DataError(
        "marker-in-text",
        "a message holds the text of a special token, and the chat template changes the message",
        why="where the message ends and the template goes on cannot be told, so the token could act as a marker",
        hint="remove special tokens such as <|im_end|> from the data",
    )


def _split(text: str, markers: Sequence[str]) -> list[Piece]:
    if not markers:
        return [Piece(text, special=False)] if text else []
    pattern = "(" + "|".join(re.escape(marker) for marker in sorted(markers, key=len, reverse=True)) + ")"
    parts = re.split(pattern, text)
    return [Piece(part, special=index % 2 == 1) for index, part in enumerate(parts) if part]


def _joined(found: Sequence[Piece]) -> list[Piece]:
    """Neighbouring texts as one: tokens may reach from the template's text into the message's."""
    result: list[Piece] = []
    for piece in found:
        if result and not piece.special and not result[-1].special:
            result[-1] = Piece(result[-1].text + piece.text, special=False)
        elif piece.text:
            result.append(piece)
    return result


def _compile(source: str, now: Any) -> Any:
    """The settings, filters and names of transformers' `chat_template_utils._compile_jinja_template`."""
    import jinja2
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _generation_tag()]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = now
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise DataError(
            "chat-template-syntax",
            "the chat template cannot be parsed",
            why=f"line {error.lineno}: {error.message}",
            hint="compare chat_template.jinja with the base model's own",
        ) from error
    except (RecursionError, MemoryError) as error:
        raise DataError(
            "chat-template-syntax",
            "the chat template cannot be parsed",
            why="it is nested too deeply",
            hint="compare chat_template.jinja with the base model's own",
        ) from error


def _generation_tag() -> Any:
    """`{% generation %}`, which marks the assistant's text for training, renders its body."""
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.parser import Parser

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012  (Jinja declares it on the instance)

        def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    return Generation


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> Iterator[str]:
    import jinja2

    raise jinja2.TemplateError(message)
