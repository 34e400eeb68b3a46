"""`lora2edge measure`: the quality of an artifact that exists."""

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


@click.command("measure")
@click.argument("artifact", type=click.Path(path_type=Path))
@model_options
@data_option
@run_options
@json_option
def command(artifact: Path, data: Path | None, as_json: bool, **options: Any) -> int:
    """Measure an artifact's quality against base + live adapter, and judge its gates.

    Base, adapter and data default to those of the build that ARTIFACT lies in.
    """
    from lora2edge.report.terminal import print_quality
    from lora2edge.verbs import measure_artifact

    with progress_shown(as_json) as progress:
        result = measure_artifact(artifact, {**options, "data": text(data)}, progress=progress)
    print_json(result) if as_json else print_quality(result)
    return 3 if result["verdict"] == "fail" else 0
