"""The command line, one file a command."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import Any

import typer

from streamline_hooks.cli.check import check
from streamline_hooks.cli.compress import compress
from streamline_hooks.cli.diff import diff
from streamline_hooks.cli.evaluate import evaluate
from streamline_hooks.cli.export import export
from streamline_hooks.cli.generate import generate
from streamline_hooks.cli.inspect import inspect
from streamline_hooks.cli.rank import rank
from streamline_hooks.cli.sweep import sweep
from streamline_hooks.errors import StreamlineError, TrainingInterrupted

INTERRUPTED = 130  # the exit code of a command that Ctrl-C ended, as shells have it

app = typer.Typer(
    name="streamline-hooks",
    help="Find, remove and repair the transformer blocks that do least.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@app.callback()
def _refuse_several(context: typer.Context) -> None:
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count > 1 and context.invoked_subcommand != "compress":
        raise StreamlineError(
            f"WORLD_SIZE={count} says that several processes were started, and {context.invoked_subcommand} is for "
            "one: each would do all of it, and write the same files. Start it alone; compress is what several share."
        )


def _interruptible(command: Callable[..., None]) -> Callable[..., None]:
    """End a command with exit code 130 on Ctrl-C, whichever version of typer runs it."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except KeyboardInterrupt:
            typer.echo("streamline-hooks: interrupted", err=True)
            raise typer.Exit(INTERRUPTED) from None

    return run


for _command in (compress, evaluate, sweep, generate, inspect, check, rank, diff, export):
    app.command()(_interruptible(_command))


def main() -> None:
    """Run the command line; exit with code 2 and one line if a command cannot work, with 130 if it was interrupted."""
    try:
        app()
    except TrainingInterrupted as error:
        typer.echo(f"streamline-hooks: {error}", err=True)
        sys.exit(INTERRUPTED)
    except StreamlineError as error:
        typer.echo(f"streamline-hooks: {error}", err=True)
        sys.exit(2)
