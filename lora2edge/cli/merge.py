"""`lora2edge merge`: a safetensors checkpoint of base + adapter."""

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


@click.command("merge")
@model_options
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the merged checkpoint.")
@click.option("--prove", is_flag=True, help="Compare with the live adapter in PyTorch; needs --data.")
@data_option
@run_options
@click.option("--force", is_flag=True, help="Replace a folder that is not empty and not a merged checkpoint.")
@json_option
def command(out: Path, prove: bool, data: Path | None, force: bool, as_json: bool, **options: Any) -> None:
    """Write base + adapter as one safetensors checkpoint, streaming; every adapted tensor is checked."""
    from lora2edge.recipe import load_recipe
    from lora2edge.verbs import merge_to

    recipe = load_recipe(None, {**options, "data": text(data)})
    with progress_shown(as_json) as progress:
        result = merge_to(recipe, out, prove=prove, force=force, progress=progress)
    if as_json:
        print_json(result)
        return
    from lora2edge.report.words import merge_base_lines, named_base, unit

    for match in result["named_bases"]:
        if match["same_name"] is False:
            click.echo(f"note: {named_base(match)}")
    if merge_base := result.get("merge_base"):
        click.echo("\n".join(merge_base_lines(merge_base, unit(result))))
    click.echo(f"{out}: {result['tensors']} tensors, {result['adapted']} of them adapted")
    click.echo(f"worst formula error {result['worst_formula_error']:.1e} (relative)")
    if proof := result.get("merge"):
        of = unit(result)
        click.echo(
            f"math_kl {proof['math_kl']:.1e}  rounding_kl {proof['rounding_kl']:.1e}  "
            f"kl_mean {proof['kl_mean']:.1e}  floor_kl {proof['floor_kl']:.1e} nats per {of}"
        )
