"""What the page tells: the reports as plain sections of figures, tables and paragraphs for the template."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from streamline_hooks.evaluation import MEASURES
from streamline_hooks.report import figures
from streamline_hooks.report.figures import Plot, Row
from streamline_hooks.report.formatting import (
    DASH,
    SPACE,
    blocks_text,
    change,
    count,
    finite,
    interval,
    millions,
    number,
    percent,
    ratio,
    removed_windows,
    silenced_branches,
    times,
)
from streamline_hooks.result import LABELS

Report = Mapping[str, Any]
Part = dict[str, Any]
PHASES = {"prefill": "first token", "decode": "further token"}


def sections(compression: Report, evaluation: Report, sweep: Report, command: str) -> list[Part]:
    """Return the sections that have something to tell, in the order of the page.

    Parameters
    ----------
    compression, evaluation, sweep : mapping
        Empty if there is none.
    command : str

    Returns
    -------
    list of dict
        Of each section ``id``, ``title`` and ``parts``. A part is a dict with one of the keys ``text``, ``plot``,
        ``table``, ``sample`` and ``command``.
    """
    evaluation = _with_measured(compression, evaluation)
    depth = [*_parts(figures.similarity(compression)), *_parts(figures.influence(compression))]
    found = {
        "choice": ("What was removed", [*_what_was_done(compression), *depth, *_candidates(compression)]),
        "warnings": ("Warnings", [{"text": str(text)} for text in compression.get("warnings") or ()]),
        "training": ("Training", _training(compression)),
        "scores": ("Scores", _scores(compression)),
        "perplexity": ("Perplexity", [*_steps(compression), *_perplexity(evaluation)]),
        "tasks": ("Tasks", _tasks(evaluation)),
        "agreement": ("Agreement", _agreement(evaluation)),
        "generations": ("Generations", _generations(evaluation)),
        "size": ("Size and speed", [*_size(compression, evaluation), *_speed(evaluation)]),
        "sweep": ("Trade-off", _sweep(sweep)),
        "made": ("How it was made", _made(compression, evaluation, command)),
    }
    return [{"id": name, "title": title, "parts": parts} for name, (title, parts) in found.items() if parts]


def key_numbers(compression: Report, evaluation: Report) -> list[tuple[str, str, str]]:
    """Return name, value and detail of the numbers that the page opens with, as far as they are known."""
    evaluation, found = _with_measured(compression, evaluation), []
    plan, windows = compression.get("plan") or {}, removed_windows(compression)
    if plan.get("slots"):
        detail = f"removed: {blocks_text(windows)}" if windows else ""
        found.append(("Blocks", f"{plan['old_length']} → {len(plan['slots'])}", detail))
    before, after = _sizes(compression, evaluation).get("parameters", (None, None))
    if finite(after) is not None:
        known = finite(before) is not None
        detail = f"{change(before, after)}, from {millions(before)} M" if known else ""
        found.append(("Parameters", f"{millions(after)} M", detail))
    if (perplexity := _key_perplexity(compression, evaluation)) is not None:
        found.append(perplexity)
    for name, one in (evaluation.get("retained") or {}).items():
        above = bool(one.get("above_chance"))
        share = one.get("above_chance" if above else "ratio") or {}
        if finite(share.get("value")) is not None:
            value, _, ends = interval(share, 0).partition(" ")
            of = "of the accuracy" + " above chance" * above
            found.append((f"Relative accuracy, {name}", f"{value}{SPACE}%", f"{of} {ends}".strip()))
    ratios = list(((evaluation.get("speed") or {}).get("ratios") or {}).values())
    for phase, words in PHASES.items():
        if len(ratios) > 1 and finite(factor := (ratios[1].get(phase) or {}).get("median")) is not None:
            found.append((f"Time, {words}", times(factor), "of the original's"))
    return found


def _with_measured(compression: Report, evaluation: Report) -> Report:
    """Return the evaluation with the generations and speeds that the compression measured, if it has none."""
    return {name: compression[name] for name in ("samples", "speed") if compression.get(name)} | dict(evaluation)


def _key_perplexity(compression: Report, evaluation: Report) -> tuple[str, str, str] | None:
    own, other = _both(evaluation, "perplexity")
    ratios = [ratio(one.get("value"), (other.get(name) or {}).get("value")) for name, one in own.items()]
    known = [factor for factor in ratios if factor is not None]
    if known:
        return "Perplexity", times(statistics.fmean(known)), f"of the original's, mean of domains ({len(known)})"
    steps = compression.get("perplexity") or {}
    last = next((steps[key] for key in ("trained", "repaired", "removed") if key in steps), None)
    factor = ratio(last, steps.get("original"))
    return None if factor is None else ("Perplexity", times(factor), f"{number(steps['original'])} → {number(last)}")


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], **options: Any) -> Part:
    """Return a table; the options are ``text`` (columns aligned left), ``note`` and ``strong`` (number of a row)."""
    aligned = [(name, k == 0 or name in options.get("text", ())) for k, name in enumerate(columns)]
    return {"table": title, "note": None, "strong": None, **options, "columns": aligned, "rows": rows}


def _parts(plot: Plot | None, *tables: Part) -> list[Part]:
    return [*([] if plot is None else [{"plot": plot}]), *(table for table in tables if table["rows"])]


def _both(evaluation: Report, name: str) -> tuple[Report, Report]:
    return evaluation.get(name) or {}, (evaluation.get("original") or {}).get(name) or {}


def _measure(compression: Report) -> str:
    return str(compression.get("measure") or "KL (nats a token)")


def _what_was_done(compression: Report) -> list[Part]:
    plan = compression.get("plan") or {}
    if not plan.get("slots"):
        return []
    windows, silenced = removed_windows(compression), silenced_branches(compression)
    parts = [f"{plan['old_length']} blocks became {len(plan['slots'])}."]
    if windows:
        parts.append(f"Removed: {blocks_text(windows)} (numbered from 0, as before).")
    if rounds := compression.get("rounds"):
        each = ", then ".join(" ".join(map(str, one["removed"])) for one in rounds)
        parts.append(
            f"In {len(rounds)} rounds: {each}. The figures of depth are the original's; the candidates and the "
            "training are those of the last round, which numbers the blocks that it found."
        )
    if silenced:
        parts.append(f"Silenced: {blocks_text((), silenced)}.")
    size = (compression.get("stand_in") or {}).get("parameters")
    if compression.get("kind"):
        parts.append(f"Repair: {compression['kind']}{f', {count(size)} parameters each' if finite(size) else ''}.")
    if compression.get("search"):
        parts.append(f"Found by {compression['search']}, {compression.get('criterion', DASH)}.")
    return [{"text": " ".join(parts)}]


def _candidates(compression: Report) -> list[Part]:
    """Return the table of all candidates, the chosen one first; of several windows the worst error counts."""
    candidates, rows = compression.get("candidates") or (), []
    refused = any(one.get("refused") for one in candidates)
    for k, one in enumerate(candidates):
        repairs = [*(one.get("repairs") or ()), *(one.get("maps") or ())]
        worst = [
            max((v for repair in repairs if (v := finite(repair.get(name))) is not None), default=None)
            for name in ("removal_error", "repaired_error", "ridge")
        ]
        name = blocks_text(one.get("windows") or (), one.get("silenced") or ()) + (", chosen" if k == 0 else "")
        numbers = [number(value, 4) for value in (one.get("score"), *worst, one.get("distance"))]
        rows.append([name, *numbers, *([one.get("refused") or ""] if refused else [])])
    why = "why it cannot be removed"
    columns = ["blocks", "score of the search", "relative error, removed", "relative error, repaired", "ridge"]
    columns += [_measure(compression), *([why] if refused else [])]
    return _parts(None, _table("Candidates", columns, rows, strong=0, text=[why]))


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
    return _parts(figures.training(compression, measure), _table("Training run", ["", ""], list(values.items())))


def _scores(compression: Report) -> list[Part]:
    """Return the task's scores of a model that is not for text."""
    scores = compression.get("scores") or {}
    measures = {name: words for name, words in MEASURES.items() if any(name in one for one in scores.values())}
    rows = [[name, *(number(scores[key].get(m), 4) for m in measures)] for key, name in LABELS.items() if key in scores]
    return _parts(None, _table("Scores by step", ["step", *measures.values()], rows))


