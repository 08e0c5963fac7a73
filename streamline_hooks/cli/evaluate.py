"""The command ``streamline-hooks evaluate``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from streamline_hooks.cli.loading import load_model
from streamline_hooks.cli.options import Json, Model, Seed
from streamline_hooks.cli.page import write_page
from streamline_hooks.errors import StreamlineError


def evaluate(
    model: Model,
    against: Annotated[
        str, typer.Option("--against", metavar="MODEL", help="The original: what is retained of it is told besides.")
    ] = "",
    text: Annotated[
        list[str] | None,
        typer.Option(
            "--text",
            metavar="TEXT",
            help="A domain of text for perplexity and agreement: a file, folder, data set, or pydoc. May be repeated.",
            show_default="pydoc, if no task is named",
        ),
    ] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME|FILE",
            help="A task of lm-eval by name, a task file (YAML) or a folder of them, or questions as JSONL (plain, "
            "compressed or .zip) or hub:NAME:SPLIT. Needs the extra tasks. May be repeated.",
        ),
    ] = None,
    metric: Annotated[
        str, typer.Option(help="Compare tasks that have this metric by it.", show_default="each task's first")
    ] = "",
    problems: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE|probes[:N]",
            help="Problems to be solved in writing: JSONL of question and answer, as in GSM8K, or N generated ones of "
            "each sort (arithmetic, brackets, copying, counting; 50 by default). May be repeated.",
        ),
    ] = None,
    prompts: Annotated[int, typer.Option(help="Beginnings of the text to be written on.", min=0)] = 8,
    shots: Annotated[
        int | None,
        typer.Option(
            help="Solved examples before each item of a task, and before each problem (its file's first).",
            min=0,
            show_default="what the task says; none before problems",
        ),
    ] = None,
    problem_tokens: Annotated[int, typer.Option(help="Tokens to write after each problem at most.", min=1)] = 256,
    samples: Annotated[
        int, typer.Option(help="Tries of each problem of a file, for pass@k; several need a --temperature.", min=1)
    ] = 1,
    temperature: Annotated[float, typer.Option(help="Temperature of these tries.", min=0)] = 0.0,
    items: Annotated[int | None, typer.Option(help="Items a task at most, a seeded subset.", min=1)] = None,
    text_tokens: Annotated[int, typer.Option(help="Tokens a domain, about.", min=2)] = 20_000,
    window: Annotated[
        int | None, typer.Option(help="Tokens at a time.", min=1, show_default="1024 or the model's positions")
    ] = None,
    stride: Annotated[
        int | None, typer.Option(help="Tokens from one window to the next.", min=1, show_default="half a window")
    ] = None,
    add_bos: Annotated[
        bool | None,
        typer.Option(
            "--add-bos/--no-add-bos",
            help="Begin the texts of tasks with the BOS token, which some models are poor without.",
            show_default="what the tokenizer does",
        ),
    ] = None,
    speed: Annotated[bool, typer.Option(help="Measure speed, of both models in turn.")] = True,
    batch_size: Annotated[int, typer.Option(help="Texts at a time.", min=1)] = 8,
    seed: Seed = 0,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Folder for evaluation.json, the page and its figures; goes on from there."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure a model: perplexity, tasks, problems, generation and speed, and what it retains of its original.

    With --output a page that needs no network is written, and results are cached there: the same command continues
    after an interruption.

    Example: streamline-hooks evaluate smollm2-small --against smollm2 --tasks piqa --problems probes -o evaluation
    """
    from streamline_hooks.checkpoint.checksums import update_checksums
    from streamline_hooks.checkpoint.writing import REPORT
    from streamline_hooks.cli.short_forms import parse_problems
    from streamline_hooks.core import check_writable
    from streamline_hooks.evaluation import Suite
    from streamline_hooks.evaluation import evaluate as run
    from streamline_hooks.evaluation.evaluate import require_same_tokens
    from streamline_hooks.json_file import write_json

    files, probes = parse_problems(problems or ())
    suite = Suite(
        text=text or ([] if tasks or files or probes else ["pydoc"]),
        text_tokens=text_tokens,
        tasks=tasks or (),
        metric=metric,
        shots=shots,
        problems=files,
        probes=probes,
        items=items,
        problem_tokens=problem_tokens,
        samples=samples,
        temperature=temperature,
        prompts=prompts,
        window=window,
        stride=stride,
        add_bos=add_bos,
        batch_size=batch_size,
        seed=seed,
        timed=Suite.timed if speed else None,
    )
    if output is not None:
        check_writable(output / "evaluation.json")
    made = Path(model) / REPORT
    compression = _report_of(made) if output is not None and made.is_file() else None
    loaded, tokenizer = load_model(model)
    original, theirs = load_model(against) if against else (None, tokenizer)
    require_same_tokens(tokenizer, theirs)
    names = _names(model, against)
    found = run(
        loaded,
        tokenizer,
        suite,
        original,
        keep_in=None if output is None else output / "measured.json",
        name=names[0],
        reference_name=names[1],
    )
    typer.echo(json.dumps(found.report(), indent=1) if as_json else found.table())
    if output is not None:
        write_json(output / "evaluation.json", found.report())
        update_checksums(output)
        title = f"{names[0]}, evaluated"
        typer.echo(write_page(output, title, compression=compression, evaluation=found.report()), err=as_json)


def _report_of(file: Path) -> dict[str, Any]:
    """Read how the model was compressed, which the page shows too."""
    from streamline_hooks.checkpoint.safety import read_json

    try:
        return read_json(file)
    except StreamlineError as error:
        raise StreamlineError(f"{error} Or delete {file}: the page is then of the evaluation alone.") from error


def _names(model: str, against: str) -> tuple[str, str]:
    """Return the names of the two models: the last part of their paths, or the whole where these are the same."""
    if not against:
        return Path(model).resolve().name, "original"
    short = Path(model).resolve().name, Path(against).resolve().name
    return short if short[0] != short[1] else (model, against)
