"""`lora2edge doctor`: what works here."""

from __future__ import annotations

from dataclasses import asdict

import click

from lora2edge.cli.options import json_option, print_json


@click.command("doctor")
@json_option
def command(as_json: bool) -> None:
    """Say which backends work on this machine, and why the others don't."""
    from lora2edge.backends.base import backend_names, load_backend
    from lora2edge.bench.machine import describe

    healths = [load_backend(name).doctor() for name in backend_names()]
    machine = describe()
    if as_json:
        print_json({"machine": machine, "backends": [asdict(health) for health in healths]})
        return
    gpus = ", ".join(gpu["name"] for gpu in machine["gpus"]) or "no GPU"
    width = max(len(health.name) for health in healths)
    size = f"{machine['physical_cores']} cores, {machine['ram_bytes'] / 1e9:.1f} GB"
    click.echo(f"{'machine':{width}} {machine['cpu']}, {size}, {gpus}")
    for health in healths:
        click.echo(f"{health.name:{width}} {'works' if health.works else 'does not work'}: {health.detail}")
        if health.hint:
            click.echo(f"{'':{width}} hint: {health.hint}")
