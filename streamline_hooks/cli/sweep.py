"""Implement ``streamline-hooks sweep``."""

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
from streamline_hooks.cli.options import (
    Calibration,
    ConfigFile,
    Examples,
    Json,
    Model,
    Output,
    Preset,
    PrintConfig,
    TestExamples,
    ValidationExamples,
)
from streamline_hooks.cli.output import Printer, print_log, write_page
from streamline_hooks.cli.parsing import parse_replacement, parse_sources, parse_target
from streamline_hooks.core import StreamlineError, atomic_file, check_writable, write_json
from streamline_hooks.pipeline import CompressionConfig, CompressionJob, JobData, SpeedConfig
from streamline_hooks.pipeline import sweep as run
from streamline_hooks.repair import ReplacementConfig

AMOUNTS, KINDS = "0.1,0.2,0.3", "none,linear"
"""Defaults without a config and a preset."""
Remove = Annotated[
    str | None,
    Parameter(
        help=f"Targets, separated by commas, each as in compress. By default the target of the config or preset, else "
        f"{AMOUNTS}."
    ),
]
Repair = Annotated[
    str | None,
    Parameter(
        help="Replacements, separated by commas, or by semicolons if they have options. By default the replacement of "
        f"the config or preset, else {KINDS}."
    ),
]
Speed = Annotated[
    bool | None,
    Parameter(help="Measure the speed of the original and the compressed model in turn. By default as in the config."),
]
SpeedTokens = Annotated[int, Parameter(help="Tokens of the timed prompt.")]
Repeats = Annotated[int, Parameter(help="Number of timed rounds.")]
WITHOUT = (
    "remove", "repair", "repair.seed", "evaluation.speed", "evaluation.generation", "train_until", "at_most", "delta",
)  # fmt: skip
SHOWN = ("--output", "--remove", "--repair", "--loss", "--search", "--protect", "--calibration", "--device", "--config")


@with_options(CompressionConfig, LoadingConfig, without=WITHOUT, shown=SHOWN)
def sweep(
    model: Model,
    /,
    *,
    output: Output,
    remove: Remove = None,
    repair: Repair = None,
    preset: Preset = "",
    config: ConfigFile = None,
    print_config: PrintConfig = False,
    calibration: Calibration = None,
    calibration_examples: Examples = None,
    validation_examples: ValidationExamples = None,
    test_examples: TestExamples = None,
    speed: Speed = None,
    speed_tokens: SpeedTokens = 512,
    repeats: Repeats = 7,
    as_json: Json = False,
    option_values: OptionValues,
) -> None:
    """Compress a model in many ways, and compare quality, size and speed.

    Every point is cached in the output folder: the same command resumes after an interruption, and with more targets or
    replacements computes only the new points.

    Example: streamline-hooks sweep smollm2 --remove 0.1,0.2,0.3 --repair linear,swiglu --output sweep
    """
    print_log(to_stderr=as_json)
    if config is None and not preset:
        remove, repair = AMOUNTS if remove is None else remove, KINDS if repair is None else repair
    targets = None if remove is None else [parse_target(part) for part in remove.split(",") if part.strip()]
    kinds = None if repair is None else _parse_kinds(repair)
    settings = read_config({**option_values, **({"remove": targets[0]} if targets else {})}, config, preset)
    if print_config:
        print(settings.to_yaml(), end="")
        return
    check_writable(output / "sweep.json")
    sources = parse_sources(calibration or ["pydoc"])
    if sources.generated:
        raise StreamlineError(
            f"{sources.special} was given to a sweep, which generates no text. Expected existing text. Let compress "
            "generate the text once, and pass its file."
        )
    examples = set_examples(calibration_examples, validation_examples, test_examples)
    flags = set_flags(option_values, examples, settings, config)
    data = JobData(sources, examples=examples)
    job = CompressionJob(model, settings, output, data, read_loading(option_values), flags=flags)
    loaded, tokenizer, parts = job.load()
    timed = settings.evaluation.speed if speed is None else speed
    result = run(
        loaded,
        parts,
        job.config,
        tokenizer=tokenizer,
        remove=[settings.target] if targets is None else targets,
        repair=[settings.repair] if kinds is None else kinds,
        speed=SpeedConfig(speed_tokens, repeats) if timed else None,
        cache_file=output / "measured.json",
    )
    show = Printer(as_json)
    show(result)
    with atomic_file(output / "sweep.csv") as new:
        new.write_text(result.csv(), encoding="utf-8")
    write_json(output / "sweep.json", result.report())
    show.line(write_page(output, f"{Path(model).resolve().name}, swept", sweep=result.report()))


def _parse_kinds(text: str) -> list[ReplacementConfig]:
    """Parse several replacements, separated by semicolons if there are any, else by commas."""
    return [parse_replacement(part) for part in text.split(";" if ";" in text else ",") if part.strip()]
