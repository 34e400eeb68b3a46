"""`lora2edge inspect`: what a folder holds."""

from __future__ import annotations

from pathlib import Path

import click

from lora2edge.cli.options import json_option, print_json


@click.command("inspect")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--base", metavar="DIR|ID[@REV]", help="Of an adapter. Default: the folder that it names.")
@json_option
def command(path: Path, base: str | None, as_json: bool) -> None:
    """Say what a checkpoint, adapter or artifact folder holds; reads no weight.

    An adapter whose base is at hand comes with its plan: what it reaches and changes, how it fits, what building it
    needs, and what would be refused.
    """
    from lora2edge.report.terminal import print_plan
    from lora2edge.verbs import inspect

    facts = inspect(path, base)
    if as_json:
        print_json(facts)
        return
    plan = facts.pop("plan", None)
    for name, value in facts.items():
        click.echo(f"{name:14} {value}")
    if plan:
        print_plan(plan)
    elif facts["kind"] == "adapter":
        click.echo("Its base is not here; how it fits, and what a build needs: --base FOLDER")
