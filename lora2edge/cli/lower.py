"""`lora2edge lower`: up to the artifact, and no further."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lora2edge.cli.options import (
    data_option,
    force_option,
    json_option,
    model_options,
    print_json,
    progress_shown,
    run_options,
    target_option,
    text,
)


@click.command("lower")
@click.argument("recipe", required=False, type=click.Path(path_type=Path))
@model_options
@target_option
@data_option
@click.option("--out", type=click.Path(path_type=Path), help="Where the artifacts go.")
@run_options
@force_option
@json_option
def command(
    recipe: Path | None,
    targets: tuple[str, ...],
    data: Path | None,
    out: Path | None,
    force: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Write the artifacts without proving or measuring anything; all of --data calibrates."""
    from lora2edge.recipe import load_recipe
    from lora2edge.verbs import lower_all

    merged = {**options, "targets": list(targets) or None, "data": text(data), "out": text(out)}
    loaded = load_recipe(recipe, merged)
    with progress_shown(as_json) as progress:
        rows = lower_all(loaded, force=force, progress=progress)
    if as_json:
        print_json(rows)
        return
    for row in rows:
        click.echo(
            f"{row['artifact']}: {row['size_bytes'] / 1e6:.1f} MB, {row['seconds']:.1f} s, "
            f"peak memory {row['peak_rss_bytes'] / 1e6:.0f} MB{', reused' if row['reused'] else ''}"
        )
