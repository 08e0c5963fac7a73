"""The command ``streamline-hooks rank``."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from streamline_hooks.cli.calibration_text import Sources
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
from streamline_hooks.core.tables import table
from streamline_hooks.errors import StreamlineError

if TYPE_CHECKING:
    from streamline_hooks.statistics import Profile


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
    from streamline_hooks.selection import protected_blocks, score_windows
    from streamline_hooks.selection import windows as windows_of
    from streamline_hooks.stack import find_stack
    from streamline_hooks.statistics import Profile, check_profile
    from streamline_hooks.statistics import profile as measure

    searching = search_config(search, criterion, windows=parts, shortlist=top)
    search = searching.kind
    chosen = searching.resolved_criterion
    if remove is None and (search != "window" or chosen.needs == "model"):
        raise StreamlineError(
            f"To rank {search if search != 'window' else ''} by {criterion} takes a target; add --remove, such as "
            "--remove 0.25.".replace("  ", " ")
        )
    searching.check(parse_target(remove or "1"))
    refuse_unused(context, searching)
    if save is not None and not save.resolve().parent.is_dir():
        raise StreamlineError(f"--save {save}: there is no folder {save.parent}; create it first.")
    if save is not None:
        check_writable(save)
    if model is None and profile_file is None:
        raise StreamlineError("Give a model, or a profile that was saved with --save (--profile FILE).")
    sources = Sources.parse(calibration, temperature)
    if dry_run and sources.written:
        raise StreamlineError(f"A dry run writes no text, so that {sources.unusual} has none; give what is there.")
    loaded: Any = None
    batches = profile = task = None
    if model is not None:
        task = task_named(task_name, model)
        if not task.is_of_text and sources.unusual:
            raise StreamlineError(f"{sources.unusual} is for models that write, and {model} is for {task}.")
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
    protected = protected_blocks(block_numbers(keep), profile.length if profile else len(find_stack(loaded, stack)))
    if dry_run:
        from streamline_hooks.evaluation.pace import measure_pace

        if profile is not None:
            typer.echo("The profile is there, so that no pass makes it.")
        elif not task_named(task_name, model).is_of_text:
            typer.echo("What a pass of such a model costs is not known beforehand.")
        else:
            typer.echo(str(measure_pace(loaded, cast(Any, batches)[0], stack=stack).rank(cast(Any, batches))))
        if chosen.needs == "model" or searching.runs_model:
            typer.echo(f"The search {search} by {criterion} runs the model besides; its bars say what that costs.")
        return
    if profile is None:
        profile = measure(loaded, cast(Any, batches), keep=protected, stack=stack)
    if save is not None:
        profile.save(save)
    rows: list[dict[str, Any]] = []
    if remove is None:
        for length in range(1, profile.places - 1 + (profile.places - 1 < profile.length)):
            free = [w for w in _windows(windows_of, profile.length, length, protected) if w.stop < profile.places]
            scores = score_windows(chosen, free, profile=profile)
            best = sorted(zip(free, scores, strict=True), key=lambda pair: (-pair[1], pair[0].start))[:top]
            rows += [_row(profile, window, score, criterion) for window, score in best]
    else:
        candidates = _candidates(loaded, remove, profile, protected, stack)
        given_to: dict[str, Any] = {"profile": profile, "model": loaded, "batches": batches, "stack": stack}
        asked = searching.problem(candidates, profile.length, keep=protected, seed=seed, task=task, **given_to)
        for found in searching.find(asked):
            one = found.windows[0] if len(found.windows) == 1 and not found.silenced else None
            row = {"blocks": str(found), "windows": [[w.start, w.stop] for w in found.windows]}
            row["silenced"] = [list(half) for half in found.silenced]
            rows.append({**row, **(_row(profile, one, found.score, criterion) if one else {"score": found.score})})
        if search == "window" and chosen.needs == "profile" and profile.resampled:
            rows[0]["first_in_resamples"] = _how_sure(profile, chosen, candidates)
    said = _SCORES.get(search, "score").format(criterion)
    if as_json:
        about = {"stack": profile.about.get("stack"), "blocks": profile.length, "criterion": criterion, "scores": said}
        typer.echo(json.dumps({**about, "tokens": profile.tokens, "windows": rows}, indent=2))
    else:
        _print(profile, rows, said)


def _batches(
    model: Any,
    tokenizer: Any,
    sources: Sources,
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
    for name, write in sources.writers(model, tokenizer, sizes, cache=cache, **options).items():
        documents[name] = write()
    options |= {f"{part}_tokens": size for part, size in sizes.items()}
    split = sources.dealt(documents, tokenizer, options, None)
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
    from streamline_hooks.cli.task_data import Amounts, batches_for

    of = {"calibration": tokens}, {"calibration": examples}
    amounts = Amounts(*of, sequence_length, batch_size, seed)
    return batches_for(model, processor, task, calibration, amounts, partial(typer.echo, err=True))["calibration"]


def _windows(windows_of: Any, length: int, size: int, protected: frozenset[int]) -> list[range]:
    try:
        return list(windows_of(length, size, protected))
    except StreamlineError:  # no run of this length is free; shorter ones were
        return []


def _candidates(model: Any, remove: str, profile: Profile, protected: frozenset[int], stack: str | None) -> list[range]:
    """The windows that reach a target; of a number of blocks without the model."""
    from streamline_hooks.cli.short_forms import parse_target
    from streamline_hooks.selection import blocks_to_remove, windows, windows_for

    target = parse_target(remove)
    if target.counts_blocks:
        return windows(profile.length, blocks_to_remove(target, profile.length), protected)
    if model is None:
        raise StreamlineError(f"The target {target} is measured on the model; give it, or a number of blocks.")
    return windows_for(model, target, stack=stack, protected=protected, say=partial(typer.echo, err=True))


# What a search's scores are; the others' are of their own making.
_SCORES = {"window": "{}", **dict.fromkeys(("disjoint", "one-shot", "mixed", "greedy"), "sum of {}")}

# A criterion that is a statistic of the profile, or one minus it.
_INTERVALS = {"cosine": (0.0, 1.0), "angular": (1.0, -1.0), "last_angular": (1.0, -1.0)}


def _row(profile: Profile, window: range, score: float, criterion: str) -> dict[str, Any]:
    row: dict[str, Any] = {"length": len(window), "start": window.start, "stop": window.stop, "score": score}
    if window.stop < profile.places:
        row["cosine"] = profile.value("cosine", window)
        row["angular_distance"] = profile.value("angular", window)
        if criterion in _INTERVALS and profile.resampled:
            (offset, sign), statistic = _INTERVALS[criterion], cast(Any, criterion)
            if math.isclose(score, offset + sign * profile.value(statistic, window), rel_tol=1e-9):  # and no sum
                row["interval"] = sorted(offset + sign * end for end in profile.interval(statistic, window))
    return row


def _how_sure(profile: Profile, criterion: Any, candidates: list[range]) -> float:
    """In what share of the resamples of the sequences the first window is first."""
    from streamline_hooks.selection import score_windows

    def first(of: Profile) -> int:
        scores = score_windows(criterion, candidates, profile=of)
        return max(range(len(scores)), key=lambda k: (scores[k], -k))

    chosen = first(profile)
    firsts = [first(one) for one in profile.resamples()]
    return sum(k == chosen for k in firsts) / max(1, len(firsts))


def _print(profile: Profile, rows: list[dict[str, Any]], heading: str) -> None:
    typer.echo(
        f"{profile.about.get('stack')}: {profile.length} blocks; {profile.tokens:,} tokens of {profile.sequences} "
        "sequences\n"
    )
    cells = []
    for row in rows:
        blocks = row.get("blocks") or (f"{row['start']}-{row['stop'] - 1}" if row["length"] > 1 else str(row["start"]))
        length = row.get("length") or sum(stop - start for start, stop in row["windows"]) or "-"
        low, high = row.get("interval", (None, None))
        interval = f"{low:.4f} to {high:.4f}" if low is not None else ""
        numbers = [f"{row[name]:.4f}" if name in row else "" for name in ("cosine", "angular_distance")]
        cells.append([length, blocks, f"{row['score']:.4f}", interval, *numbers])
    typer.echo(table(cells, ["length", "blocks", heading, "95 % interval", "cosine", "angular distance"]))
    if rows and "first_in_resamples" in rows[0]:
        typer.echo(f"\nThe first comes first in {rows[0]['first_in_resamples']:.0%} of the resamples of the sequences.")
