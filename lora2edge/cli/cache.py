"""`lora2edge cache`: the finished stages that later builds reuse."""

from __future__ import annotations

import click

from lora2edge.cli.options import json_option, print_json


@click.group("cache")
def command() -> None:
    """List or remove finished stages."""


@command.command("ls")
@json_option
def list_entries(as_json: bool) -> None:
    """List what is kept."""
    from lora2edge.cache import Cache

    cache = Cache()
    rows = [
        {
            "stage": entry.stage,
            "key": entry.key[:12],
            "measured_at": entry.measured_at,
            "size_bytes": entry.size_bytes,
        }
        for entry in cache.entries()
    ]
    if as_json:
        print_json({"root": str(cache.root), "entries": rows})
        return
    click.echo(str(cache.root))
    for row in rows:
        click.echo(f"{row['stage']:12} {row['key']} {row['measured_at']} {int(str(row['size_bytes'])) / 1e6:10.2f} MB")


@command.command("prune")
@click.option("--older-than", type=float, default=30.0, show_default=True, metavar="DAYS", help="0 removes all.")
@json_option
def prune(older_than: float, as_json: bool) -> None:
    """Remove finished stages that are older."""
    from lora2edge.cache import Cache

    removed = len(Cache().prune(older_than))
    print_json({"removed": removed}) if as_json else click.echo(f"removed {removed} stages")
