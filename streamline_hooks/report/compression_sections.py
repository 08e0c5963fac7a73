"""The sections that tell of a compression: what was chosen, how it was trained, how long it took."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from streamline_hooks.evaluation import MEASURES
from streamline_hooks.report.depth_figures import influence, similarity
from streamline_hooks.report.parts import Column, Paragraph, Part, Table
from streamline_hooks.report.row_figures import candidates, steps
from streamline_hooks.report.training_figure import training
from streamline_hooks.report.values import (
    DASH,
    SPACE,
    Scale,
    change,
    finite,
    gone,
    in_words,
    measure_of,
    number,
    ratio,
    silent,
    whole,
)
from streamline_hooks.result import LABELS

_ERRORS = ("removal_error", "repaired_error", "ridge")


def choice_parts(compression: Mapping[str, Any]) -> list[Part]:
    """What was chosen and by what."""
    figures = [similarity(compression), influence(compression), candidates(compression)]
    found: list[Part] = [*_what_was_done(compression), *(figure for figure in figures if figure is not None)]
    return [*found, *_candidates(compression)]


def warning_parts(compression: Mapping[str, Any]) -> list[Part]:
    """What perplexity does not show, in words; nothing where there is nothing to tell."""
    return [Paragraph(str(text)) for text in compression.get("warnings") or ()]


def training_parts(compression: Mapping[str, Any]) -> list[Part]:
    """How the training went; nothing where there was none."""
    said = compression.get("training")
    if not said:
        return []
    figure = training(compression)
    rows = [
        ["steps", whole(said.get("steps"))],
        [f"{said.get('unit', 'token')}s", whole(said.get("tokens"))],
        ["best step", whole(said.get("best_step"))],
        [f"{measure_of(compression)}, before", number(said.get("distance_before"), 4)],
        [f"{measure_of(compression)}, after", number(said.get("distance"), 4)],
        ["time (s)", number(said.get("seconds"), 1)],
    ]
    if said.get("stopped"):
        rows.append(["ended early", str(said["stopped"])])
    table = Table("How it went", [Column("", text=True), Column("")], rows)
    return [figure, table] if figure is not None else [table]


def step_parts(compression: Mapping[str, Any]) -> list[Part]:
    """Perplexity of each step; nothing where none was measured."""
    said = compression.get("perplexity") or {}
    rows = [
        [name, number(said[key]), number(ratio(said[key], said.get("original")))]
        for key, name in LABELS.items()
        if key in said
    ]
    if not rows:
        return []
    columns = [Column("step", text=True), Column("perplexity"), Column(f"×{SPACE}original")]
    figure = steps(compression)
    table = Table("Perplexity by step", columns, rows)
    return [figure, table] if figure is not None else [table]


def score_parts(compression: Mapping[str, Any]) -> list[Part]:
    """How a model that is not for text does at its task after each step; nothing of one that is."""
    said = compression.get("scores") or {}
    measures = {name: words for name, words in MEASURES.items() if any(name in one for one in said.values())}
    rows = [
        [name, *(number(said[key].get(measure), 4) for measure in measures)]
        for key, name in LABELS.items()
        if key in said
    ]
    if not rows:
        return []
    return [Table("Scores by step", [Column("step", text=True), *map(Column, measures.values())], rows)]


def made_of(compression: Mapping[str, Any]) -> list[list[str]]:
    """What the compression was made with, a row each."""
    rows = [[name, str(compression[name])] for name in ("kind", "search", "criterion") if compression.get(name)]
    for name, value in (compression.get("data") or {}).items():
        if value not in (None, "", [], {}):
            rows.append([name.replace("_", " "), _said(value)])
    memory = finite(compression.get("peak_memory_bytes"))
    if memory is not None:
        scale = Scale.of([memory])
        rows.append(["peak memory", f"{scale.say(memory, 2)} {scale.short}B"])
    rows += [[f"version of {name}", str(said)] for name, said in (compression.get("versions") or {}).items()]
    return rows


def _said(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_said(one)}" for name, one in value.items())
    if isinstance(value, list | tuple):
        return "; ".join(map(_said, value))
    return whole(value) if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _what_was_done(compression: Mapping[str, Any]) -> list[Part]:
    plan = compression.get("plan") or {}
    if not plan.get("slots"):
        return []
    windows, silenced = gone(compression), silent(compression)
    parts = [f"{plan['old_length']} blocks became {len(plan['slots'])}."]
    if windows:
        parts.append(f"Removed: {in_words(windows)} (numbered from 0, as before).")
    if rounds := compression.get("rounds"):
        each = ", then ".join(" ".join(map(str, one["removed"])) for one in rounds)
        parts.append(
            f"In {len(rounds)} rounds: {each}. The figures of depth are the original's; the candidates and the "
            "training are those of the last round, which numbers the blocks that it found."
        )
    if silenced:
        parts.append(f"Silenced: {in_words((), silenced)}.")
    stands = compression.get("stand_in") or {}
    if compression.get("kind") and finite(stands.get("parameters")):
        parts.append(f"In their place: {compression['kind']}, {whole(stands['parameters'])} parameters each.")
    elif compression.get("kind"):
        parts.append(f"Repair: {compression['kind']}.")
    if compression.get("search"):
        parts.append(f"Found by {compression['search']}, {compression.get('criterion', DASH)}.")
    return [Paragraph(" ".join(parts))]


def _candidates(compression: Mapping[str, Any]) -> list[Part]:
    """All of them; where one has several windows, the worst error of each."""
    rows, reasons = [], any(one.get("refused") for one in compression.get("candidates") or ())
    for k, one in enumerate(compression.get("candidates") or ()):
        repairs = [*(one.get("repairs") or ()), *(one.get("maps") or ())]
        worst = [max((v for r in repairs if (v := finite(r.get(name))) is not None), default=None) for name in _ERRORS]
        rows.append(
            [
                in_words(one.get("windows") or (), one.get("silenced") or ()) + (", chosen" if k == 0 else ""),
                number(one.get("score"), 4),
                number(worst[0], 4),
                number(worst[1], 4),
                number(worst[2], 4),
                number(one.get("distance"), 4),
                *([one.get("refused") or ""] if reasons else []),
            ]
        )
    if not rows:
        return []
    columns = [
        Column("blocks", text=True),
        Column("score of the search"),
        Column("relative error, removed"),
        Column("relative error, repaired"),
        Column("ridge"),
        Column(measure_of(compression)),
        *([Column("why it cannot go", text=True)] if reasons else []),
    ]
    return [Table("Candidates", columns, rows, strong=0)]


def size_rows(compression: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Parameters and bytes before and after, by name."""
    found = {name: compression.get(name) or {} for name in ("parameters", "bytes")}
    return {name: (said.get("before"), said.get("after")) for name, said in found.items() if said}


def size_table(sizes: Mapping[str, tuple[Any, Any]]) -> Table | None:
    """Parameters and bytes before and after; None where neither is known.

    Parameters
    ----------
    sizes : mapping of ``parameters`` and ``bytes`` to (before, after)
    """
    compared = any(finite(before) is not None for before, _ in sizes.values())
    rows = []
    for name, (before, after) in sizes.items():
        scale = Scale.of([before, after])
        unit = f"{scale.short}B" if name == "bytes" else f"{scale.word}s" if scale.word else ""
        said = ("size" if name == "bytes" else name) + (f" ({unit})" if unit else "")
        rows.append([said, *([scale.say(before)] if compared else []), scale.say(after)])
        rows[-1] += [change(before, after)] if compared else []
    columns = [Column("", text=True), *([Column("original")] if compared else []), Column("this model")]
    columns += [Column("change")] if compared else []
    return Table("Size", columns, rows) if rows else None
