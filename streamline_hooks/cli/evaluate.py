"""Implement ``streamline-hooks evaluate``."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from streamline_hooks.checkpoint import REPORT, LoadingConfig, load_quietly, task_of_pretrained, update_checksums
from streamline_hooks.cli.config_options import OptionValues, read_loading, with_options
from streamline_hooks.cli.options import Json, Model
from streamline_hooks.cli.output import Printer, print_log, write_page
from streamline_hooks.cli.parsing import parse_problems
from streamline_hooks.core import StreamlineError, check_writable, get_logger, read_json, write_json
from streamline_hooks.evaluation import Suite, require_same_inputs
from streamline_hooks.evaluation import evaluate as run
from streamline_hooks.pipeline import suite_for_model

logger = get_logger(__name__)
Against = Annotated[str, Parameter(help="The original model, for relative results.")]
Text = Annotated[
    list[str] | None,
    Parameter(help="Text for perplexity and agreement: a file, folder, data set or pydoc; or images or pairs."),
]
Tasks = Annotated[
    list[str] | None,
    Parameter(
        help="A task of lm-eval, a task file (YAML) or folder, or questions (JSONL or hub:NAME:SPLIT). May be repeated."
    ),
]
Problems = Annotated[
    list[str] | None,
    Parameter(
        help="Problems to solve by generation: a JSONL file of questions and answers, or probes:N for N synthetic "
        "problems of each type (50 by default). May be repeated."
    ),
]
Speed = Annotated[bool, Parameter(help="Measure the speed of both models in turn.")]
EvaluationOutput = Annotated[
    Path | None,
    Parameter(name=["--output", "-o"], help="Folder for evaluation.json, the report page and cached results."),
]
SCALARS = (
    "text_tokens", "metric", "shots", "items", "problem_tokens", "samples", "temperature", "prompts", "window",
    "stride", "add_bos", "batch_size", "seed", "task",
)  # fmt: skip
SHOWN = (
    "--against",
    "--text",
    "--tasks",
    "--problems",
    "--shots",
    "--items",
    "--speed",
    "--output",
    "--device",
    "--json",
)


@with_options(Suite, LoadingConfig, only=SCALARS, shown=SHOWN, defaults={"text_tokens": 20_000, "prompts": 8})
def evaluate(
    model: Model,
    /,
    *,
    against: Against = "",
    text: Text = None,
    tasks: Tasks = None,
    problems: Problems = None,
    speed: Speed = True,
    output: EvaluationOutput = None,
    as_json: Json = False,
    option_values: OptionValues,
) -> None:
    """Measure perplexity, tasks, problems, generation and speed of a model, also relative to its original.

    With --output, a report page is written and results are cached: the same command resumes after an interruption.

    Example: streamline-hooks evaluate smollm2-small --against smollm2 --tasks piqa --problems probes -o evaluation
    """
    print_log(to_stderr=as_json)
    files, probes = parse_problems(problems or ())
    settings = {path: value for path, value in option_values.items() if path in SCALARS}
    loading = read_loading(option_values)
    if output is not None:
        check_writable(output / "evaluation.json")
    report_file = Path(model) / REPORT
    compression = _report_of(report_file) if output is not None and report_file.is_file() else None
    task = settings.pop("task", None) or task_of_pretrained(model, loading)
    if not task.is_causal_lm and (tasks or problems):
        raise StreamlineError(
            f"--tasks and --problems need a model that generates text, but {model} is for {task}. Expected --text with "
            "images, pairs or text. Leave --tasks and --problems out."
        )
    suite = Suite(
        text=text or ([] if tasks or files or probes else ["pydoc"]),
        tasks=tasks or (),
        problems=files,
        probes=probes,
        timed=Suite.timed if speed and task.is_causal_lm else None,
        **settings,
    )
    _warn_of_known_text(report_file, list(suite.text))
    loaded, tokenizer = load_quietly(model, task, loading)
    original, original_tokenizer = load_quietly(against, task, loading) if against else (None, tokenizer)
    require_same_inputs(tokenizer, original_tokenizer)
    suite = suite_for_model(model, loaded, tokenizer, suite, task, loading)
    names = _names(model, against)
    result = run(
        loaded,
        tokenizer,
        suite,
        original,
        cache_file=None if output is None else output / "measured.json",
        name=names[0],
        reference_name=names[1],
    )
    show = Printer(as_json)
    show(result)
    if output is not None:
        write_json(output / "evaluation.json", result.report())
        update_checksums(output)
        show.line(write_page(output, f"{names[0]}, evaluated", compression=compression, evaluation=result.report()))


def _warn_of_known_text(report_file: Path, sources: Sequence[str]) -> None:
    """Warn if text was also a source of the compression, which used a part of it."""
    compression: dict[str, Any] = {}
    with suppress(StreamlineError):  # a damaged report does not matter here
        compression = read_json(report_file) if report_file.is_file() else {}
    record = (compression.get("data") or {}).get("source") or {}
    entries = [record, *(record.get("mixture") or ())]
    known = {_source_name(source) for entry in entries for source in entry.get("sources") or ()}
    if shared := [source for source in sources if _source_name(source) in known]:
        logger.warning(
            f"{', '.join(shared)} was also the text of the compression, so a part of the measured text may have been "
            "used to choose and repair blocks, and the perplexity may be too low. Expected other text for an unbiased "
            "result. Give it by --text."
        )


def _source_name(source: str) -> str:
    """Return the absolute path of a file or folder, and the name of other sources."""
    path = Path(source).expanduser()
    return str(path.resolve()) if path.exists() else source


def _report_of(file: Path) -> dict[str, Any]:
    """Read the report of the compression, which the page includes."""
    try:
        return read_json(file)
    except StreamlineError as error:
        raise StreamlineError(f"{error} Or delete {file} to write a page without the compression.") from error


def _names(model: str, against: str) -> tuple[str, str]:
    """Return the names of both models: the last part of their paths, or the paths if these are equal."""
    if not against:
        return Path(model).resolve().name, "original"
    short = Path(model).resolve().name, Path(against).resolve().name
    return short if short[0] != short[1] else (model, against)
