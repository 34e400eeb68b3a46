"""The command line: one file per verb, which parses and then calls a function that anyone could call from Python."""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys

import click

from lora2edge import __version__
from lora2edge.errors import EXIT_INPUT, EXIT_INTERRUPTED, Lora2EdgeError

_VERBS = ("build", "merge", "lower", "measure", "bench", "targets", "doctor", "inspect", "cache")


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
    # OpenMP threads that wait in a loop bring PyTorch and llama.cpp to a crawl on a machine that does other work too:
    # a minute's measurement took ten. For this process and the stages that it starts; the user's own setting wins.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        status = cli(standalone_mode=False)
        sys.exit(status if isinstance(status, int) else 0)
    except Lora2EdgeError as error:
        _say(error.as_dict() if as_json else None, str(error))
        sys.exit(error.exit_code)
    except click.ClickException as error:
        if as_json:
            _say(Lora2EdgeError("usage", error.format_message()).as_dict(), "")
        else:
            error.show()
        sys.exit(EXIT_INPUT)
    except (KeyboardInterrupt, click.Abort):
        words = "finished stages are kept, the same command goes on from there"
        _say(
            Lora2EdgeError("interrupted", "interrupted", why=words).as_dict() if as_json else None,
            f"interrupted: {words}",
        )
        sys.exit(EXIT_INTERRUPTED)


def _say(error: dict[str, str] | None, text: str) -> None:
    """The error as one JSON object on standard output, else the text on standard error."""
    if error is None:
        click.echo(text, err=True)
    else:
        click.echo(json.dumps({"error": error}, ensure_ascii=False))


def _interrupt(signum: int, frame: object) -> None:
    """A polite end (systemd, docker stop, a batch system) cleans up as Ctrl-C does."""
    raise KeyboardInterrupt
