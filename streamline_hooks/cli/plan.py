"""Implement ``streamline-hooks plan``."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from streamline_hooks.checkpoint import LoadingConfig
from streamline_hooks.cli.config_options import (
    OptionValues,
    config_options,
    read_config,
    read_loading,
    set_examples,
    set_flags,
    stated_fields,
    with_options,
)
from streamline_hooks.cli.options import (
    Calibration,
    ConfigFile,
    Examples,
    Json,
    Preset,
    TestExamples,
    ValidationExamples,
)
from streamline_hooks.cli.output import Printer, print_log
from streamline_hooks.cli.parsing import parse_duration, parse_sources
from streamline_hooks.core import StreamlineError
from streamline_hooks.pipeline import (
    CompressionConfig,
    CompressionJob,
    DeviceRates,
    JobData,
    JobLimits,
    ModelShape,
    estimate_from_shape,
)

PlannedModel = Annotated[str | None, Parameter(help="Model to time on this machine. Without a model, use a shape.")]
Budget = Annotated[str, Parameter(help="Time for the whole compression, such as 10m or 8h: plan how much text fits.")]
SHOWN = (
    "--remove", "--repair", "--loss", "--preset", "--config", "--budget", "--architecture", "--hidden-size", "--layers",
    "--flops", "--bandwidth", "--calibration-tokens", "--json",
)  # fmt: skip


@with_options(CompressionConfig, LoadingConfig, ModelShape, DeviceRates, without=("at_most", "delta"), shown=SHOWN)
def plan(
    model: PlannedModel = None,
    /,
    *,
    preset: Preset = "",
    config: ConfigFile = None,
    calibration: Calibration = None,
    calibration_examples: Examples = None,
    validation_examples: ValidationExamples = None,
    test_examples: TestExamples = None,
    budget: Budget = "",
    as_json: Json = False,
    option_values: OptionValues,
) -> None:
    """Estimate the time and memory of a compression, on this machine or from a shape and rates.

    With MODEL, a part of each stage is timed on this machine, as in compress --dry-run. Without it, the cost follows
    from the shape of a model and the rates of a device.

    Example: streamline-hooks plan --hidden-size 4096 --layers 32 --flops 1e14 --bandwidth 2e12
    """
    print_log(to_stderr=as_json)
    settings = read_config(option_values, config, preset or ("best" if budget and config is None else ""))
    show = Printer(as_json)
    shape, rates = (
        {
            option.path: option_values[option.path]
            for option in config_options(config_type)
            if option.path in option_values
        }
        for config_type in (ModelShape, DeviceRates)
    )
    examples = set_examples(calibration_examples, validation_examples, test_examples)
    if model is None:
        if budget or calibration or examples:
            option = "--budget" if budget else "--calibration" if calibration else f"--{next(iter(examples))}-examples"
            raise StreamlineError(
                f"{option} was given without a model. Expected a model to time on this machine. Add MODEL, or leave "
                f"{option} out."
            )
        if unused := [option.flag for option in config_options(LoadingConfig) if option.path in option_values]:
            raise StreamlineError(
                f"{' and '.join(unused)} has no effect without a model. Expected a model to load. Add MODEL, or leave "
                "the option out."
            )
        if "architecture" not in shape and not {"hidden_size", "layers"} <= shape.keys():
            raise StreamlineError(
                "plan was given without a model and without its shape. Expected a model to time on this machine, or "
                "--architecture with a folder or a name on the hub (only config.json is read), or --hidden-size and "
                "--layers. Add one of them."
            )
        show(estimate_from_shape(ModelShape().updated(shape), DeviceRates().updated(rates), settings))
        return
    if unused := [
        option.flag
        for config_type in (ModelShape, DeviceRates)
        for option in config_options(config_type)
        if option.path in option_values
    ]:
        raise StreamlineError(
            f"{' and '.join(unused)} has no effect with a model. Expected a model or a shape. Leave one of them out."
        )
    data = JobData(parse_sources(calibration or ["pydoc"]), examples=examples)
    with tempfile.TemporaryDirectory() as folder:  # for measuring the write rate only
        job = CompressionJob(
            model,
            settings,
            Path(folder) / "output",
            data,
            read_loading(option_values),
            limits=JobLimits(seconds=parse_duration(budget) if budget else None, stated=stated_fields(config)),
            flags=set_flags(option_values, examples, settings, config),
        )
        job.check(dry_run=True)
        job.prepare()
        show(job.plan or job.estimate())