def _steps(compression: Report) -> list[Part]:
    values = compression.get("perplexity") or {}
    rows = [
        [name, number(values[key]), number(ratio(values[key], values.get("original")))]
        for key, name in LABELS.items()
        if key in values
    ]
    return _parts(None, _table("Perplexity by step", ["step", "perplexity", f"×{SPACE}original"], rows))


def _perplexity(evaluation: Report) -> list[Part]:
    own, other = _both(evaluation, "perplexity")
    rows, marks = [], []
    for name, one in own.items():
        before, value = other.get(name) or {}, one.get("value")
        compared = [number(before.get("value")), number(ratio(value, before.get("value")))] if other else []
        rows.append([name, count(one.get("tokens")), number(one.get("bits_per_byte"), 3), number(value), *compared])
        marks.append(Row(name, _mark(before), _mark(one)))
    columns = ["domain", "tokens", "bits/byte", "this model", *["original", f"×{SPACE}original"] * bool(other)]
    caption = "On held-out text; lower is better."
    plot = figures.row_plot("perplexity", "Perplexity by domain", marks, "perplexity", caption)
    return _parts(plot, _table("Perplexity by domain", columns, rows))


def _mark(value: Report | None) -> tuple[float, float | None, float | None] | None:
    """Return a value for a figure, with a standard error to either side if there is one."""
    known, error = (finite((value or {}).get(name)) for name in ("value", "standard_error"))
    if known is None:
        return None
    return (known, None, None) if error is None else (known, known - error, known + error)


