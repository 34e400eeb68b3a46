"""Chat templates: rendered the way transformers renders them, within limits, and split at their own markers."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from lora2edge.contracts import Message
from lora2edge.errors import DataError
from lora2edge.texts import sandbox


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of a rendered conversation."""

    text: str
    special: bool
    """True: a special token that the template wrote. False: text, in which a special token's name is text too."""


class TemplateLimitError(DataError):
    """A template that does not end, or needs too much: it is not asked again."""


class ChatTemplate:
    """A Jinja chat template in an immutable sandbox, set up as transformers sets it up, in a process with limits.

    `variables` are the special tokens (`bos_token`, `eos_token`, …). `today` fixes the date that templates such
    as Llama 3.1's write into the system prompt; None is the real one. Raises DataError where the template cannot
    be parsed, TemplateLimitError where that takes too long.
    """

    def __init__(self, source: str, variables: Mapping[str, str], today: datetime | None = None) -> None:
        self.source = source
        self.variables = dict(variables)
        self._request = {
            "source": source,
            "variables": self.variables,
            "today": today.isoformat() if today else None,
            "messages": None,
        }
        reply = _ask(self._request, "be parsed")
        if reply.get("error") == "syntax":
            raise DataError(
                "chat-template-syntax",
                "the chat template cannot be parsed",
                why=reply["why"],
                hint="compare chat_template.jinja with the base model's own",
            )

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        """The conversation as one string. Raises DataError where the template refuses it or fails."""
        roles = ", ".join(message["role"] for message in messages)
        what = f"render a conversation of {roles}"
        reply = _ask({**self._request, "messages": messages, "add_generation_prompt": add_generation_prompt}, what)
        if "error" in reply:
            raise DataError(
                "chat-template-refused",
                f"the chat template cannot {what}",
                why=reply["why"],
                hint="change the roles in the data, or the adapter's chat_template.jinja",
            )
        return reply["text"]


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


def _ask(request: Mapping[str, Any], what: str) -> dict[str, str]:
    """The reply of the process that renders: `text`, or `error` and `why`. Raises TemplateLimitError."""
    global _process
    with _lock:
        if _process is None or not _process.is_mine():
            _process = _Process()
        reply = _process.ask(request)
        if "text" not in reply and reply["error"] == "limit":
            _process.end()
            _process = None
    if reply.get("error") == "limit":
        raise TemplateLimitError(
            "chat-template-refused",
            f"the chat template cannot {what}",
            why=reply["why"],
            hint="compare chat_template.jinja, or tokenizer_config.json, with the base model's own",
        )
    return reply


class _Process:
    """The process that renders; it ends with this one."""

    def __init__(self) -> None:
        self._owner = os.getpid()
        self._child = subprocess.Popen(
            # -P: the script's folder is no place to import from.
            [sys.executable, "-P", sandbox.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        atexit.register(self.end)

    def is_mine(self) -> bool:
        """Whether it lives, and is this process's: a fork has its parent's."""
        return self._owner == os.getpid() and self._child.poll() is None

    def ask(self, request: Mapping[str, Any]) -> dict[str, str]:
        """One reply. A process that ends without one, or takes too long, has met its limits."""
        assert self._child.stdin and self._child.stdout
        with contextlib.suppress(BrokenPipeError):
            self._child.stdin.write(json.dumps(request).encode() + b"\n")
            self._child.stdin.flush()
        line = self._read_line(self._child.stdout.fileno())
        if line is None:
            return {"error": "limit", "why": f"it does not end: nothing came of it in {_WAIT_SECONDS:.0f} s"}
        if line.endswith(b"\n"):
            reply: dict[str, str] = json.loads(line)
            return reply
        status = self._child.wait()
        if status == -signal.SIGXCPU:
            return {"error": "limit", "why": f"it does not end: {sandbox.CPU_SECONDS} s of computing were not enough"}
        return {"error": "limit", "why": f"the process that renders it ended with status {status}"}

    def end(self) -> None:
        """Ends it; harmless when done twice, and in a fork."""
        if self._owner == os.getpid():
            atexit.unregister(self.end)
            self._child.kill()
            self._child.wait()
            for pipe in (self._child.stdin, self._child.stdout):
                if pipe:
                    with contextlib.suppress(OSError):
                        pipe.close()

    def _read_line(self, handle: int) -> bytes | None:
        """A line; less where the process ends before; None where it takes too long."""
        parts: list[bytes] = []
        waiting = select.poll()  # select() knows no more than 1024 open files
        waiting.register(handle, select.POLLIN)
        deadline = time.monotonic() + _WAIT_SECONDS
        while not parts or not parts[-1].endswith(b"\n"):
            if not waiting.poll(1000 * max(0.0, deadline - time.monotonic())):
                return None
            parts.append(os.read(handle, 1 << 20))
            if not parts[-1]:
                break
        return b"".join(parts)


_WAIT_SECONDS = 30.0
"""On a machine where it gets little of the processor, too."""
_lock = threading.Lock()
_process: _Process | None = None
