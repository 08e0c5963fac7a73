"""The command ``streamline-hooks compress``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from streamline_hooks.cli.block_by_block import compress_block_by_block, only_whole, takes_more_than
from streamline_hooks.cli.calibration_text import parse_sources, special_option
from streamline_hooks.cli.given_options import given_or_none, is_given, refuse_unused
from streamline_hooks.cli.loading import block_numbers, load_model, task_named
from streamline_hooks.cli.options import (
    BatchSize,
    Calibration,
    DryRun,
    Examples,
    Keep,
    Model,
    Parts,
    ProfileFile,
    Remove,
    Search,
    Seed,
    SequenceLength,
    Stack,
    TaskName,
    Temperature,
    Tokens,
)
from streamline_hooks.cli.page import write_page
from streamline_hooks.cli.processes import launched
from streamline_hooks.cli.recipe import LEARNING_RATE, VALIDATIONS, Recipe
from streamline_hooks.errors import StreamlineError

if TYPE_CHECKING:
    from streamline_hooks.pipeline.config import CompressionConfig


def compress(
    context: typer.Context,
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write the compressed model to.")],
    remove: Remove = "0.25",
    kind: Annotated[
        str,
        typer.Option(
            help="What stands in the blocks' place: none, linear (rank=64, diagonal), mlp, swiglu (width=1536, "
            "linear=false), block (count=2), silenced, merged (weight=0.5), folded, scale; options "
            "after a colon, as in linear:rank=64. By default linear.",
            show_default=False,
        ),
    ] = "",
    preset: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="A whole recipe instead of --kind, --train and --heal, which says --search, --criterion and "
            "--repeated too where they are left out: best, iterative (the same in two rounds), two-windows, or as it "
            "was published, llm-streamline-ffn, llm-streamline-layer.",
        ),
    ] = "",
    objective: Annotated[
        str,
        typer.Option(
            "--train",
            metavar="LOSS",
            help="Train the repair: kl (to what the original says), reverse_kl (the other way round), embedding (to "
            "its embeddings), lm (the text), mse, relative or cosine (of the states), or a sum such as 'kl + 0.5*lm'.",
        ),
    ] = "",
    heal: Annotated[
        str,
        typer.Option(
            metavar="HOW",
            help="Train blocks that stay besides: lora (rank=16, where=after), or partial (where=beside, count=2).",
        ),
    ] = "",
    rounds: Annotated[
        int | None,
        typer.Option(
            help="Remove, train, and rank again on the repaired model, so often, with the text divided among the "
            "rounds.",
            min=1,
            show_default="1, or the preset's",
        ),
    ] = None,
    budget: Annotated[
        str,
        typer.Option(
            metavar="TIME",
            help="Do --preset best, or another one that trains, on as much text as can be trained on in a time such as "
            "10m, 1h or 8h, from the loaded model to the folder. What that comes to is measured and said first.",
        ),
    ] = "",
    epochs: Annotated[float, typer.Option(help="How often the training sees the calibration text.", min=1)] = 1,
    validations: Annotated[
        int, typer.Option(help="How often the training looks at the validation text, to keep its best weights.", min=1)
    ] = VALIDATIONS,
    learning_rate: Annotated[
        float | None,
        typer.Option(help="The highest of the training.", min=0, show_default=f"{LEARNING_RATE}, or the preset's"),
    ] = None,
    autocast: Annotated[bool, typer.Option("--autocast", help="Train with products in bfloat16.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a training that was interrupted: give all else as before.")
    ] = False,
    calibration: Calibration = None,
    temperature: Temperature = None,
    test: Annotated[
        list[str] | None,
        typer.Option("--test", metavar="TEXT", help="Score on this text instead of a part of the calibration text."),
    ] = None,
    pack: Annotated[
        bool,
        typer.Option(
            "--pack",
            help="Pack whole documents into the sequences, each of which sees itself alone, and read no more of the "
            "text than they take. Otherwise all of it is read, and documents are joined.",
        ),
    ] = False,
    criterion: Annotated[
        str,
        typer.Option(
            help="What speaks for giving blocks up: cosine, last_angular, kl, ...; a wrong name lists all.",
            show_default="the preset's; for a window cosine and relative magnitude together, else cosine",
        ),
    ] = "",
    search: Search = "",
    parts: Parts = 2,
    keep: Keep = "",
    profile_file: ProfileFile = None,
    calibration_tokens: Tokens = 41_000,
    fitting_tokens: Annotated[
        int | None,
        typer.Option(
            help="Of these, those that the window is chosen and its stand-in fitted on, where a training goes on with "
            "all of them.",
            min=2,
            show_default="all",
        ),
    ] = None,
    repeated: Annotated[
        float | None,
        typer.Option(
            help="The share of the sequences whose second half repeats the first where blocks are chosen, so that "
            "those are kept which a model needs to copy or to keep to names, what prose hardly asks for.",
            min=0,
            max=1,
            show_default="0, or the preset's",
        ),
    ] = None,
    validation_tokens: Annotated[int, typer.Option(help="Tokens to judge the candidates on.", min=2)] = 4_096,
    test_tokens: Annotated[int, typer.Option(help="Tokens to measure the result on.", min=2)] = 12_288,
    calibration_examples: Examples = 256,
    validation_examples: Annotated[int, typer.Option(help="Images or pairs to judge on.", min=1)] = 64,
    test_examples: Annotated[int, typer.Option(help="Images or pairs to measure the result on.", min=1)] = 256,
    sequence_length: SequenceLength = 512,
    batch_size: BatchSize = 4,
    shortlist: Annotated[int, typer.Option(help="Selections that are fitted and judged by KL.", min=1)] = 8,
    seed: Seed = 0,
    stack: Stack = None,
    task_name: TaskName = "",
    memory: Annotated[
        str,
        typer.Option(
            metavar="SIZE",
            help="Memory that may be taken, such as 2GB. A model in safetensors that does not fit is read from its "
            "folder block by block, with its states in files.",
            show_default="what is free",
        ),
    ] = "",
    dry_run: DryRun = False,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite",
            help="Replace a folder that compress or save wrote, which may be the model's own. The working directory, "
            "and folders with any other file in them, are refused.",
        ),
    ] = False,
) -> None:
    """Remove the blocks whose loss is repaired best, repair them, measure the result, and save the model.

    One pass compares the states before and after every run of blocks. The most similar runs make a shortlist; each is
    replaced by a linear map or another kind, fitted by least squares, and judged by its KL to the original on text of
    its own. The best one is trained, if that is asked for, and saved, with report.json and a page, report.html, beside
    it. A training is kept beside the folder every few minutes, until the folder is written.

    A model in safetensors that is larger than --memory goes the same way with one block in memory at a time, as long as
    nothing is trained; it is first said what that costs. Interrupted, the same command goes on at its block.

    With --budget it plans first: a few real steps, and a few tokens of each other stage, are timed here, and as much
    text is taken as that leaves time for. Where all is late by a tenth of the budget, the training ends with its best
    weights.

    Several processes share the work and come to the same model: torchrun --nproc-per-node=2 --no-python
    streamline-hooks compress ... starts them, or accelerate launch -m streamline_hooks.cli compress ...

    Example: streamline-hooks compress smollm2 --remove 0.25 --output smollm2-small
    """
    from streamline_hooks.calibration import read_documents
    from streamline_hooks.calibration.task_batches import Amounts, task_batches
    from streamline_hooks.checkpoint import require_free
    from streamline_hooks.cli.short_forms import parse_duration, parse_target
    from streamline_hooks.distributed import distributed_step
    from streamline_hooks.pipeline.compress import compress as run
    from streamline_hooks.pipeline.config import DataConfig
    from streamline_hooks.pipeline.iterative import blocks_by_round
    from streamline_hooks.preparation import document_sizes
    from streamline_hooks.stack import find_stack
    from streamline_hooks.statistics import Profile
    from streamline_hooks.trained_selection import training_file

    with launched() as speaks, distributed_step("the command compress") as work:
        say = typer.echo if speaks else _nothing
        require_free(output, overwrite)
        sources = parse_sources(calibration, temperature)
        special = special_option(sources)
        seconds = parse_duration(budget) if budget else 0.0
        if budget:
            _refuse_beside_budget(context, special)
            preset = preset or "best"
        if fitting_tokens is not None and not (objective or preset):
            raise StreamlineError("--fitting-tokens leaves the rest of the text to a training; say what for (--train).")
        recipe = Recipe(
            kind, preset, objective, heal, rounds, epochs, validations, learning_rate, autocast, search,
            criterion, repeated,
        )  # fmt: skip
        task = task_named(task_name, model)
        config = recipe.config(
            remove=parse_target(remove),
            data=DataConfig(sequence_length, calibration_tokens, fitting_tokens, validation_tokens, test_tokens),
            keep=tuple(block_numbers(keep)),
            windows=parts,
            shortlist=shortlist,
            batch_size=batch_size,
            seed=seed,
            task=task,
            stack=stack,
        )
        by = config.search.resolved_criterion
        profile = Profile.load(profile_file) if profile_file is not None else None
        if dry_run and sources.generated:
            raise StreamlineError(f"A dry run writes no text, so that {special} has none; give what is there.")
        if pack and (test or special):
            with_what = "--test" if test else special
            raise StreamlineError(f"--pack deals one text to all parts, and does not go with {with_what}.")
        if not task.is_of_text and (special or pack or memory or budget):
            given = {"--pack": pack, "--memory": memory, "--budget": budget}
            option = special or next(name for name, wanted in given.items() if wanted)
            raise StreamlineError(f"{option} is for models that write, and {model} is for {task}.")
        refuse_unused(context, config.search, task)
        if config.distillation is not None:
            config.distillation.objective.require_task(task)
        if repeated is None and config.data.repeated and (pack or not task.is_of_text):
            where = "packed rows" if pack else f"what a model for {task} is given"
            say(f"repeated   nothing, in {where}, of what --preset {preset} would say twice")
            config = replace(config, data=replace(config.data, repeated=0.0))
        if budget:
            from streamline_hooks.pipeline.plan import check_plannable

            check_plannable(config)
        documents = sources.read() if task.is_of_text and not pack else {}
        test_documents = read_documents(test) if test and task.is_of_text else None
        split = document_sizes(config)

        def text_for(tokenizer: Any) -> tuple[Any, list[str] | None]:
            """What is calibrated on, and the documents for the test where that does not hold them."""
            if pack:
                return sources.packed(tokenizer, split), None
            if (dealt := sources.mixed(documents, tokenizer, split, test_documents)) is not None:
                return dealt, None
            return next(iter(documents.values())), test_documents

        most = takes_more_than(model, memory) if task.is_of_text else None
        whole = {
            "calibration": bool(sources.generated),
            "kind": bool(config.repair.slots or config.repair.fit or not config.repair.is_solved),
            "search": config.search.kind != "window",
            "criterion": by.needs != "profile",
            "remove": "latency" in config.target.unit,
            "train": config.distillation is not None,
            "resume": resume,
            "profile": profile is not None,
            "several-processes": work.processes.count > 1,
            "repeated": bool(config.data.repeated),
        }
        if most is not None and not only_whole(bool(memory), say, **whole):
            made = compress_block_by_block(
                model, text_for, output, most, config, overwrite=overwrite, dry_run=dry_run, say=say
            )
            if made is not None:
                say(f"\n{made.table()}")
                say(write_page(output, made.title, compression=made.report()))
            return
        loaded, tokenizer = load_model(model, task)
        refuse_unused(context, config.search, task, loaded)
        if config.rounds > 1:
            by_round = blocks_by_round(len(find_stack(loaded, stack)), config)
            say(f"rounds     {config.rounds}, of {', '.join(map(str, by_round))} blocks")
            if profile is not None:
                raise StreamlineError(
                    f"--profile goes with one round; each of {config.rounds} makes a profile of its own."
                )
        if sources.generated:
            parts_dealt = ("calibration", "validation", *([] if test else ["test"]))
            tokens = {name: split[f"{name}_tokens"] for name in parts_dealt}
            options: dict[str, Any] = {"sequence_length": sequence_length, "seed": seed, "cache": output.parent}
            for name, write in sources.generators(loaded, tokenizer, tokens, **options).items():
                documents[name] = work.broadcast_object(write)
        text, apart = text_for(tokenizer) if task.is_of_text else ({}, None)
        if not task.is_of_text:
            tokens = {name: split[f"{name}_tokens"] for name in ("calibration", "validation", "test")}
            of = dict(zip(tokens, (calibration_examples, validation_examples, test_examples), strict=True))
            amounts = Amounts(tokens, of, sequence_length, batch_size, seed)
            text = task_batches(loaded, tokenizer, task, calibration, amounts, say, test)
        if budget:
            from streamline_hooks.pipeline.plan import plan_training

            size = given_or_none(context, "batch_size") or 1
            plan = plan_training(
                loaded,
                tokenizer,
                documents["text"],
                seconds,
                replace(config, hardware=replace(config.hardware, batch_size=size)),
                validation_tokens=given_or_none(context, "validation_tokens"),
                test_tokens=given_or_none(context, "test_tokens"),
                test_texts=test_documents,
                output=output,
                say=say,
            )
            say(plan.table())
            say(_options_to_resume(plan.config, preset))
            if dry_run:
                return
            config = plan.config
        if dry_run:
            from streamline_hooks.pipeline.plan import estimate_cost

            if not task.is_of_text:
                say("What this costs is not known beforehand for such a model.")
                return
            options = {"profiled": profile is not None, "test_texts": apart, "output": output, "say": say}
            say(estimate_cost(loaded, tokenizer, text, config, **options).table())
            if config.search.runs_model or by.needs == "model":
                say(f"The {config.search.kind} search by {by.name} runs the model besides; its bars say what it costs.")
            return
        result = run(
            loaded,
            tokenizer,
            text,
            config,
            profile=profile,
            test_texts=apart,
            output=output,
            overwrite=overwrite,
            resume=resume,
            say=say,
        )
        say(f"\n{result.table()}")
        if budget:
            taken = sum(result.seconds.values()) + plan.estimate.stages[0].seconds
            say(f"taken      {taken / 60:.1f} min, {taken / plan.budget:.0%} of the budget")
        say(work.broadcast_object(lambda: write_page(output, result.title, compression=result.report())))
        training = result.training
        interrupted = training is not None and training.interrupted
        if training is not None and interrupted:
            kept = training_file(output).is_file()
            say(
                f"Interrupted: {output} holds the best weights up to then, those of step {training.best_step}. "
                + (
                    "Go on with the same command and --resume --overwrite."
                    if kept
                    else "Nothing is kept to go on from."
                )
            )
    if interrupted:  # not inside, where an exit would be a failure of this process
        raise typer.Exit(130)


_PLANNED = (
    "kind", "objective", "heal", "rounds", "epochs", "validations", "learning_rate", "autocast",
    "criterion", "calibration_tokens", "fitting_tokens", "search", "repeated", "resume", "pack",
    "parts", "profile_file", "memory",
)  # fmt: skip


def _refuse_beside_budget(context: typer.Context, text: str) -> None:
    """Raise if options were given that --budget sets itself or does not support; `text` names one for other texts."""
    flags = {parameter.name: parameter.opts[0] for parameter in context.command.params}
    given = [flags[name] for name in _PLANNED if is_given(context, name)] + [text] * bool(text)
    if given:
        raise StreamlineError(
            f"--budget does not go with {' and '.join(given)}: it plans the recipe of --preset on text that is there, "
            "from the beginning. Leave it out, or give --calibration-tokens instead of --budget."
        )


def _options_to_resume(config: CompressionConfig, preset: str) -> str:
    """Return the line that says which options resume a planned training."""
    data, training, keep = config.data, config.distillation, config.search.keep
    assert training is not None
    options = [
        f"--preset {preset} --epochs {training.epochs:g} --validations {training.validations}",
        f"--batch-size {config.hardware.batch_size}",
        *(
            f"--{part}-tokens {getattr(data, f'{part}_tokens')}"
            for part in ("calibration", "fitting", "validation", "test")
        ),
        *(["--autocast"] if config.hardware.autocast else []),
        *([f"--keep={','.join(map(str, keep))}"] if keep else []),
    ]
    replaced = "--budget and --keep" if keep else "--budget"
    return f"resume     after an interruption, in the place of {replaced}: {' '.join(options)} --resume"


def _nothing(line: str = "") -> None:
    """Say nothing: the first process does."""
