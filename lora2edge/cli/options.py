"""Options that several verbs share, and how verbs show progress and results."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from lora2edge.contracts import Progress
    from lora2edge.errors import InputError

F = TypeVar("F", bound=Callable[..., Any])


def model_options(function: F) -> F:
    """--base, --adapter, how several are combined, --trained-on, --merge-base and --trust-remote-code."""
    for option in (
        click.option(
            "--trust-remote-code/--no-trust-remote-code",
            default=None,
            help="Run the code that the base comes with, where transformers has no model of its kind.",
        ),
        click.option(
            "--merge-base",
            type=click.Choice(["original", "dequantized", "measure"]),
            help="Of an adapter trained on a quantized base. Default: measure both.",
        ),
        click.option(
            "--trained-on",
            metavar="NAME|DIR|ID",
            help="Quantized base of the training, where --base is the original: nf4, nf4-double, fp4, fp4-double, "
            "or a saved one.",
        ),
        click.option("--majority-sign", metavar="total|frequency", help="TIES: how signs are elected. Default: total."),
        click.option("--svd-rank", type=int, help="Of svd and *_svd. Default: the largest rank of the adapters."),
        click.option("--density", type=float, help="Share of the entries that TIES, DARE and magnitude_prune keep."),
        click.option(
            "--combine", metavar="METHOD", help="Of several adapters; see docs/combining.md. Default: sum, weighted."
        ),
        click.option(
            "--adapter",
            multiple=True,
            metavar="DIR|ID[@REV][=WEIGHT]",
            help="PEFT adapter: a folder or a hub id. Repeatable, in order.",
        ),
        click.option(
            "--base", metavar="DIR|ID[@REV]", help="Base checkpoint. Default: the one that the adapter names."
        ),
    ):
        function = option(function)
    return function


def run_options(function: F) -> F:
    """--device, --dtype, --tokens, --threads, --seed."""
    for option in (
        click.option("--seed", type=int, help="Of the bootstrap intervals. Default: 0."),
        click.option("--threads", type=click.IntRange(min=1), help="Default: all physical cores."),
        click.option(
            "--tokens", type=click.IntRange(min=1), help="Budget of scored test tokens, texts or words. Default: 20000."
        ),
        click.option(
            "--dtype",
            type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
            help="Of the baseline. auto: float32 for quality, the checkpoint's own for speed.",
        ),
        click.option("--device", type=click.Choice(["auto", "cpu", "cuda"])),
    ):
        function = option(function)
    return function


data_option = click.option(
    "--data",
    type=click.Path(path_type=Path),
    help="JSONL: prompt/response, input/output or messages; of a classifier text/label, or tokens/labels.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object, for machines.")
force_option = click.option("--force", is_flag=True, help="Write into a folder that is not empty and not ours.")
target_option = click.option(
    "--target", "targets", multiple=True, metavar="NAME|FILE", help="What to build; see `lora2edge targets`."
)


@contextlib.contextmanager
def progress_shown(as_json: bool) -> Iterator[Progress]:
    """Bars on a terminal; silence in a pipe and under --json."""
    from lora2edge.progress import SILENT, Bars

    if as_json or not sys.stderr.isatty():
        yield SILENT
    else:
        with Bars() as bars:
            yield bars


def print_json(data: Any) -> None:
    """One JSON object on standard output; null for figures that are not finite, which JSON cannot hold."""
    try:
        line = json.dumps(data, ensure_ascii=False, allow_nan=False)
    except ValueError:
        from lora2edge.report.write import finite

        line = json.dumps(finite(data)[0], ensure_ascii=False)
    click.echo(line)


def show_plan(plan: dict[str, Any], refusals: Sequence[InputError], as_json: bool) -> int:
    """Prints a plan, and what refuses it; returns the exit code.

    JSON is one object, with the refusals as `error` beside the plan; as text they are raised.
    """
    from lora2edge.errors import InputError, refuse
    from lora2edge.report.terminal import print_plan

    if not as_json:
        print_plan(plan)
        refuse(list(refusals))
        return 0
    try:
        refuse(list(refusals))
    except InputError as error:
        print_json({**plan, "error": error.as_dict()})
        return error.exit_code
    print_json(plan)
    return 0


def text(path: Path | None) -> str | None:
    """A path as recipes hold it."""
    return None if path is None else str(path)
