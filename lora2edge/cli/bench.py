"""`lora2edge bench`: the speed of an artifact that exists."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lora2edge.cli.options import (
    data_option,
    json_option,
    model_options,
    print_json,
    progress_shown,
    run_options,
    text,
)


@click.command("bench")
@click.argument("artifact", type=click.Path(path_type=Path))
@model_options
@data_option
@click.option(
    "--scenario",
    "scenarios",
    multiple=True,
    metavar="NAME|FILE",
    help="Default: the target's own, where shipped; else chat, or classify.",
)
@run_options
@json_option
def command(artifact: Path, data: Path | None, scenarios: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Measure an artifact's speed against base + live adapter, interleaved, each in its own process.

    Base, adapter and data default to those of the build that ARTIFACT lies in.
    """
    from lora2edge.report.terminal import print_speed
    from lora2edge.verbs import bench_artifact

    with progress_shown(as_json) as progress:
        result = bench_artifact(artifact, {**options, "data": text(data)}, list(scenarios), progress=progress)
    print_json(result) if as_json else print_speed(result)
