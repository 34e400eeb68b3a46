"""Renders chat templates in a process of its own, whose time and memory are bounded: a template is a program.

Run as a script, with no more than Jinja: JSON lines in (`source`, `variables`, `today`, `messages` or null to parse
only, `add_generation_prompt`), JSON lines out (`text`, or `error` and `why`). The other end is `template.ChatTemplate`.
"""

from __future__ import annotations

import functools
import json
import resource
import sys
from collections.abc import Iterator
from datetime import datetime
from typing import Any

CPU_SECONDS = 3
"""For one rendering; a real template takes milliseconds. The kernel ends the process: a power of whole numbers, one
single operation, would heed no signal that Python handles."""
MEMORY_BYTES = 512 << 20
LONGEST_TEXT = 16 << 20
"""Characters of a rendered conversation."""

_FAILURES = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for line in sys.stdin:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        used = int(usage.ru_utime + usage.ru_stime)
        resource.setrlimit(resource.RLIMIT_CPU, (used + CPU_SECONDS, resource.RLIM_INFINITY))
        sys.stdout.write(_reply(json.loads(line)) + "\n")
        sys.stdout.flush()


def _reply(request: dict[str, Any]) -> str:
    import jinja2

    try:
        text = _render(request)
        if len(text) > LONGEST_TEXT:
            return json.dumps({"error": "limit", "why": f"it makes a text of {len(text):,} characters"})
        return json.dumps({"text": text})
    except MemoryError:
        return json.dumps({"error": "limit", "why": f"it needs more than {MEMORY_BYTES >> 20} MB of memory"})
    except jinja2.TemplateSyntaxError as error:
        return json.dumps({"error": "syntax", "why": f"line {error.lineno}: {error.message}"})
    except (jinja2.TemplateError, *_FAILURES) as error:
        return json.dumps({"error": "refused", "why": f"{type(error).__name__}: {error}"})


def _render(request: dict[str, Any]) -> str:
    import jinja2

    try:
        template = _compile(request["source"])
    except RecursionError as error:
        raise jinja2.TemplateSyntaxError("it is nested too deeply", 1) from error
    if request["messages"] is None:
        return ""
    now = datetime.fromisoformat(request["today"]) if request["today"] else datetime.now()
    return str(
        template.render(
            messages=request["messages"],
            tools=None,
            documents=None,
            add_generation_prompt=request["add_generation_prompt"],
            strftime_now=now.strftime,
            **request["variables"],
        )
    )


@functools.lru_cache(maxsize=4)
def _compile(source: str) -> Any:
    """The settings, filters and names of transformers' `chat_template_utils._compile_jinja_template`."""
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _generation_tag()]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    return environment.from_string(source)


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


if __name__ == "__main__":
    main()
