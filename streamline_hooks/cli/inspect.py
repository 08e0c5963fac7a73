"""Implement ``streamline-hooks inspect``, ``check`` and ``diff``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Annotated, Any

from cyclopts import Parameter

from streamline_hooks.checkpoint import LoadingConfig, compare_blocks, load_without_tokenizer, read_plans
from streamline_hooks.cli.config_options import OptionValues, read_loading, with_options
from streamline_hooks.cli.options import Json, Model
from streamline_hooks.cli.output import print_json, print_log
from streamline_hooks.cli.parsing import parse_window
from streamline_hooks.core import StreamlineError
from streamline_hooks.modeling import find_stack, find_stacks
from streamline_hooks.testing import run_checks

Stack = Annotated[str | None, Parameter(help="Path of the block stack, for models with several stacks.")]
Window = Annotated[
    list[str] | None,
    Parameter(
        help="Window START:STOP (STOP excluded) to remove as a test. May be repeated. By default the first block, one "
        "and three blocks in the middle, and the last block."
    ),
]
First = Annotated[str, Parameter(name="A", help="Folder, hub id or smollm2.")]
Second = Annotated[str, Parameter(name="B", help="A model that was made from A.")]


@with_options(LoadingConfig)
def inspect(model: Model, /, *, as_json: Json = False, option_values: OptionValues) -> None:
    """Print the block stacks of a model, with the default stack marked.

    Models of all tasks are supported. A folder with safetensors needs no tokenizer.
    """
    print_log(to_stderr=True)
    loaded = load_without_tokenizer(model, read_loading(option_values))
    chosen, stacks = find_stack(loaded), find_stacks(loaded)
    if as_json:
        rows = [
            {
                "path": stack.path,
                "blocks": len(stack),
                "classes": sorted({type(block).__name__ for block in stack.blocks}),
                "parameters": sum(stack.parameters_per_block),
                "chosen": stack.path == chosen.path,
            }
            for stack in stacks
        ]
        print_json(rows)
        return
    print(f"{type(loaded).__name__}, {sum(p.numel() for p in loaded.parameters()):,} parameters")
    for stack in stacks:
        print(f"{'->' if stack.path == chosen.path else '  '} {stack}")


@with_options(LoadingConfig)
def diff(
    first: First, second: Second, /, *, stack: Stack = None, as_json: Json = False, option_values: OptionValues
) -> None:
    """Match the blocks of B to those of A by their weights, and print the matches."""
    print_log(to_stderr=True)
    original, changed = (load_without_tokenizer(name, read_loading(option_values)) for name in (first, second))
    matches = compare_blocks(original, changed, stack=stack)
    missing = sorted(set(range(len(find_stack(original, stack)))) - {match.source for match in matches})
    plans: Sequence[Any] = []
    with suppress(StreamlineError):  # a model without surgery has no plan
        plans = read_plans(changed)
    if as_json:
        blocks = [
            {"source": match.source, "target": number, "changed": match.changed, "distance": match.distance}
            for number, match in enumerate(matches)
        ]
        print_json({"blocks": blocks, "missing": missing, "plans": [str(plan) for plan in plans]})
        return
    for match in matches:
        print(match)
    print(f"of A, not in B: {', '.join(map(str, missing)) or 'none'}")
    for plan in plans:
        print(f"plan of B: {plan}")
    if not plans:
        print("B has no surgery plan")


@with_options(LoadingConfig)
def check(
    model: Model,
    /,
    *,
    window: Window = None,
    stack: Stack = None,
    as_json: Json = False,
    option_values: OptionValues,
) -> None:
    """Verify surgery, caches and checkpoints on a model; exit with code 1 if a check fails."""
    print_log(to_stderr=True)
    windows = None if window is None else [parse_window(text) for text in window]
    loaded = load_without_tokenizer(model, read_loading(option_values))
    results = []
    for result in run_checks(loaded, windows, stack=stack):
        results.append(result)
        if not as_json:
            print(f"{result.verdict:8} {result.name:52} {result.seconds:7.1f} s", flush=True)
            if result.text:
                print("".join(f"         {line}\n" for line in result.text.splitlines()), end="")
    if as_json:
        print_json([result.to_dict() for result in results])
    if any(result.verdict == "FAILED" for result in results):
        sys.exit(1)