def _tasks(evaluation: Report) -> list[Part]:
    found, rows, marks = _task_values(evaluation), [], []
    compared = any(before for _, before in found.values())
    related = any(own.get("relative") for own, _ in found.values())
    for (task, metric), (own, before) in found.items():
        about = [f"{own['few_shot']}-shot"] if own.get("few_shot") is not None else []
        about += [f"version {own['version']}"] if own.get("version") is not None else []
        scores = [*([_with_error(before)] if compared else []), _with_error(own)]
        relative = [interval(own.get("relative"))] if related else []
        words = ", ".join([metric, *about])
        rows.append([task, words, count(own.get("items")), number(own.get("chance"), 4), *scores, *relative])
        mark = _mark(own)
        if mark is not None and 0 <= mark[0] <= 1:  # no perplexity and no length
            name = task if sum(t == task for t, _ in found) == 1 else f"{task}, {metric}"
            marks.append(Row(name, _mark(before), mark, finite(own.get("chance"))))
    columns = ["task", "metric", "items", "chance", *["original"] * compared, "this model"]
    columns += ["relative accuracy (%)"] * related
    title = "Tasks, ± one standard error"
    plot = figures.row_plot("tasks", "Tasks", marks, "score", "Higher is better. Whiskers are one standard error.")
    return [*_parts(plot, _table(title, columns, rows, text=["metric"])), *_relative(evaluation)]


def _task_values(evaluation: Report) -> dict[tuple[str, str], tuple[Report, Report]]:
    """Return the values of the model and of the original by task and metric.

    ``accuracy`` holds a value per task, ``tasks`` and, in earlier reports, ``harness`` one per task and metric.
    """
    own, other = _both(evaluation, "accuracy")
    found = {(task, str(one.get("metric") or "accuracy")): (one, other.get(task) or {}) for task, one in own.items()}
    run, original = evaluation.get("harness") or {}, evaluation.get("harness_original") or {}
    for tasks, reference in (_both(evaluation, "tasks"), (run.get("tasks") or {}, original.get("tasks") or {})):
        for task, entry in tasks.items():
            names = {"items": "items", "few_shot": "few_shot", "task_versions": "version"}
            about = {name: entry.get(name, (run.get(key) or {}).get(task)) for key, name in names.items()}
            for metric, value in _metrics(entry).items():
                before = _metrics(reference.get(task) or {}).get(metric) or {}
                known, known_before = found.get((task, metric), ({}, {}))
                found[task, metric] = ({**about, **value, **known}, known_before or before)
    return found


def _metrics(entry: Report) -> Report:
    return entry.get("metrics") or {name: one for name, one in entry.items() if isinstance(one, Mapping)}


def _with_error(value: Report) -> str:
    error = finite(value.get("standard_error"))
    return number(value.get("value"), 4) + ("" if error is None else f" ± {number(error, 4)}")


def _relative(evaluation: Report) -> list[Part]:
    """Return the table of accuracies relative to the original's, by group of tasks."""
    rows, left_out = [], []
    for name, one in (evaluation.get("retained") or {}).items():
        shares = [interval(one.get(key)) for key in ("ratio", "above_chance")]
        if shares != [DASH, DASH]:
            rows.append([name, *shares])
            left_out += [f"{task}, {reason}" for task, reason in (one.get("left_out") or {}).items()]
    note = f"Left out above chance: {'; '.join(left_out)}." if left_out else ""
    columns = ["tasks", "of the accuracy (%)", "of the accuracy above chance (%)"]
    return _parts(None, _table("Relative accuracy, with its interval", columns, rows, note=note))


