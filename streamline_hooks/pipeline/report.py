"""Write the HTML report of a compression, evaluation or sweep."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from streamline_hooks.checkpoint import STAGE_LABELS, update_checksums
from streamline_hooks.core import StreamlineError, atomic_file
from streamline_hooks.evaluation import MEASURES
from streamline_hooks.pipeline import plots
from streamline_hooks.pipeline.plots import Plot, PlotRow
from streamline_hooks.pipeline.report_formatting import (
    DASH,
    MINUS,
    SPACE,
    blocks_text,
    branches_of_report,
    change,
    count,
    finite,
    interval,
    millions,
    number,
    percent,
    ratio,
    removed_windows,
    times,
)
from streamline_hooks.selection import TargetOutcome

PAGE = "report.html"
_FOOTER = "<footer>Made by streamline_hooks.</footer>"  # identifies pages of this library
_UNWRITABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")


def write_report(
    folder: Path,
    *,
    compression: Mapping[str, Any] | None = None,
    evaluation: Mapping[str, Any] | None = None,
    sweep: Mapping[str, Any] | None = None,
    command: str,
    title: str,
) -> Path:
    """Write a self-contained HTML page, ``report.html``, and return its path.

    The page loads no other file and runs no script. It adapts to the light or dark scheme and to the width of the
    window. Missing values are left out. Equal reports give equal bytes.

    Parameters
    ----------
    folder : Path
        The folder of the page, which is created if it does not exist.
    compression : mapping, optional
        The output of `CompressionResult.report`, or the content of a ``report.json``.
    evaluation : mapping, optional
        The output of `Evaluation.report`, or the content of an ``evaluation.json``.
    sweep : mapping, optional
        The output of `Sweep.report`.
    command : str
        The command that repeats the run, which the page shows.
    title : str
        The title of the page.

    Returns
    -------
    Path

    Raises
    ------
    StreamlineError
        If all reports are empty, jinja2 or matplotlib is not installed, the folder has a ``report.html`` that this
        library did not write, or the file cannot be written. An existing page is kept in these cases.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> report = {"perplexity": {"original": 10.0, "removed": 40.0, "repaired": 15.0}}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     page = write_report(Path(folder), compression=report, command="streamline-hooks ...", title="A model")
    ...     page.name, "Perplexity by step" in page.read_text()
    ('report.html', True)
    """
    try:
        import jinja2
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise StreamlineError(
            f"The report needs {error.name}, which is not installed. Expected jinja2 and matplotlib. Run "
            '`pip install "streamline_hooks[report]"`.'
        ) from error
    from streamline_hooks.pipeline.plots import WIDTHS

    if not (compression or evaluation or sweep):
        raise StreamlineError(
            "compression, evaluation and sweep are all empty. Expected at least one report. Pass the content of a "
            "report.json, for example."
        )
    compression, evaluation, sweep = compression or {}, evaluation or {}, sweep or {}
    page = Path(folder) / PAGE
    if page.is_file() and _FOOTER not in page.read_text(encoding="utf-8", errors="replace"):
        raise StreamlineError(
            f"{page} was not written by this library and is not replaced. Move the file, or choose another folder."
        )
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True,
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    text = environment.get_template("report.html.jinja").render(
        title=title, model=evaluation.get("model"), reference=evaluation.get("reference"),
        key_numbers=key_numbers(compression, evaluation), sections=sections(compression, evaluation, sweep, command),
        widths=WIDTHS, footer=_FOOTER,
    )  # fmt: skip
    with atomic_file(page) as file:
        file.write_text(_UNWRITABLE.sub("\ufffd", text), encoding="utf-8")
    update_checksums(page.parent)  # of a saved model, they list every file
    return page


Report = Mapping[str, Any]
Part = dict[str, Any]
PHASE_LABELS = {"prefill": "first token", "decode": "further token"}


def sections(compression: Report, evaluation: Report, sweep: Report, command: str) -> list[Part]:
    """Return ``id``, ``title`` and ``parts`` of each non-empty section.

    A part is a dict with one of the keys ``text``, ``plot``, ``table``, ``sample`` and ``command``.
    """
    evaluation = _add_measurements(compression, evaluation)
    depth = [*_parts(plots.similarity(compression)), *_parts(plots.influence(compression))]
    contents = {
        "choice": (
            "What was removed",
            [*_summary(compression), *_bounded(compression), *depth, *_candidates(compression)],
        ),
        "warnings": ("Warnings", [{"text": str(text)} for text in compression.get("warnings") or ()]),
        "training": ("Training", _training(compression)),
        "scores": ("Scores", _scores(compression)),
        "perplexity": ("Perplexity", [*_steps(compression), *_perplexity(evaluation)]),
        "tasks": ("Tasks", _tasks(evaluation)),
        "agreement": ("Agreement", _agreement(evaluation)),
        "generations": ("Generations", _generations(evaluation)),
        "size": ("Size and speed", [*_target(compression), *_size(compression, evaluation), *_speed(evaluation)]),
        "sweep": ("Trade-off", _sweep(sweep)),
        "made": ("How it was made", _provenance(compression, evaluation, command)),
    }
    return [{"id": name, "title": title, "parts": parts} for name, (title, parts) in contents.items() if parts]


def key_numbers(compression: Report, evaluation: Report) -> list[tuple[str, str, str]]:
    """Return name, value and detail of each key number at the top of the page that is known."""
    evaluation, numbers = _add_measurements(compression, evaluation), []
    plan, windows = compression.get("plan") or {}, removed_windows(compression)
    if plan.get("slots"):
        detail = f"removed: {blocks_text(windows)}" if windows else ""
        numbers.append(("Blocks", f"{plan['old_length']} → {len(plan['slots'])}", detail))
    before, after = _sizes(compression, evaluation).get("parameters", (None, None))
    if finite(after) is not None:
        known = finite(before) is not None
        detail = f"{change(before, after)}, from {millions(before)} M" if known else ""
        numbers.append(("Parameters", f"{millions(after)} M", detail))
    if (perplexity := _key_perplexity(compression, evaluation)) is not None:
        numbers.append(perplexity)
    for name, retained in (evaluation.get("retained") or {}).items():
        above = bool(retained.get("above_chance"))
        share = retained.get("above_chance" if above else "ratio") or {}
        if finite(share.get("value")) is not None:
            value, _, bounds = interval(share, 0).partition(" ")
            of = "of the accuracy" + " above chance" * above
            numbers.append((f"Relative accuracy, {name}", f"{value}{SPACE}%", f"{of} {bounds}".strip()))
    ratios = list(((evaluation.get("speed") or {}).get("ratios") or {}).values())
    for phase, phase_label in PHASE_LABELS.items():
        if len(ratios) > 1 and finite(factor := (ratios[1].get(phase) or {}).get("median")) is not None:
            numbers.append((f"Time, {phase_label}", times(factor), "of the original's"))
    return numbers


def _add_measurements(compression: Report, evaluation: Report) -> Report:
    """Add the generations and speeds of the compression to an evaluation without them."""
    return {name: compression[name] for name in ("samples", "speed") if compression.get(name)} | dict(evaluation)


def _key_perplexity(compression: Report, evaluation: Report) -> tuple[str, str, str] | None:
    own, reference = _model_and_original(evaluation, "perplexity")
    ratios = [ratio(result.get("value"), (reference.get(name) or {}).get("value")) for name, result in own.items()]
    known = [factor for factor in ratios if factor is not None]
    if known:
        return "Perplexity", times(statistics.fmean(known)), f"of the original's, mean of domains ({len(known)})"
    steps = compression.get("perplexity") or {}
    last = next((steps[key] for key in ("trained", "repaired", "removed") if key in steps), None)
    factor = ratio(last, steps.get("original"))
    return None if factor is None else ("Perplexity", times(factor), f"{number(steps['original'])} → {number(last)}")


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], **options: Any) -> Part:
    """Return a table; options are ``text`` (left-aligned columns), ``note`` and ``strong`` (the highlighted row)."""
    aligned = [(name, k == 0 or name in options.get("text", ())) for k, name in enumerate(columns)]
    return {"table": title, "note": None, "strong": None, **options, "columns": aligned, "rows": rows}


def _parts(plot: Plot | None, *tables: Part) -> list[Part]:
    return [*([] if plot is None else [{"plot": plot}]), *(table for table in tables if table["rows"])]


def _model_and_original(evaluation: Report, name: str) -> tuple[Report, Report]:
    return evaluation.get(name) or {}, (evaluation.get("original") or {}).get(name) or {}


def _measure(compression: Report) -> str:
    return str(compression.get("measure") or "KL (nats per token)")


def _summary(compression: Report) -> list[Part]:
    plan = compression.get("plan") or {}
    if not plan.get("slots"):
        return []
    windows, zeroed = removed_windows(compression), branches_of_report(compression)
    parts = [f"{plan['old_length']} blocks became {len(plan['slots'])}."]
    if windows:
        parts.append(f"Removed: {blocks_text(windows)} (in the original's numbering, from 0).")
    if rounds := compression.get("rounds"):
        blocks_per_round = ", then ".join(" ".join(map(str, round_report["removed"])) for round_report in rounds)
        parts.append(
            f"In {len(rounds)} rounds: {blocks_per_round}. The figures by depth are those of the original. The "
            "candidates and the training run are those of the last round, with the block numbers at its start."
        )
    if zeroed:
        parts.append(f"Zeroed: {blocks_text((), zeroed)}.")
    size = (compression.get("stand_in") or {}).get("parameters")
    if compression.get("kind"):
        parts.append(f"Repair: {compression['kind']}{f', {count(size)} parameters each' if finite(size) else ''}.")
    if compression.get("search"):
        parts.append(f"Found by {compression['search']}, {compression.get('criterion', DASH)}.")
    return [{"text": " ".join(parts)}]


def _candidates(compression: Report) -> list[Part]:
    """Return the table of all candidates; for several windows it shows the largest error."""
    candidates, rows = compression.get("candidates") or (), []
    refused = any(candidate.get("refused") for candidate in candidates)
    for k, candidate in enumerate(candidates):
        repairs = [*(candidate.get("repairs") or ()), *(candidate.get("maps") or ())]
        worst = [
            max((v for repair in repairs if (v := finite(repair.get(name))) is not None), default=None)
            for name in ("removal_error", "repaired_error", "ridge")
        ]
        name = blocks_text(candidate.get("windows") or (), candidate.get("silenced") or ()) + (
            ", chosen" if k == 0 else ""
        )
        numbers = [number(value, 4) for value in (candidate.get("score"), *worst, candidate.get("distance"))]
        rows.append([name, *numbers, *([candidate.get("refused") or ""] if refused else [])])
    reason_column = "reason for refusal"
    columns = ["blocks", "score of the search", "relative error, removed", "relative error, repaired", "ridge"]
    columns += [_measure(compression), *([reason_column] if refused else [])]
    return _parts(None, _table("Candidates", columns, rows, strong=0, text=[reason_column]))


def _training(compression: Report) -> list[Part]:
    run, measure = compression.get("training"), _measure(compression)
    if not run:
        return []
    values = {
        "steps": count(run.get("steps")),
        f"{run.get('unit', 'token')}s": count(run.get("tokens")),
        "best step": count(run.get("best_step")),
        f"{measure}, before": number(run.get("distance_before"), 4),
        f"{measure}, after": number(run.get("distance"), 4),
        "time (s)": number(run.get("seconds"), 1),
        **({"ended early": str(run["stopped"])} if run.get("stopped") else {}),
    }
    return _parts(plots.training(compression, measure), _table("Training run", ["", ""], list(values.items())))


def _scores(compression: Report) -> list[Part]:
    """Return the table of scores of a model that is not a causal language model."""
    scores = compression.get("scores") or {}
    measures = {name: words for name, words in MEASURES.items() if any(name in values for values in scores.values())}
    rows = [
        [name, *(number(scores[key].get(m), 4) for m in measures)]
        for key, name in STAGE_LABELS.items()
        if key in scores
    ]
    return _parts(None, _table("Scores by step", ["step", *measures.values()], rows))


def _steps(compression: Report) -> list[Part]:
    values = compression.get("perplexity") or {}
    rows = [
        [name, number(values[key]), number(ratio(values[key], values.get("original")))]
        for key, name in STAGE_LABELS.items()
        if key in values
    ]
    return _parts(None, _table("Perplexity by step", ["step", "perplexity", f"×{SPACE}original"], rows))


def _perplexity(evaluation: Report) -> list[Part]:
    own, reference = _model_and_original(evaluation, "perplexity")
    rows, marks = [], []
    for name, result in own.items():
        original, value = reference.get(name) or {}, result.get("value")
        compared = [number(original.get("value")), number(ratio(value, original.get("value")))] if reference else []
        rows.append(
            [name, count(result.get("tokens")), number(result.get("bits_per_byte"), 3), number(value), *compared]
        )
        marks.append(PlotRow(name, _mark(original), _mark(result)))
    columns = ["domain", "tokens", "bits/byte", "this model", *["original", f"×{SPACE}original"] * bool(reference)]
    caption = "Lower is better."
    plot = plots.row_plot("perplexity", "Perplexity by domain", marks, "perplexity", caption)
    return _parts(plot, _table("Perplexity by domain", columns, rows))


def _mark(value: Report | None) -> tuple[float, float | None, float | None] | None:
    """Return a value for a figure, with a standard error to either side if there is one."""
    known, error = (finite((value or {}).get(name)) for name in ("value", "standard_error"))
    if known is None:
        return None
    return (known, None, None) if error is None else (known, known - error, known + error)


def _tasks(evaluation: Report) -> list[Part]:
    values, rows, marks = _task_values(evaluation), [], []
    compared = any(before for _, before in values.values())
    for (task, metric), (own, before) in values.items():
        about = [f"{own['few_shot']}-shot"] if own.get("few_shot") is not None else []
        about += [f"version {own['version']}"] if own.get("version") is not None else []
        scores = [*([_with_error(before)] if compared else []), _with_error(own)]
        words = ", ".join([metric, *about])
        rows.append([task, words, count(own.get("items")), number(own.get("chance"), 4), *scores])
        mark = _mark(own)
        if mark is not None and 0 <= mark[0] <= 1:  # excludes perplexities and lengths
            name = task if sum(t == task for t, _ in values) == 1 else f"{task}, {metric}"
            marks.append(PlotRow(name, _mark(before), mark, finite(own.get("chance"))))
    columns = ["task", "metric", "items", "chance", *["original"] * compared, "this model"]
    title = "Tasks, ± one standard error"
    plot = plots.row_plot("tasks", "Tasks", marks, "score", "Higher is better. Whiskers are one standard error.")
    return [*_parts(plot, _table(title, columns, rows, text=["metric"])), *_relative(evaluation)]


def _task_values(evaluation: Report) -> dict[tuple[str, str], tuple[Report, Report]]:
    """Return the values of the model and of the original, by task and metric."""
    own, reference = _model_and_original(evaluation, "accuracy")
    values = {
        (task, str(result.get("metric") or "accuracy")): (result, reference.get(task) or {})
        for task, result in own.items()
    }
    tasks, reference = _model_and_original(evaluation, "tasks")
    for task, entry in tasks.items():
        about = {name: entry.get(name) for name in ("items", "few_shot", "version")}
        originals = (reference.get(task) or {}).get("metrics") or {}
        for metric, value in (entry.get("metrics") or {}).items():
            known, before = values.get((task, metric), ({}, {}))
            values[task, metric] = ({**about, **value, **known}, before or originals.get(metric) or {})
    return values


def _with_error(value: Report) -> str:
    error = finite(value.get("standard_error"))
    return number(value.get("value"), 4) + ("" if error is None else f" ± {number(error, 4)}")


def _relative(evaluation: Report) -> list[Part]:
    """Return the table of accuracies relative to the original, by group of tasks."""
    rows, left_out = [], []
    for name, retained in (evaluation.get("retained") or {}).items():
        shares = [interval(retained.get(key)) for key in ("ratio", "above_chance")]
        if shares != [DASH, DASH]:
            rows.append([name, *shares])
            left_out += [f"{task}, {reason}" for task, reason in (retained.get("left_out") or {}).items()]
    note = f"Left out above chance: {'; '.join(left_out)}." if left_out else ""
    columns = ["tasks", "of the accuracy (%)", "of the accuracy above chance (%)"]
    return _parts(None, _table("Relative accuracy, with its interval", columns, rows, note=note))


def _agreement(evaluation: Report) -> list[Part]:
    agreement = evaluation.get("agreement") or {}
    unit = agreement.get("unit") or "token"
    rows = [[f"KL, mean (nats per {unit})", number(agreement["kl"], 4)]] if "kl" in agreement else []
    for quantile, value in (agreement.get("quantiles") or {}).items():
        rows.append([f"KL, {100 * float(quantile):g} % quantile (nats)", number(value, 4)])
    for name, value in (agreement.get("kl_by_domain") or {}).items():
        rows.append([f"KL, {name} (nats per {unit})", number(value, 4)])
    if "top1" in agreement:
        most_likely = "token" if agreement.get("unit") in (None, "token") else "class"
        rows.append([f"same most likely {most_likely} (%)", percent(agreement["top1"])])
    for name, result in (evaluation.get("similarity") or {}).items():
        rows.append([f"embeddings, mean cosine, {name}", number(result.get("cosine"), 4)])
        rows.append([f"embeddings, Spearman of similarities, {name}", number(result.get("spearman"), 4)])
    if finite(agreement.get("match_length")) is not None:
        rows.append(["generated tokens before the first difference", number(agreement["match_length"], 1)])
    for name, result in (evaluation.get("stability") or {}).items():
        rows.append([f"both right or both wrong, weighted by confidence, {name} (%)", percent(result.get("value"))])
        rows.append([f"both right or both wrong, {name} (%)", percent(result.get("share"))])
    return _parts(None, _table("Agreement with the original", ["", ""], rows))


def _generations(evaluation: Report) -> list[Part]:
    own, other = _model_and_original(evaluation, "writing")
    names = {"repetition": "repeated 4-grams (%)", "length": "length (tokens)", "ended": "ended with an end token (%)"}
    rows = []
    for key, value in own.items():
        values = [*([other.get(key)] if other else []), value]
        form = percent if key in ("repetition", "ended") else number
        rows.append([names.get(key, key.replace("_", " ")), *map(form, values)])
    parts = _parts(None, _table("Generated text", ["", *["original"] * bool(other), "this model"], rows))
    for sample in evaluation.get("samples") or ():
        reference = sample.get("reference")
        texts = [*([("original", reference)] if reference is not None else []), ("this model", sample["text"])]
        parts.append({"sample": sample["prompt"], "texts": texts})
    return parts


def _sizes(compression: Report, evaluation: Report) -> dict[str, tuple[Any, Any]]:
    """Return parameters and bytes before and after, from the compression or else from the evaluation."""
    names, original = ("parameters", "bytes"), evaluation.get("original") or {}
    sizes = {name: compression[name] for name in names if compression.get(name)}
    if sizes:
        return {name: (size.get("before"), size.get("after")) for name, size in sizes.items()}
    return {name: (original.get(name), evaluation[name]) for name in names if name in evaluation}


def _bounded(compression: Report) -> list[Part]:
    """Return the statement about losses that are bounded."""
    statement = (compression.get("bounded") or {}).get("statement")
    return [{"text": f"Bounded losses, {statement}."}] if statement else []


def _target(compression: Report) -> list[Part]:
    """Return the table of the predicted and measured target; no table if the target is a number of blocks."""
    report = compression.get("target") or {}
    known = [
        *(report.get("target") or {}).values(),
        *(report.get(name) for name in ("original", "predicted", "measured")),
    ]
    if len(known) < 4 or any(finite(value) is None for value in known):
        return []
    outcome = TargetOutcome.from_dict(report)
    values = {name: text.replace("-", MINUS) for name, text in outcome.formatted().items()}
    reached = "yes" if outcome.is_reached else "no"
    note = "Predicted before the compression, measured after it" + " on this machine" * outcome.target.is_timed + "."
    row = [str(outcome.target), *values.values(), reached]
    return _parts(None, _table("Target", ["target", *values, "reached"], [row], note=note))


def _size(compression: Report, evaluation: Report) -> list[Part]:
    names = {"parameters": "parameters (M)", "bytes": "size (MB)"}
    sizes = _sizes(compression, evaluation).items()
    rows = [[names[name], millions(before), millions(after), change(before, after)] for name, (before, after) in sizes]
    return _parts(None, _table("Size", ["", "original", "this model", "change"], rows))


def _speed(evaluation: Report) -> list[Part]:
    speed = evaluation.get("speed") or {}
    timings, rows = speed.get("timings") or {}, []
    for name, timing in timings.items():
        for phase, words in PHASE_LABELS.items():
            if not timing.get(phase):
                continue
            known = [seconds for seconds in map(finite, timing[phase]) if seconds is not None]
            quartiles = np.percentile(known, [25, 50, 75]).tolist() if known else [None] * 3
            low, median, high = (number(ratio(value, 1e-3), 1) for value in quartiles)
            prompt = (finite(speed.get("tokens")) or 1) if phase == "prefill" else 1
            rate = ratio((finite(speed.get("batch")) or 1) * prompt, quartiles[1])
            factor = ((speed.get("ratios") or {}).get(name) or {}).get(phase) or {}
            spread = f"{number(factor.get('low'), 3)} to {number(factor.get('high'), 3)}"
            numbers = [median, f"{low} to {high}", number(rate, 1), number(factor.get("median"), 3), spread]
            rows.append([f"{name}, {words}", *numbers, millions(timing.get("peak_memory"))])
    columns = ["model", "time (ms)", "quartiles (ms)", "tokens/s", f"×{SPACE}first", "quartiles (×)"]
    first: Report = next(iter(timings.values()), {})
    conditions = [
        f"{count(speed.get('batch'))} × {count(speed.get('tokens'))} tokens and {count(speed.get('new_tokens'))} more",
        f"median of {len(first.get('prefill') or ())} rounds in turn", str(first.get("dtype") or ""),
        str(first.get("device") or ""), f"{count(speed.get('threads'))} threads", str(speed.get("machine") or ""),
    ]  # fmt: skip
    note = ", ".join(filter(None, conditions)) + "."
    return _parts(None, _table("Speed", [*columns, "peak memory (MB)"], rows, note=note))


def _sweep(sweep: Report) -> list[Part]:
    points = sweep.get("points") or ()
    refused = any(p.get("refused") for p in points)
    labeled = any(p.get("accuracy") is not None for p in points)
    loss, label, _ = plots.sweep_loss(sweep)
    rows = [
        [
            str(k), str(p.get("name")), str(p.get("blocks_text") or ""), number(p.get("removed"), 0),
            number(p.get(loss), 3), *[percent(p.get("accuracy"))] * labeled, percent(p.get("parameters_ratio")),
            number(p.get("prefill_ratio"), 3), number(p.get("decode_ratio"), 3), ", ".join(p.get("front") or ()),
            *([str(p.get("refused") or "")] if refused else []),
        ]
        for k, p in enumerate(points, 1)
    ]  # fmt: skip
    columns = ["no.", "name", "removed", "blocks fewer", label, *["accuracy (%)"] * labeled]
    columns += ["parameters kept (%)"]
    columns += [
        "time, first token (×)",
        "time, further token (×)",
        "on the front by",
        *["reason without a result"] * refused,
    ]
    text = ["name", "removed", "on the front by", "reason without a result"]
    return _parts(plots.front(sweep), _table("All points", columns, rows, text=text))


def _provenance(compression: Report, evaluation: Report, command: str) -> list[Part]:
    rows = [[name, str(evaluation[name])] for name in ("model", "reference") if evaluation.get(name)]
    rows += [[name, str(compression[name])] for name in ("kind", "search", "criterion") if compression.get(name)]
    for name, value in (compression.get("data") or {}).items():
        if value not in (None, "", [], {}):
            rows.append([name.replace("_", " "), _format_value(value)])
    if (memory := finite(compression.get("peak_memory_bytes"))) is not None:
        rows.append(["peak memory", f"{memory / 1e9:.2f} GB"])
    rows += [[f"version of {name}", str(version)] for name, version in (compression.get("versions") or {}).items()]
    parts: list[Part] = [{"command": command}] if command else []
    parts += _parts(None, _table("Settings and data", ["", "value"], rows, text=["value"]))
    for report, what in ((compression, "compression"), (evaluation, "evaluation")):
        seconds = {str(name): finite(value) for name, value in (report.get("seconds") or {}).items()}
        total = sum(value for value in seconds.values() if value is not None)
        timed = [[name, number(value, 1)] for name, value in {**seconds, "all": total}.items()] if seconds else []
        parts += _parts(None, _table(f"Time of the {what}", ["step", "seconds"], timed, strong=len(timed) - 1))
    return parts


def _format_value(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_format_value(item)}" for name, item in value.items())
    if isinstance(value, list | tuple):
        return "; ".join(map(_format_value, value))
    return count(value) if isinstance(value, int) and not isinstance(value, bool) else str(value)
