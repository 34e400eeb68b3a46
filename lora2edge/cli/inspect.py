"""`lora2edge inspect`: what a folder holds."""

from __future__ import annotations

from pathlib import Path

import click

from lora2edge.cli.options import json_option, print_json


@click.command("inspect")
@click.argument("path", type=click.Path(path_type=Path))
@json_option
def command(path: Path, as_json: bool) -> None:
    """Say what a checkpoint, adapter or artifact folder holds; reads no weight."""
    from lora2edge.verbs import inspect

    facts = inspect(path)
    if as_json:
        print_json(facts)
        return
    for name, value in facts.items():
        click.echo(f"{name:14} {value}")