def _agreement(evaluation: Report) -> list[Part]:
    found = evaluation.get("agreement") or {}
    rows = [["KL, mean (nats a token)", number(found["kl"], 4)]] if "kl" in found else []
    for quantile, value in (found.get("quantiles") or {}).items():
        rows.append([f"KL, {100 * float(quantile):g} % quantile (nats)", number(value, 4)])
    for name, value in (found.get("kl_by_domain") or {}).items():
        rows.append([f"KL, {name} (nats a token)", number(value, 4)])
    if "top1" in found:
        rows.append(["same most likely token (%)", percent(found["top1"])])
    if finite(found.get("match_length")) is not None:
        rows.append(["generated tokens before the first difference", number(found["match_length"], 1)])
    for name, one in (evaluation.get("stability") or {}).items():
        rows.append([f"both right or both wrong, weighted by confidence, {name} (%)", percent(one.get("value"))])
        rows.append([f"both right or both wrong, {name} (%)", percent(one.get("share"))])
    return _parts(None, _table("Agreement with the original", ["", ""], rows))


def _generations(evaluation: Report) -> list[Part]:
    own, other = _both(evaluation, "writing")
    names = {"repetition": "repeated 4-grams (%)", "length": "length (tokens)", "ended": "ended by themselves (%)"}
    rows = []
    for key, value in own.items():
        values = [*([other.get(key)] if other else []), value]
        form = percent if key in ("repetition", "ended") else number
        rows.append([names.get(key, key.replace("_", " ")), *map(form, values)])
    parts = _parts(None, _table("Generated text", ["", *["original"] * bool(other), "this model"], rows))
    references = {one["prompt"]: one["text"] for one in (evaluation.get("original") or {}).get("samples") or ()}
    for one in evaluation.get("samples") or ():
        reference = one.get("reference")
        reference = references.get(one["prompt"]) if reference is None else reference
        texts = [*([("original", reference)] if reference is not None else []), ("this model", one["text"])]
        parts.append({"sample": one["prompt"], "texts": texts})
    return parts


def _sizes(compression: Report, evaluation: Report) -> dict[str, tuple[Any, Any]]:
    """Return parameters and bytes, before and after: those of the compression, else those of the evaluation."""
    names, original = ("parameters", "bytes"), evaluation.get("original") or {}
    sizes = {name: compression[name] for name in names if compression.get(name)}
    if sizes:
        return {name: (size.get("before"), size.get("after")) for name, size in sizes.items()}
    return {name: (original.get(name), evaluation[name]) for name in names if name in evaluation}


def _size(compression: Report, evaluation: Report) -> list[Part]:
    names = {"parameters": "parameters (M)", "bytes": "size (MB)"}
    sizes = _sizes(compression, evaluation).items()
    rows = [[names[name], millions(before), millions(after), change(before, after)] for name, (before, after) in sizes]
    return _parts(None, _table("Size", ["", "original", "this model", "change"], rows))


def _speed(evaluation: Report) -> list[Part]:
    speed = evaluation.get("speed") or {}
    timings, rows = speed.get("timings") or {}, []
    for name, timing in timings.items():
        for phase, words in PHASES.items():
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
    rows = [
        [
            str(k), str(p.get("name")), str(p.get("gone") or ""), number(p.get("removed"), 0),
            number(p.get("perplexity_ratio"), 3), percent(p.get("parameters_ratio")), number(p.get("prefill_ratio"), 3),
            number(p.get("decode_ratio"), 3), ", ".join(p.get("front") or ()),
            *([str(p.get("refused") or "")] if refused else []),
        ]
        for k, p in enumerate(points, 1)
    ]  # fmt: skip
    columns = ["no.", "name", "removed", "blocks fewer", "perplexity ratio", "parameters kept (%)"]
    columns += ["time, first token (×)", "time, further token (×)", "on the front by", *["why there is none"] * refused]
    text = ["name", "removed", "on the front by", "why there is none"]
    return _parts(figures.front(sweep), _table("All points", columns, rows, text=text))


def _made(compression: Report, evaluation: Report, command: str) -> list[Part]:
    rows = [[name, str(evaluation[name])] for name in ("model", "reference") if evaluation.get(name)]
    rows += [[name, str(compression[name])] for name in ("kind", "search", "criterion") if compression.get(name)]
    for name, value in (compression.get("data") or {}).items():
        if value not in (None, "", [], {}):
            rows.append([name.replace("_", " "), _plain(value)])
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


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_plain(one)}" for name, one in value.items())
    if isinstance(value, list | tuple):
        return "; ".join(map(_plain, value))
    return count(value) if isinstance(value, int) and not isinstance(value, bool) else str(value)
