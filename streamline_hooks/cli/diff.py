"""``streamline-hooks diff``: which blocks of one model are which blocks of another."""

from __future__ import annotations

from typing import Annotated

import typer

from streamline_hooks.cli.loading import load_without_tokenizer


def diff(
    first: Annotated[str, typer.Argument(metavar="A", help="A folder, a name on the hub, or smollm2.")],
    second: Annotated[str, typer.Argument(metavar="B", help="Another one, made of A.")],
    stack: Annotated[str, typer.Option(help="Path of the stack of blocks, where there are several.")] = "",
) -> None:
    """Say which blocks of B are which blocks of A, by their weights alone."""
    from streamline_hooks.checkpoint import compare_blocks, read_plans
    from streamline_hooks.errors import StreamlineError
    from streamline_hooks.stack import find_stack

    one, two = map(load_without_tokenizer, (first, second))
    matches = compare_blocks(one, two, stack=stack or None)
    for match in matches:
        typer.echo(str(match))
    gone = sorted(set(range(len(find_stack(one, stack or None)))) - {match.source for match in matches})
    typer.echo(f"of A, not in B: {', '.join(map(str, gone)) or 'none'}")
    try:
        plans = read_plans(two)
    except StreamlineError:
        typer.echo("B has no plan of a surgery")
        return
    for plan in plans:
        typer.echo(f"its plan: {plan}")
