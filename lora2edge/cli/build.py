"""`lora2edge build`: all stages."""

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
    show_plan,
    target_option,
    text,
)


@click.command("build")
@click.argument("recipe", required=False, type=click.Path(path_type=Path))
@model_options
@target_option
@data_option
@click.option("--out", type=click.Path(path_type=Path), help="Where report and artifacts go.")
@run_options
@click.option("--plan", "plan_only", is_flag=True, help="Print what would be done, and stop.")
@click.option("--no-bench", is_flag=True, help="Leave the speed unmeasured; the report says so.")
@click.option("--strict", is_flag=True, help="Exit 4 when a gate is inconclusive.")
@force_option
@json_option
def command(
    recipe: Path | None,
    targets: tuple[str, ...],
    data: Path | None,
    out: Path | None,
    plan_only: bool,
    no_bench: bool,
    strict: bool,
    force: bool,
    as_json: bool,
    **options: Any,
) -> int:
    """Merge, prove, lower, measure and report.

    RECIPE.yaml holds the same fields as the options, which override it. --plan reads headers only, needs neither
    --data nor --out, and tells everything that would be refused.
    """
    from lora2edge.build import build, describe_plan, survey_whole
    from lora2edge.errors import refuse
    from lora2edge.recipe import load_recipe
    from lora2edge.report.terminal import print_summary

    merged = {**options, "targets": list(targets) or None, "data": text(data), "out": text(out)}
    loaded = load_recipe(recipe, merged)
    if plan_only:
        survey = survey_whole(loaded, force=force)
        if survey.base is None and not survey.adapters:
            refuse(survey.refusals)  # there is nothing else to tell
        return show_plan(describe_plan(survey), survey.refusals, as_json)
    with progress_shown(as_json) as progress:
        result = build(loaded, progress=progress, force=force, bench=not no_bench, strict=strict)
    if as_json:
        print_json(result.report)
    else:
        print_summary(result.report)
        click.echo(f"{result.out / 'report.html'}")
    return result.exit_code
