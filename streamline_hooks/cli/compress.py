"""Implement ``streamline-hooks compress``."""

from __future__ import annotations

import sys
from typing import Annotated

from cyclopts import Parameter

from streamline_hooks.checkpoint import LoadingConfig
from streamline_hooks.cli.config_options import (
    OptionValues,
    read_config,
    read_loading,
    set_examples,
    set_flags,
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
            RunOptions(overwrite=overwrite, resume=resume, profile=measured),
            JobLimits(parse_bytes(memory) if memory else None, parse_duration(budget) if budget else None),
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
