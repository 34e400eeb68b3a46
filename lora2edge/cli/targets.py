"""`lora2edge targets`: what can be built."""

from __future__ import annotations

import click

from lora2edge.cli.options import json_option, print_json


@click.command("targets")
@json_option
def command(as_json: bool) -> None:
    """List the targets that ship; copy one to make your own."""
    from lora2edge.target import load_target, shipped_targets

    rows = [load_target(name) for name in shipped_targets()]
    if as_json:
        print_json([target.model_dump() for target in rows])
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("target", "what it is", "gates", box=None, pad_edge=False)
    for target in rows:
        gates = ", ".join(
            f"{name} {'≥' if gate.min is not None else '≤'} {gate.min if gate.min is not None else gate.max}"
            + (" (warns)" if gate.action == "warn" else "")
            for name, gate in target.gates.items()
        )
        table.add_row(target.name, target.description, gates or "none")
    Console().print(table)
