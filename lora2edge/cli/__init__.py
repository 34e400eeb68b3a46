"""The command line: one file per verb, which parses and then calls a function that anyone could call from Python."""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
from typing import NoReturn

import click

from lora2edge import __version__
from lora2edge.errors import EXIT_INPUT, EXIT_INTERRUPTED, Lora2EdgeError

_VERBS = ("build", "merge", "lower", "measure", "bench", "finalize", "targets", "doctor", "inspect", "cache")


class _Verbs(click.Group):
    """Loads a verb's file when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _VERBS:
            return None
        command: click.Command = importlib.import_module(f"lora2edge.cli.{cmd_name}").command
        return command


@click.command(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="lora2edge")
def cli() -> None:
    """Compile a LoRA adapter and its base into a measured artifact, and prove that the fine-tune survived."""


def main() -> None:
    """Runs the command line; turns our errors into text and an exit code. Anything else is a bug and shows itself."""
    as_json = "--json" in sys.argv
    # OpenMP threads that wait in a loop bring PyTorch and llama.cpp to a crawl on a machine that does other work too.
    # For this process and the stages that it starts: a short spin, then sleep. The user's own settings win.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    signals: list[int] = []

    def interrupt(signum: int, frame: object) -> None:
        signals.append(signum)
        raise KeyboardInterrupt

    # A polite end (systemd, docker stop, a batch system) cleans up as Ctrl-C does.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    try:
        status = cli(standalone_mode=False)
        sys.exit(status if isinstance(status, int) else 0)
    except Lora2EdgeError as error:
        if signals:  # a library that was interrupted while it was imported or loaded raised an error of its own
            _leave_interrupted(as_json)
        _say(error, as_json)
        sys.exit(error.exit_code)
    except click.ClickException as error:
        if as_json:
            _say(Lora2EdgeError("usage", error.format_message()), as_json)
        else:
            error.show()
        sys.exit(EXIT_INPUT)
    except (KeyboardInterrupt, click.Abort) as error:
        _leave_interrupted(as_json, error.__cause__ or error)


def _say(error: Lora2EdgeError, as_json: bool) -> None:
    """The error as one JSON object on standard output, or as text on standard error."""
    if as_json:
        click.echo(json.dumps({"error": error.as_dict()}, ensure_ascii=False))
    else:
        click.echo(str(error), err=True)


def _leave_interrupted(as_json: bool, error: BaseException | None = None) -> NoReturn:
    """Leaves at once: everything is cleaned up by now; what was kept, the error's notes say.

    CPython would turn the exit status into death by SIGINT where the interrupt hit an extension module's import.
    """
    notes = getattr(error, "__notes__", [])
    words = "; ".join(notes) or "finished stages are kept, the same command goes on from there"
    if as_json:
        _say(Lora2EdgeError("interrupted", "interrupted", why=words), as_json)
    else:
        click.echo(f"interrupted: {words}", err=True)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(EXIT_INTERRUPTED)
