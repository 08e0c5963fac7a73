"""The command ``streamline-hooks sweep``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from streamline_hooks.cli.calibration_text import parse_sources
from streamline_hooks.cli.given_options import refuse_unused
from streamline_hooks.cli.loading import block_numbers, load_model
from streamline_hooks.cli.options import (
    BatchSize,
    Calibration,
    Keep,
    Model,
    Parts,
    Search,
    Seed,
    SequenceLength,
    Tokens,
)
from streamline_hooks.cli.page import write_page
from streamline_hooks.cli.recipe import Recipe
from streamline_hooks.errors import StreamlineError


def sweep(
    context: typer.Context,
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the points, a table, and a page.")],
    remove: Annotated[
        str, typer.Option(help="How much is to go, with commas between amounts; each as compress takes it.")
    ] = "0.1,0.2,0.3",
    kind: Annotated[
        str,
        typer.Option(help="What stands in the blocks' place, with semicolons (or commas) between kinds."),
    ] = "none,linear",
    objective: Annotated[
        str, typer.Option("--train", metavar="LOSS", help="Train each repair, see compress --train.")
    ] = "",
    calibration: Calibration = None,
    search: Search = "window",
    parts: Parts = 2,
    keep: Keep = "",
    calibration_tokens: Tokens = 41_000,
    validation_tokens: Annotated[int, typer.Option(help="Tokens to judge the candidates on.", min=2)] = 4_096,
    test_tokens: Annotated[int, typer.Option(help="Tokens to measure each model on.", min=2)] = 12_288,
    sequence_length: SequenceLength = 512,
    batch_size: BatchSize = 4,
    shortlist: Annotated[int, typer.Option(help="Selections that are fitted and judged by KL.", min=1)] = 8,
    speed: Annotated[bool, typer.Option(help="Measure speed, beside the original and in turn.")] = True,
    speed_tokens: Annotated[int, typer.Option(help="Tokens of the prompt that is timed.", min=1)] = 512,
    repeats: Annotated[int, typer.Option(help="Rounds that are timed.", min=1)] = 7,
    seed: Seed = 0,
) -> None:
    """Compress a model in many ways, and show which are worth having: quality against size and speed.

    Every point is kept in the output folder when it is made: the same command goes on after an interruption, and one
    with more amounts or kinds makes only those.

    Example: streamline-hooks sweep smollm2 --remove 0.1,0.2,0.3 --kind linear,swiglu --output sweep
    """
    from streamline_hooks.cli.short_forms import parse_replacement, parse_target
    from streamline_hooks.core import atomic_file, check_writable
    from streamline_hooks.json_file import write_json
    from streamline_hooks.pipeline.config import DataConfig
    from streamline_hooks.pipeline.sweep import sweep as run
    from streamline_hooks.preparation import document_sizes

    check_writable(output / "sweep.json")
    targets = [parse_target(part) for part in remove.split(",") if part.strip()]
    kinds = [parse_replacement(part) for part in _kinds(kind)]
    config = Recipe(loss=objective, search=search).config(
        remove=targets[0] if targets else parse_target("0.25"),
        data=DataConfig(
            sequence_length, calibration_tokens, validation_tokens=validation_tokens, test_tokens=test_tokens
        ),
        keep=tuple(block_numbers(keep)),
        windows=parts,
        shortlist=shortlist,
        batch_size=batch_size,
        seed=seed,
    )
    refuse_unused(context, config.search)
    sources = parse_sources(calibration)
    if sources.generated:
        raise StreamlineError("A sweep takes text that is there: have the model write some once, by compress.")
    documents = sources.read()
    loaded, tokenizer = load_model(model)
    dealt = sources.mixed(documents, tokenizer, document_sizes(config), None)
    found = run(
        loaded,
        tokenizer,
        next(iter(documents.values())) if dealt is None else dealt,
        config,
        remove=targets,
        repair=kinds,
        speed=speed,
        speed_tokens=speed_tokens,
        repeats=repeats,
        keep_in=output / "measured.json",
        say=typer.echo,
    )
    typer.echo(f"\n{found.table()}")
    with atomic_file(output / "sweep.csv") as new:
        new.write_text(found.csv(), encoding="utf-8")
    write_json(output / "sweep.json", found.report())
    typer.echo(write_page(output, f"{Path(model).resolve().name}, swept", sweep=found.report()))


def _kinds(text: str) -> list[str]:
    """Kinds, between which stand semicolons, or commas where no kind has options with commas in them."""
    return [part for part in text.split(";" if ";" in text else ",") if part.strip()]
