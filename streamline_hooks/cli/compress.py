"""Implement ``streamline-hooks compress``."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Annotated

from cyclopts import Parameter

from streamline_hooks.checkpoint import LoadingConfig
from streamline_hooks.cli.config_options import (
    OptionValues,
    read_config,
    read_loading,
    set_examples,
    set_flags,
    stated_fields,
    with_options,
    written_options,
)
from streamline_hooks.cli.options import (
    Calibration,
    ConfigFile,
    DryRun,
    Examples,
    Json,
    Model,
    Output,
    Overwrite,
    Preset,
    PrintConfig,
    ProfileFile,
    Temperature,
    TestExamples,
    ValidationExamples,
)
from streamline_hooks.cli.output import Printer, print_log, write_page
from streamline_hooks.cli.parsing import parse_bytes, parse_duration, parse_sources
from streamline_hooks.core import StreamlineError, distributed_step, process_group
from streamline_hooks.data import read_documents
from streamline_hooks.pipeline import (
    PRESETS,
    CompressionConfig,
    CompressionJob,
    JobData,
    JobLimits,
    RunOptions,
)
from streamline_hooks.statistics import Profile

SHOWN = (
    "--output", "--remove", "--repair", "--loss", "--preset", "--calibration", "--protect", "--device", "--config",
    "--dry-run",
)  # fmt: skip
"""The options in ``--help``."""
Test = Annotated[
    list[str] | None,
    Parameter(
        name="--test", help="Text for measuring the result, instead of a part of the calibration text.", negative=()
    ),
]
GuaranteeText = Annotated[
    list[str] | None,
    Parameter(help="Documents on which --at-most is tested for disagreement and kl: files or folders.", negative=()),
]
GuaranteeTasks = Annotated[
    list[str] | None,
    Parameter(help="Tasks on which --at-most is tested for accuracy_drop, as for evaluate.", negative=()),
]
Pack = Annotated[
    bool,
    Parameter(help="Pack whole documents into sequences, and read only as much text as needed.", negative=()),
]
Memory = Annotated[
    str,
    Parameter(
        help="Memory limit of this machine, such as 2GB. A model in safetensors that does not fit is compressed block "
        "by block, without training. By default the free memory. To limit the size of the result, use --remove "
        "memory:90MB."
    ),
]
Budget = Annotated[
    str, Parameter(help="Time for the whole compression, such as 10m or 8h: train on as much text as fits.")
]
Resume = Annotated[
    bool,
    Parameter(
        help="Resume an interrupted training run from OUTPUT.training, with all other options as before. After Ctrl-C, "
        "which saves the best weights so far, also add --overwrite.",
        negative=(),
    ),
]


@with_options(CompressionConfig, LoadingConfig, shown=SHOWN)
def compress(
    model: Model,
    /,
    *,
    output: Output | None = None,
    preset: Preset = "",
    config: ConfigFile = None,
    print_config: PrintConfig = False,
    calibration: Calibration = None,
    temperature: Temperature = None,
    test: Test = None,
    pack: Pack = False,
    calibration_examples: Examples = None,
    validation_examples: ValidationExamples = None,
    test_examples: TestExamples = None,
    profile: ProfileFile = None,
    guarantee_text: GuaranteeText = None,
    guarantee_tasks: GuaranteeTasks = None,
    budget: Budget = "",
    memory: Memory = "",
    resume: Resume = False,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    option_values: OptionValues,
) -> None:
    """Remove the blocks whose loss is repaired best, repair the model, measure it, and save it.

    Example: streamline-hooks compress smollm2 --remove 0.25 --output smollm2-small

    In a distributed run (torchrun --no-python streamline-hooks compress ...) the processes share the work.
    """
    preset = preset or ("best" if budget and config is None else "")
    settings = read_config(option_values, config, preset)
    if print_config:
        print(settings.to_yaml(), end="")
        return
    if output is None:
        raise StreamlineError("compress: no output was given. Expected an output folder. Add --output FOLDER.")
    print_log(to_stderr=as_json)
    examples = set_examples(calibration_examples, validation_examples, test_examples)
    with process_group() as is_first, distributed_step("the command compress") as work:
        show = Printer(as_json, is_first)
        measured = None if profile is None else Profile.load(profile)
        data = JobData(parse_sources(calibration or ["pydoc"], temperature), test or (), pack, examples)
        job = CompressionJob(
            model,
            settings,
            output,
            data,
            read_loading(option_values),
            RunOptions(
                overwrite=overwrite,
                resume=resume,
                profile=measured,
                guarantee_data=_guarantee_data(settings.at_most, guarantee_text, guarantee_tasks),
            ),
            JobLimits(
                parse_bytes(memory) if memory else None,
                parse_duration(budget) if budget else None,
                stated_fields(config),
            ),
            set_flags(option_values, examples, settings, config),
        )
        job.check(dry_run=dry_run)
        job.prepare(work)
        if job.plan is not None:
            show(job.plan, as_json=as_json and dry_run)
            show.line(_options_to_resume(job, preset))
        if dry_run:
            if job.plan is None:
                show(job.estimate())
            return
        result = job.run()
        show(result)
        show.line(job.time_taken(result))
        show.line(work.broadcast_object(lambda: write_page(output, result.title, compression=result.report())))
        show.line(job.interruption(result))
    if job.interruption(result):  # inside the process group, an exit would count as a failure of this rank
        sys.exit(130)


def _guarantee_data(
    limits: Mapping[str, float] | None, text: list[str] | None, tasks: list[str] | None
) -> dict[str, list[str]]:
    """Return the documents or tasks of each limit."""
    needed = {"--guarantee-tasks" if name == "accuracy_drop" else "--guarantee-text" for name in limits or ()}
    sources = {"--guarantee-text": text, "--guarantee-tasks": tasks}
    written = {flag for flag, values in sources.items() if values}
    if missing := needed - written:
        raise StreamlineError(
            f"compress: --at-most was given for {', '.join(limits or ())} without {' and '.join(sorted(missing))}. "
            "Expected documents for kl and disagreement, and tasks for accuracy_drop, that were not used before. Add "
            "them."
        )
    if unused := written - needed:
        raise StreamlineError(
            f"compress: {' and '.join(sorted(unused))} was given without a limit that it is for. Expected --at-most, "
            "such as disagreement:0.1 with text or accuracy_drop:0.02 with tasks. Add it, or leave the option out."
        )
    documents = read_documents(text) if text else []
    return {name: (tasks or []) if name == "accuracy_drop" else documents for name in limits or ()}


def _options_to_resume(job: CompressionJob, preset: str) -> str:
    """Return a line with the options that resume a planned training run."""
    base = PRESETS[preset].config if preset else CompressionConfig()
    planned = [
        option
        for option in written_options(job.config, base)
        if option.partition("=")[0] not in ("--train-until", "--task", *job.flags.values()) or "protect" in option
    ]
    replaced = "--budget and --protect" if job.flags.get("search.protect") == "--protect" else "--budget"
    recipe = [f"--preset {preset}"] if preset else []
    return f"resume     after an interruption, replace {replaced} by: {' '.join([*recipe, *planned])} --resume"
