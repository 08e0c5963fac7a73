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
    questions: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE", help="Multiple choice: JSONL, plain, .gz or .zip, or hub:NAME:SPLIT. Repeatable."),
    ] = None,
    last_words: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE", help="JSONL of context and continuation, to be predicted. May be repeated."),
    ] = None,
    problems: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE", help="JSONL of question and answer, as in GSM8K, to be solved. May be repeated."),
    ] = None,
    probes: Annotated[
        int, typer.Option(help="Made-up problems a sort: arithmetic, brackets, copying, counting; 0 for none.", min=0)
    ] = 0,
    prompts: Annotated[int, typer.Option(help="Beginnings of the text to be written on.", min=0)] = 8,
    normalised: Annotated[
        list[str] | None,
        typer.Option(metavar="TASK", help="Count these questions by likelihood a character. May be repeated."),
    ] = None,
    examples: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Solved questions to show before each, --shots of them.")
    ] = None,
    shots: Annotated[
        int,
        typer.Option(help="Solved ones before each question (--examples) and each problem (its file's first).", min=0),
    ] = 0,
    problem_tokens: Annotated[int, typer.Option(help="Tokens to write after each problem at most.", min=1)] = 256,
    samples: Annotated[
        int, typer.Option(help="Tries a problem of --problems, for pass@k; more than one need a --temperature.", min=1)
    ] = 1,
    temperature: Annotated[float, typer.Option(help="Of these tries.", min=0)] = 0.0,
    items: Annotated[int | None, typer.Option(help="Items a task at most, a seeded subset.", min=1)] = None,
    text_tokens: Annotated[int, typer.Option(help="Tokens a domain, about.", min=2)] = 20_000,
    window: Annotated[
        int | None, typer.Option(help="Tokens at a time.", min=1, show_default="1024 or the model's positions")
    ] = None,
    stride: Annotated[
        int | None, typer.Option(help="Tokens from one window to the next.", min=1, show_default="half a window")
    ] = None,
    add_bos: Annotated[
        bool, typer.Option("--add-bos", help="Begin questions with the BOS token, which some models are poor without.")
    ] = False,
    speed: Annotated[bool, typer.Option(help="Measure speed, of both models in turn.")] = True,
    harness: Annotated[
        str, typer.Option(metavar="TASKS", help="Tasks of lm-eval, with commas between them; needs the extra harness.")
    ] = "",
    harness_folder: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Task files of your own for --harness.")
    ] = None,
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
    """Measure a model: perplexity, questions, problems, what it writes, speed, and what it retains of its original.

    With --output a page that needs no network is written, and what has been measured is kept there: the same command
    goes on after an interruption.

    Example: streamline-hooks evaluate smollm2-small --against smollm2 --probes 50 --output evaluation
    """
    from streamline_hooks.checkpoint.checksums import update_checksums
    from streamline_hooks.checkpoint.writing import REPORT
    from streamline_hooks.core import check_writable
    from streamline_hooks.evaluation import evaluate as run
    from streamline_hooks.evaluation import suite_from_files
    from streamline_hooks.json_file import write_json

    tasks = [*(questions or ()), *(last_words or ()), *(problems or ()), *(["probes"] if probes else ()), harness]
    if harness_folder is not None and not harness:
        raise StreamlineError("--harness-folder holds task files; name those to run with --harness.")
    if output is not None:
        check_writable(output / "evaluation.json")
    made = Path(model) / REPORT
    compression = _report_of(made) if output is not None and made.is_file() else None
    domains = text or ([] if any(tasks) else ["pydoc"])
    loaded, tokenizer = load_model(model)
    original, theirs = load_model(against) if against else (None, tokenizer)
    if _reads(tokenizer) != _reads(theirs):
        raise StreamlineError(
            f"{model} and {against} have tokenizers that read the same text differently, so that nothing compares them."
        )
    names = _names(model, against)
    measured: dict[str, Any] = {}
    lines = []
    if domains or any(tasks[:-1]) or not harness:
        suite = suite_from_files(
            tokenizer,
            text=domains,
            questions=questions or (),
            last_words=last_words or (),
            problems=problems or (),
            probe_count=probes,
            prompts=prompts,
            normalised=normalised or (),
            examples=examples,
            shots=shots,
            problem_tokens=problem_tokens,
            samples=samples,
            temperature=temperature,
            items=items,
            text_tokens=text_tokens,
            seed=seed,
            window=window,
            stride=stride,
            add_bos=add_bos,
            **({} if speed else {"timed": None}),
        )
        found = run(
            loaded,
            suite,
            original,
            batch_size=batch_size,
            seed=seed,
            keep_in=None if output is None else output / "measured.json",
            name=names[0],
            reference_name=names[1],
        )
        measured = found.report()
        lines.append(found.table())
    if harness:
        from streamline_hooks.integrations.harness import run_harness

        asked = [task.strip() for task in harness.split(",") if task.strip()]
        for name, subject in (("harness", loaded), ("harness_original", original)):
            if subject is not None:
                scored = run_harness(
                    subject, tokenizer, asked, task_folder=harness_folder, limit=items, batch_size=batch_size, seed=seed
                )
                measured[name] = scored.to_dict()
                lines.append(f"lm-eval, {names[name != 'harness']}\n{scored.table()}")
    typer.echo(json.dumps(measured, indent=1) if as_json else "\n\n".join(lines))
    if output is not None:
        write_json(output / "evaluation.json", measured)
        update_checksums(output)
        title = f"{names[0]}, evaluated"
        told = write_page(output, title, compression=compression, evaluation=measured)
        typer.echo(told, err=as_json)


def _report_of(file: Path) -> dict[str, Any]:
    """Read how the model was compressed, which the page tells too."""
    from streamline_hooks.checkpoint.safety import read_json

    try:
        return read_json(file)
    except StreamlineError as error:
        raise StreamlineError(f"{error} Or delete {file}: the page is then of the evaluation alone.") from error


def _reads(tokenizer: Any) -> list[Any]:
    """What tells one tokenizer from another."""
    text = "The quick brown fox, 12 lazy dogs: naïve?"
    return [tokenizer(text)["input_ids"], tokenizer.bos_token_id, tokenizer.eos_token_id]


def _names(model: str, against: str) -> tuple[str, str]:
    """What the two are called: the last part of where they are, or all of it where that is the same."""
    if not against:
        return Path(model).resolve().name, "original"
    short = Path(model).resolve().name, Path(against).resolve().name
    return short if short[0] != short[1] else (model, against)
