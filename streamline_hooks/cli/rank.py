"""Implement ``streamline-hooks rank``."""

from __future__ import annotations

from pathlib import Path
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
)
from streamline_hooks.cli.options import Calibration, ConfigFile, DryRun, Examples, Json, ProfileFile, Temperature
from streamline_hooks.cli.output import Printer, print_log
from streamline_hooks.cli.parsing import parse_sources
from streamline_hooks.data import PARTS
from streamline_hooks.pipeline import CompressionConfig, JobData, RankingJob
from streamline_hooks.statistics import Profile

RankedModel = Annotated[
    str | None,
    Parameter(help="Folder, hub id or smollm2. Not needed with --profile, unless the search runs the model."),
]
Save = Annotated[Path | None, Parameter(help="File to save the profile to, for --profile.")]
Top = Annotated[
    int | None,
    Parameter(help="Number of windows, per length without --remove. By default the shortlist of the config, else 3."),
]
FIELDS = (
    "remove", "search", "search.criterion", "search.protect", "data.calibration_tokens", "data.sequence_length",
    "hardware.batch_size", "seed", "task", "stack",
)  # fmt: skip
SHOWN = (
    "--remove", "--search", "--criterion", "--protect", "--top", "--save", "--profile", "--calibration", "--device",
    "--json",
)  # fmt: skip


@with_options(CompressionConfig, LoadingConfig, only=FIELDS, shown=SHOWN, optional=["remove"])
def rank(
    model: RankedModel = None,
    /,
    *,
    config: ConfigFile = None,
    profile: ProfileFile = None,
    save: Save = None,
    calibration: Calibration = None,
    temperature: Temperature = None,
    calibration_examples: Examples = None,
    top: Top = None,
    dry_run: DryRun = False,
    as_json: Json = False,
    option_values: OptionValues,
) -> None:
    """Print the best windows of every length, or the selections of a search for a target.

    With a config, the selections and their calibration text are those of compress with this config.

    Example: streamline-hooks rank smollm2 --save smollm2.profile
    """
    print_log(to_stderr=True)
    if config is None:
        option_values.setdefault("search.criterion", "cosine")
    settings = read_config(option_values, config)
    rows = (3 if config is None else settings.search.shortlist) if top is None else top
    settings = settings.updated({"search.shortlist": min(rows, settings.search.most_selections or rows)})
    examples = set_examples(calibration_examples, None, None)
    sources, parts = parse_sources(calibration or ["pydoc"], temperature), PARTS if config else PARTS[:1]
    job = RankingJob(
        model,
        settings,
        settings.target if config is not None or "remove" in option_values else None,
        JobData(sources, examples=examples, parts=parts),
        read_loading(option_values),
        None if profile is None else Profile.load(profile),
        save,
        set_flags(option_values, examples, settings, config),
    )
    job.check(dry_run=dry_run)
    job.prepare()
    Printer(as_json)(job.estimate() if dry_run else job.run())
