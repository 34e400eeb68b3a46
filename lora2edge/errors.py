"""Every error that a user can cause or mend, as one tree.

Lora2EdgeError                 carries code, what, why, hint
├── InputError                 exit 2: bad input, a missing part, a machine that cannot do it
│   ├── CheckpointError        a base that cannot be read as it stands
│   ├── AdapterError           an adapter that cannot be merged exactly
│   ├── DataError              texts that cannot be used
│   ├── TargetError            a target file or name
│   ├── UnsupportedError       an architecture, tokenizer or option that a backend does not know
│   ├── MissingExtraError      an optional library that is not installed, or is broken
│   ├── OutputError            the output folder or disk
│   └── Refusals               several of the above at once
└── GateError                  exit 3: the merge proof or a gate failed
    └── ProofError             the merged model is not base + adapter

A code is stable from release to release: scripts may test it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

EXIT_OK = 0
EXIT_BUG = 1
EXIT_INPUT = 2
EXIT_GATE = 3
EXIT_INCONCLUSIVE = 4
EXIT_INTERRUPTED = 130

_UNSHOWN = re.compile("[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\u200e\\u200f\\u202a-\\u202e\\u2066-\\u2069\\ud800-\\udfff]")
"""What controls a terminal or turns text round, and halves of surrogate pairs, which no terminal takes."""
_MOST_CHARACTERS = 2000


class Lora2EdgeError(Exception):
    """An error with a stable `code`, `what` happened, `why`, and a `hint` that can be pasted."""

    exit_code = EXIT_BUG

    def __init__(self, code: str, what: str, *, why: str = "", hint: str = "") -> None:
        super().__init__(what)
        self.code = code
        self.what = _shown(what)
        self.why = _shown(why)
        self.hint = _shown(hint)

    def __str__(self) -> str:
        lines = [f"error[{self.code}]: {self.what}"]
        if self.why:
            lines.append(f"  why:  {self.why}")
        if self.hint:
            lines.append(f"  hint: {self.hint}")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """The error for `--json`."""
        return {"code": self.code, "what": self.what, "why": self.why, "hint": self.hint}


def _shown(text: str) -> str:
    """`text` as it may reach a terminal: it quotes names and values out of files that strangers wrote."""
    if len(text) > _MOST_CHARACTERS:
        text = f"{text[:_MOST_CHARACTERS]}… ({len(text) - _MOST_CHARACTERS:,} characters more)"
    return _UNSHOWN.sub(lambda found: ascii(found[0])[1:-1], text)


class InputError(Lora2EdgeError):
    """Bad input, a missing part, or a machine that cannot do what was asked."""

    exit_code = EXIT_INPUT


class CheckpointError(InputError):
    """A base checkpoint that cannot be read as it stands."""


class AdapterError(InputError):
    """An adapter that cannot be merged exactly."""


class DataError(InputError):
    """Texts that cannot be used."""


class TargetError(InputError):
    """A target or recipe: its name, file or keys."""


class UnsupportedError(InputError):
    """An architecture, tokenizer or option that a backend does not know."""


class MissingExtraError(InputError):
    """An optional library that is not installed, or is installed and broken."""


class OutputError(InputError):
    """The output folder, its rights, or the disk under it."""


class Refusals(InputError):
    """Several errors found in one look, so that all are mended in one go."""

    def __init__(self, errors: Sequence[InputError]) -> None:
        super().__init__(errors[0].code if len(errors) == 1 else "several", f"{len(errors)} problems were found")
        self.errors = tuple(errors)

    def __str__(self) -> str:
        return "\n".join(str(error) for error in self.errors)

    def as_dict(self) -> dict[str, Any]:
        """The error for `--json`: one alone as itself, several with `errors`, a list of them."""
        each = [error.as_dict() for error in self.errors]
        return each[0] if len(each) == 1 else {**super().as_dict(), "why": str(self), "errors": each}


class GateError(Lora2EdgeError):
    """A bound that the build had to meet was missed."""

    exit_code = EXIT_GATE


class ProofError(GateError):
    """The merged model does not answer like base + live adapter."""


def refuse(errors: Sequence[InputError]) -> None:
    """Raises the one error, or all of them together; returns when there are none."""
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise Refusals(errors)
