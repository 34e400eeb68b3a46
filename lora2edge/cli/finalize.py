"""`lora2edge finalize`: an artifact made ready for the machine that runs it."""

from __future__ import annotations

from pathlib import Path

import click

from lora2edge.cli.options import json_option, print_json, progress_shown


@click.command("finalize")
@click.argument("artifact", type=click.Path(path_type=Path))
@json_option
def command(artifact: Path, as_json: bool) -> None:
    """Prepare an artifact for this machine: run it once, on the machine that will serve.

    ONNX Runtime's weights are packed for this processor and memory-mapped from then on, which takes less memory and
    time to load. The portable files stay; where machine or runtime change, they are what is opened.
    """
    from lora2edge.verbs import finalize_artifact

    with progress_shown(as_json) as progress:
        result = finalize_artifact(artifact, progress=progress)
    if as_json:
        print_json(result)
        return
    was = "was there already" if result["reused"] else "written"
    click.echo(f"{result['folder']}  {result['size_bytes'] / 1e6:.1f} MB  {was}")
