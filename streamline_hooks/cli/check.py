"""``streamline-hooks check``: the assertions of `streamline_hooks.testing` on any model."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from streamline_hooks.cli.loading import load_without_tokenizer
from streamline_hooks.cli.options import Json, Model


def check(
    model: Model,
    window: Annotated[
        list[str] | None,
        typer.Option(
            metavar="START:STOP",
            help="Blocks whose removal is tried, without STOP. May be repeated.",
            show_default="the first, one and three in the middle, the last",
        ),
    ] = None,
    stack: Annotated[str, typer.Option(help="Path of the stack of blocks, where there are several.")] = "",
    as_json: Json = False,
) -> None:
    """Hold a model against what surgery, caches and checkpoints must keep; exit code 1 where something does not."""
    from streamline_hooks.testing.checks import run_checks

    windows = None if window is None else [_window(text) for text in window]
    loaded = load_without_tokenizer(model)
    found = []
    for one in run_checks(loaded, windows, stack=stack or None):
        found.append(one)
        if not as_json:
            typer.echo(f"{one.verdict:8} {one.name:52} {one.seconds:7.1f} s")
            if one.text:
                typer.echo("".join(f"         {line}\n" for line in one.text.splitlines()), nl=False)
    if as_json:
        typer.echo(json.dumps([one.to_dict() for one in found], indent=2))
    if any(one.verdict == "FAILED" for one in found):
        raise typer.Exit(1)


def _window(text: str) -> range:
    from streamline_hooks.errors import StreamlineError

    start, colon, stop = text.partition(":")
    if not (colon and start.strip().isdigit() and stop.strip().isdigit()):
        raise StreamlineError(f"--window {text!r} is no range of blocks; expected START:STOP such as 12:20.")
    return range(int(start), int(stop))
