"""The command ``streamline-hooks inspect``."""

from __future__ import annotations

import json
from pathlib import Path

import typer

from streamline_hooks.cli.loading import load_model, load_without_tokenizer, task_named
from streamline_hooks.cli.options import Json, Model


def inspect(model: Model, as_json: Json = False) -> None:
    """Print the stacks of blocks that a model has, and which one would be worked on.

    A model for anything: language, images, an encoder with a decoder; a folder of safetensors needs no tokenizer.
    """
    from streamline_hooks.stack import find_stack, find_stacks

    if any(Path(model).glob("*.safetensors")):
        loaded = load_without_tokenizer(model)
    else:
        loaded, _ = load_model(model, task_named("", model))
    chosen = find_stack(loaded)
    stacks = find_stacks(loaded)
    if as_json:
        rows = [
            {
                "path": s.path,
                "blocks": len(s),
                "classes": sorted({type(b).__name__ for b in s.blocks}),
                "parameters": sum(s.parameters_per_block),
                "chosen": s.path == chosen.path,
            }
            for s in stacks
        ]
        typer.echo(json.dumps(rows, indent=2))
        return
    typer.echo(f"{type(loaded).__name__}, {sum(p.numel() for p in loaded.parameters()):,} parameters")
    for s in stacks:
        typer.echo(f"{'->' if s.path == chosen.path else '  '} {s}")
