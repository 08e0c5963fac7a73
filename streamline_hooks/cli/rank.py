"""The command ``streamline-hooks rank``."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from streamline_hooks.cli.calibration_text import parse_sources, special_option
from streamline_hooks.cli.given_options import refuse_unused
from streamline_hooks.cli.loading import block_numbers, load_model, task_named
from streamline_hooks.cli.options import (
    BatchSize,
    Calibration,
    CriterionName,
    DryRun,
    Examples,
    Json,
    Keep,
    Parts,
    ProfileFile,
    Search,
    Seed,
    SequenceLength,
    Stack,
    TaskName,
    Temperature,
    Tokens,
)
from streamline_hooks.errors import StreamlineError

if TYPE_CHECKING:
    from streamline_hooks.calibration.sources import TextSources


def rank(
    context: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]",
            help="A folder with a Transformers model, a hub name, or smollm2; not needed with --profile where the "
            "criterion and the search are read off that.",
            show_default=False,
        ),
    ] = None,
    remove: Annotated[
        str | None,
        typer.Option(help="Rank what reaches this target (8, 0.25, parameters:0.25) and not every length."),
    ] = None,
    criterion: CriterionName = "cosine",
    search: Search = "window",
    parts: Parts = 2,
    keep: Keep = "",
    profile_file: ProfileFile = None,
    save: Annotated[
        Path | None, typer.Option("--save", metavar="FILE", help="Keep the profile, for --profile later.")
    ] = None,
    calibration: Calibration = None,
    temperature: Temperature = None,
    calibration_tokens: Tokens = 41_000,
    calibration_examples: Examples = 256,
    sequence_length: SequenceLength = 512,
    batch_size: BatchSize = 4,
    seed: Seed = 0,
    stack: Stack = None,
    task_name: TaskName = "",
    top: Annotated[int, typer.Option(help="How many to print, of each length without --remove.", min=1)] = 3,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Print the best windows of every length, or what a search finds for a target.

    One pass over the calibration text compares the states at every two places. With --save it is kept; with --profile
    it is read again, and nothing is run unless the criterion or the search runs the model.

    Example: streamline-hooks rank smollm2 --save smollm2.profile
    """
    from streamline_hooks.cli.recipe import search_config
    from streamline_hooks.cli.short_forms import parse_target
    from streamline_hooks.core import check_writable
    from streamline_hooks.selection import protected_blocks
    from streamline_hooks.selection import rank as rank_windows
    from streamline_hooks.selection.ranking import require_target_free
    from streamline_hooks.stack import find_stack
    from streamline_hooks.statistics import Profile, check_profile
    from streamline_hooks.statistics import profile as measure

    searching = search_config(search, criterion, windows=parts, shortlist=top, keep=tuple(block_numbers(keep)))
    search = searching.kind
    chosen = searching.resolved_criterion
    target = parse_target(remove) if remove else None
    if target is None:
        require_target_free(searching)
    else:
        searching.check(target)
    refuse_unused(context, searching)
    if save is not None and not save.resolve().parent.is_dir():
        raise StreamlineError(f"--save {save}: there is no folder {save.parent}; create it first.")
    if save is not None:
        check_writable(save)
    if model is None and profile_file is None:
        raise StreamlineError("Give a model, or a profile that was saved with --save (--profile FILE).")
    sources = parse_sources(calibration, temperature)
    if dry_run and sources.generated:
        raise StreamlineError(
            f"A dry run writes no text, so that {special_option(sources)} has none; give what is there."
        )
    loaded: Any = None
    batches = profile = task = None
    if model is not None:
        task = task_named(task_name, model)
        if not task.is_of_text and special_option(sources):
            raise StreamlineError(f"{special_option(sources)} is for models that write, and {model} is for {task}.")
        refuse_unused(context, searching, task)
        loaded, tokenizer = load_model(model, task)
        refuse_unused(context, searching, task, loaded)
        stack = find_stack(loaded, stack).path
        if profile_file is None or chosen.needs == "model" or searching.runs_model:
            given = calibration_tokens, sequence_length, batch_size, seed
            if task.is_of_text:
                cache = None if save is None else save.resolve().parent
                batches = _batches(loaded, tokenizer, sources, cache, *given)
            else:
                batches = _of_task(task, calibration_examples, loaded, tokenizer, calibration, *given)
    if profile_file is not None:
        profile = Profile.load(profile_file)
        if loaded is not None:
            check_profile(profile, loaded, stack)
        elif stack is not None and stack != profile.about.get("stack"):
            raise StreamlineError(f"--stack {stack}: {profile_file} is of {profile.about.get('stack')}.")
    protected = protected_blocks(searching.keep, profile.length if profile else len(find_stack(loaded, stack)))
    if dry_run:
        from streamline_hooks.pipeline.plan import estimate_ranking

        if profile is not None:
            typer.echo("The profile is there, so that no pass makes it.")
        elif not task_named(task_name, model).is_of_text:
            typer.echo("What a pass of such a model costs is not known beforehand.")
        else:
            typer.echo(estimate_ranking(loaded, cast(Any, batches), stack=stack).table())
        if chosen.needs == "model" or searching.runs_model:
            typer.echo(f"The search {search} by {criterion} runs the model besides; its bars say what that costs.")
        return
    if profile is None:
        profile = measure(loaded, cast(Any, batches), keep=protected, stack=stack)
    if save is not None:
        profile.save(save)
    given_model: dict[str, Any] = {"model": loaded, "batches": batches, "task": task}
    found = rank_windows(profile, searching, target, say=partial(typer.echo, err=True), **given_model)
    typer.echo(json.dumps(found.report(), indent=2) if as_json else found.table())


def _batches(
    model: Any,
    tokenizer: Any,
    sources: TextSources,
    cache: Path | None,
    tokens: int,
    sequence_length: int,
    batch_size: int,
    seed: int,
) -> Any:
    from streamline_hooks.batch import batches_of
    from streamline_hooks.calibration import check_tokenizer, split_documents
    from streamline_hooks.calibration.mixture import smallest_part
    from streamline_hooks.preparation import require_positions

    require_positions(model, sequence_length)
    unused = smallest_part(sources.shares, sequence_length) if sources.shares else sequence_length
    sizes = {"calibration": tokens, "validation": unused, "test": unused}
    documents = sources.read()
    options: dict[str, Any] = {"sequence_length": sequence_length, "seed": seed}
    for name, write in sources.generators(model, tokenizer, sizes, cache=cache, **options).items():
        documents[name] = write()
    options |= {f"{part}_tokens": size for part, size in sizes.items()}
    split = sources.mixed(documents, tokenizer, options, None)
    if split is None:
        split = split_documents(next(iter(documents.values())), tokenizer, **options)
    elif split.notes:
        typer.echo(f"text       {split.describe()}", err=True)
    check_tokenizer(tokenizer, model.get_input_embeddings().num_embeddings, split)
    return batches_of(split.calibration, batch_size)


def _of_task(
    task: Any,
    examples: int,
    model: Any,
    processor: Any,
    calibration: list[str] | None,
    tokens: int,
    sequence_length: int,
    batch_size: int,
    seed: int,
) -> Any:
    """What a model that is not for text alone is given."""
    from streamline_hooks.calibration.task_batches import Amounts, task_batches

    of = {"calibration": tokens}, {"calibration": examples}
    amounts = Amounts(*of, sequence_length, batch_size, seed)
    return task_batches(model, processor, task, calibration, amounts, partial(typer.echo, err=True))["calibration"]
