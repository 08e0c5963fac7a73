"""Which sections a page has, and the numbers that it opens with."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from streamline_hooks.report.compression_sections import (
    choice_parts,
    made_of,
    score_parts,
    size_rows,
    size_table,
    step_parts,
    training_parts,
    warning_parts,
)
from streamline_hooks.report.evaluation_sections import (
    accuracy_parts,
    agreement_parts,
    perplexity_parts,
    speed_parts,
    writing_parts,
)
from streamline_hooks.report.front_figure import sweep_front
from streamline_hooks.report.parts import Column, Command, KeyNumber, KeyNumbers, Part, Table
from streamline_hooks.report.values import SPACE, Scale, change, finite, gone, in_words, number, percent, ratio, times

Said = Mapping[str, Any]


@dataclass(frozen=True)
class Section:
    """A part of the page with a heading.

    Attributes
    ----------
    anchor, title : str
    parts : sequence of Part
        Not empty.
    """

    anchor: str
    title: str
    parts: Sequence[Part]


def sections(compression: Said, evaluation: Said, sweep: Said, command: str) -> list[Section]:
    """All that have something to say, in the order of the page.

    Parameters
    ----------
    compression, evaluation, sweep : mapping
        Empty where there is none.
    command : str
        That made the page.
    """
    evaluation = beside(compression, evaluation)
    found = [
        Section("choice", "What was removed", choice_parts(compression)),
        Section("warnings", "Warnings", warning_parts(compression)),
        Section("training", "Training", training_parts(compression)),
        Section("scores", "Scores", score_parts(compression)),
        Section("perplexity", "Perplexity", [*step_parts(compression), *perplexity_parts(evaluation)]),
        Section("accuracy", "Accuracy", accuracy_parts(evaluation)),
        Section("agreement", "Agreement", agreement_parts(evaluation)),
        Section("generations", "Generations", writing_parts(evaluation)),
        Section("size", "Size and speed", [*_size(compression, evaluation), *speed_parts(evaluation)]),
        Section("sweep", "Trade-off", _sweep(sweep)),
        Section("made", "How it was made", _made(compression, evaluation, command)),
    ]
    return [section for section in found if section.parts]


def beside(compression: Said, evaluation: Said) -> Said:
    """An evaluation with the generations and speeds that the compression measured, where it has none of its own."""
    return {name: compression[name] for name in ("samples", "speed") if compression.get(name)} | dict(evaluation)


def key_numbers(compression: Said, evaluation: Said) -> KeyNumbers:
    """Blocks, parameters, perplexity, accuracy and speed, as far as they are known.

    Parameters
    ----------
    compression, evaluation : mapping
    """
    evaluation = beside(compression, evaluation)
    found = [
        _blocks(compression),
        _parameters(compression, evaluation),
        _perplexity(compression, evaluation),
        *_accuracies(evaluation),
        _speed(evaluation),
    ]
    return KeyNumbers([one for one in found if one is not None])


def _blocks(compression: Said) -> KeyNumber | None:
    plan = compression.get("plan") or {}
    if not plan.get("slots"):
        return None
    windows = gone(compression)
    detail = f"removed: {in_words(windows)}" if windows else ""
    return KeyNumber("Blocks", f"{plan['old_length']} → {len(plan['slots'])}", detail)


def _parameters(compression: Said, evaluation: Said) -> KeyNumber | None:
    before, after = _sizes(compression, evaluation).get("parameters", (None, None))
    if finite(after) is None:
        return None
    scale = Scale.of([before, after])
    if finite(before) is None:
        return KeyNumber("Parameters", f"{scale.say(after)} {scale.short}".strip())
    return KeyNumber(
        "Parameters",
        f"{change(before, after)}",
        f"{scale.say(before)} → {scale.say(after)} {scale.short}".strip(),
    )


def _perplexity(compression: Said, evaluation: Said) -> KeyNumber | None:
    own = evaluation.get("perplexity") or {}
    other = (evaluation.get("original") or {}).get("perplexity") or {}
    ratios = [
        factor
        for name, one in own.items()
        if (factor := ratio(one.get("value"), (other.get(name) or {}).get("value"))) is not None
    ]
    if ratios:
        domains = "one domain" if len(ratios) == 1 else f"mean of {len(ratios)} domains"
        return KeyNumber("Perplexity", f"× {number(statistics.fmean(ratios))}", domains)
    said = compression.get("perplexity") or {}
    last = next((said[key] for key in ("trained", "repaired", "removed") if key in said), None)
    factor = ratio(last, said.get("original"))
    if factor is None:
        return None
    return KeyNumber("Perplexity", times(factor), f"{number(said['original'])} → {number(last)}")


def _accuracies(evaluation: Said) -> list[KeyNumber]:
    found = []
    for name, said in (evaluation.get("retained") or {}).items():
        key, of_what = (
            ("above_chance", "what is above chance") if said.get("above_chance") else ("ratio", "the accuracy")
        )
        share = said.get(key) or {}
        if finite(share.get("value")) is not None:
            low, high = finite(share.get("low")), finite(share.get("high"))
            between = f" ({percent(low, 0)} to {percent(high, 0)})" if low is not None and high is not None else ""
            value = f"{percent(share['value'], 0)}{SPACE}%"
            found.append(KeyNumber(f"Retained, {name}", value, f"of {of_what}{between}"))
    return found


def _speed(evaluation: Said) -> KeyNumber | None:
    ratios = list(((evaluation.get("speed") or {}).get("ratios") or {}).values())
    if len(ratios) < 2:
        return None
    own = ratios[1]
    phases = {"decode": "a further token", "prefill": "the first token"}
    known = {
        words: value
        for phase, words in phases.items()
        if (value := finite((own.get(phase) or {}).get("median"))) is not None
    }
    if not known:
        return None
    first, *others = known.items()
    detail = f"for {first[0]}" + "".join(f", {times(value)} for {words}" for words, value in others)
    return KeyNumber("Time", times(first[1]), detail)


def _sizes(compression: Said, evaluation: Said) -> dict[str, tuple[Any, Any]]:
    """Before and after: those of the compression, else those of the evaluation."""
    original = evaluation.get("original") or {}
    evaluated = {name: (original.get(name), evaluation[name]) for name in ("parameters", "bytes") if name in evaluation}
    return size_rows(compression) or evaluated


def _size(compression: Said, evaluation: Said) -> list[Part]:
    table = size_table(_sizes(compression, evaluation))
    return [] if table is None else [table]


def _sweep(sweep: Said) -> list[Part]:
    points = sweep.get("points") or ()
    if not points:
        return []
    refused = any(p.get("refused") for p in points)
    columns = [
        Column("name", text=True), Column("blocks gone", text=True), Column("blocks fewer"), Column("perplexity ratio"),
        Column("parameters kept (%)"), Column("time, first token (×)"), Column("time, further token (×)"),
        Column("on the front by", text=True), *([Column("why there is none", text=True)] if refused else []),
    ]  # fmt: skip
    rows = [
        [
            str(p.get("name")), str(p.get("gone") or ""), number(p.get("removed"), 0),
            number(p.get("perplexity_ratio"), 3), percent(p.get("parameters_ratio")), number(p.get("prefill_ratio"), 3),
            number(p.get("decode_ratio"), 3), ", ".join(p.get("front") or ()),
            *([str(p.get("refused") or "")] if refused else []),
        ]
        for p in points
    ]  # fmt: skip
    figure = sweep_front(sweep)
    table = Table("All points", columns, rows)
    return [table] if figure is None else [figure, table]


def _made(compression: Said, evaluation: Said, command: str) -> list[Part]:
    rows = [[name, str(evaluation[name])] for name in ("model", "reference") if evaluation.get(name)]
    rows += made_of(compression)
    parts: list[Part] = [Command(command)] if command else []
    if rows:
        parts.append(Table("What went in", [Column("", text=True), Column("", text=True)], rows))
    both = bool(compression.get("seconds") and evaluation.get("seconds"))
    for said, what in ((compression, " of the compression"), (evaluation, " of the evaluation")):
        seconds = said.get("seconds") or {}
        if seconds:
            timed = [[str(name), number(value, 1)] for name, value in seconds.items()]
            timed.append(["all", number(sum(known for v in seconds.values() if (known := finite(v)) is not None), 1)])
            columns = [Column("step", text=True), Column("seconds")]
            parts.append(Table("Time by step" + what * both, columns, timed, strong=len(timed) - 1))
    return parts
