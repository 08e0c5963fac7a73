"""The figures hold the values of the report, and their SVG is the same every time and safe inside HTML."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.text import Text

from streamline_hooks.pipeline.plots import (
    COLORS,
    Plot,
    PlotRow,
    front,
    influence,
    plot_label,
    row_plot,
    similarity,
    style,
    training,
)
from streamline_hooks.pipeline.report import sections
from tests.pipeline import example
from tests.processes import in_a_new_process

HOSTILE = "--></svg><script>alert(1)</script>$\\frac{1$ \x00 " + "W" * 300


def axes_of(plot: Plot | None, narrow: bool = False) -> list[Any]:
    assert plot is not None
    with style():
        return plot.figure(narrow).axes


def plots(*reports: dict[str, Any]) -> list[Plot]:
    return [part["plot"] for section in sections(*reports, "") for part in section["parts"] if "plot" in part]


@pytest.mark.parametrize("windows", [((2, 10),), ((0, 1), (3, 5)), ((27, 30),), ()])
def test_removed_windows_are_outlined_in_the_heat_map(windows: tuple[tuple[int, int], ...]) -> None:
    report = example.compression(30, windows or ((2, 3),))
    if not windows:
        report["candidates"], report["plan"]["removed"] = [], []
    axes = axes_of(similarity(report))[0]
    assert np.array_equal(axes.images[0].get_array(), np.array(report["similarity"]["cosine"]))
    boxes = [patch.get_bbox() for patch in axes.patches]
    # Cell k is drawn from k - 0.5 to k + 0.5, and both ends are inside.
    assert [(b.x0, b.y0, b.x1, b.y1) for b in boxes] == [(a - 0.5, a - 0.5, b + 0.5, b + 0.5) for a, b in windows]
    assert axes.yaxis_inverted() and not axes.xaxis_inverted()


def test_the_caption_tells_the_cosine_and_what_was_not_measured() -> None:
    report = example.compression()
    report["similarity"]["cosine"][2][10], report["similarity"]["cosine"][3][5] = 0.4321, math.nan
    plot = similarity(report)
    assert plot is not None and "2–9: 0.432" in plot.caption and "not measured" not in plot.caption
    shown = axes_of(plot)[0].images[0].get_array()
    assert shown.mask[3, 5] and shown.mask.sum() == 1
    report["similarity"]["cosine"] = [row[:27] for row in report["similarity"]["cosine"][:27]]
    for plot in (similarity(report), influence(report)):
        assert plot is not None and "The last blocks (4) were protected and not measured." in plot.caption


@pytest.mark.parametrize("length", [4, 30])
def test_bars_are_one_minus_the_cosine_of_each_block(length: int) -> None:
    report = example.compression(length, ((1, 3),))
    cosine = report["similarity"]["cosine"]
    bars = {round(bar.get_x() + bar.get_width() / 2): bar for bar in axes_of(influence(report))[0].patches}
    assert set(bars) == set(range(length))
    for k, bar in bars.items():
        assert bar.get_height() == pytest.approx(1 - cosine[k][k + 1], abs=1e-12)
        assert to_hex(bar.get_facecolor()) == COLORS["removed" if k in (1, 2) else "after"]
        assert bool(bar.get_hatch()) == (k in (1, 2))


def test_an_axis_that_one_block_would_fill_is_logarithmic() -> None:
    report = example.compression()
    for k in range(1, 30):
        report["similarity"]["cosine"][k][k + 1] = 0.99
    assert axes_of(influence(report))[0].get_yscale() == "log"
    report["similarity"]["cosine"][5][6] = 1.0  # a block that does nothing has no logarithm
    assert axes_of(influence(report))[0].get_yscale() == "linear"


def test_the_training_curves_are_the_history() -> None:
    report = example.compression()
    history = report["training"]["history"]
    history[2]["distance"] = math.nan
    distance, loss = axes_of(training(report, "KL (nats per token)"))
    known = [(row["tokens"], row["distance"]) for row in history if row is not history[2]]
    assert np.allclose(distance.lines[0].get_xydata(), known) and "nats" in distance.get_ylabel()
    assert np.allclose(loss.lines[0].get_xydata(), [(row["tokens"], row["loss"]) for row in history[1:]])
    assert distance.lines[1].get_label().endswith("at step 210")


def test_rows_hold_both_values_with_their_intervals_under_the_name() -> None:
    rows = [
        PlotRow("a", (0.5, 0.4, 0.6), (0.3, 0.2, 0.4), 0.25),
        PlotRow("b", None, (0.7, None, None)),
        PlotRow("c", None, None),
    ]
    axes = axes_of(row_plot("tasks", "Tasks", rows, "score", ""))[0]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["a", "b"]
    marks = {line.get_gid(): line.get_xdata()[0] for line in axes.lines if len(line.get_xdata()) == 1}
    assert marks == {"original-0": 0.5, "this-model-0": 0.3, "chance-0": 0.25, "this-model-1": 0.7}
    assert [list(line.get_xdata()) for line in axes.lines if len(line.get_xdata()) == 2] == [[0.4, 0.6], [0.2, 0.4]]
    assert axes.get_xscale() == "linear"
    assert (
        axes_of(row_plot("t", "t", [PlotRow("a", (1.0, None, None), (50.0, None, None))], "x", ""))[0].get_xscale()
        == "log"
    )


def test_every_point_of_a_sweep_is_in_each_panel_that_it_has_a_value_for() -> None:
    report = example.sweep()
    points = [(k, p) for k, p in enumerate(report["points"], 1) if p["perplexity_ratio"] is not None]
    panels = {"size": "parameters_ratio", "prefill": "prefill_ratio", "decode": "decode_ratio"}
    for axes, (by, key) in zip(axes_of(front(report)), panels.items(), strict=True):
        shown = {line.get_gid(): line for line in axes.lines if line.get_gid()}
        known = {k: (p[key], p["perplexity_ratio"]) for k, p in points if p[key] is not None}
        assert {k: tuple(shown[f"point-{by}-{k}"].get_xydata()[0]) for k in known} == known
        best = sorted(known[k] for k, p in points if by in p["front"])
        assert [tuple(xy) for xy in shown[f"front-{by}"].get_xydata()] == best and len(best) >= 4
        assert {text.get_text(): tuple(text.xy) for text in axes.texts} == {
            str(k): known[k] for k, p in points if by in p["front"]
        }
    for point in report["points"]:
        point["prefill_ratio"] = point["decode_ratio"] = None
    assert [axes.get_title("left") for axes in axes_of(front(report))] == ["Size"]
    report["points"] = [{**p, "kind": f"kind {k}"} for k, p in enumerate(report["points"])]
    assert front(report) is not None and axes_of(front(report))


@pytest.mark.parametrize("draw", [similarity, influence, front, lambda report: training(report, "")])
def test_without_values_there_is_no_figure(draw: Callable[..., Plot | None]) -> None:
    nothing: list[dict[str, Any]] = [
        {},
        {"similarity": {"cosine": [[None, math.nan]] * 2}, "training": {"history": []}},
    ]
    assert all(draw(report) is None for report in [*nothing, {"points": [{"name": "a", "perplexity_ratio": None}]}])


def test_an_svg_is_the_same_whatever_matplotlib_is_set_to_and_leaves_the_settings() -> None:
    def draw() -> str:
        return "".join(plot.svg(width) for plot in plots(example.compression(), {}, {}) for width in ("wide", "narrow"))

    before = draw()
    with matplotlib.rc_context({"font.size": 31, "svg.fonttype": "none", "svg.hashsalt": None, "figure.dpi": 33}):
        settings = dict(matplotlib.rcParams)
        assert draw() == before and dict(matplotlib.rcParams) == settings
    ids = re.findall(r' id="([^"]*)"', before)
    assert len(ids) == len(set(ids)) and set(re.findall(r'(?:href="#|url\(#)([^")]*)', before)) <= set(ids)
    assert all(f"var(--{name})" in before and color not in before for name, color in COLORS.items() if name != "before")
    assert "http" not in before and "<!--" not in before and "<metadata" not in before


def test_hostile_names_stay_text_and_every_label_is_legible() -> None:
    evaluation, sweep = example.evaluation(), example.sweep()
    for report in (evaluation, evaluation["original"]):
        report["accuracy"] = {f"{name}{HOSTILE}": one for name, one in report["accuracy"].items()}
    for point in sweep["points"]:
        point["kind"], point["name"] = f"{point['kind']}{HOSTILE}", HOSTILE
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for plot in plots(example.compression(), evaluation, sweep):
            for width in ("wide", "narrow"):
                svg = plot.svg(width)
                assert "<script" not in svg and svg.count("<svg") == svg.count("</svg>") == 1
                with style():
                    figure = plot.figure(width == "narrow")
                    figure.draw_without_rendering()
                    texts = [text for text in figure.findobj(Text) if text.get_text() and text.get_visible()]
                    assert all(text.get_fontsize() >= 8 for text in texts)  # 10.7 CSS pixels
                    names = [text for axes in figure.axes for text in axes.get_yticklabels() if text.get_text()]
                    assert all(text.get_window_extent().x0 >= -1 for text in names), plot.name


@pytest.mark.parametrize("text", ["$\\frac{1$", "a\nb\tc", "\x00\ud800", "", "W" * 500, "__init__"])
def test_a_label_is_one_line_without_mathematics(text: str) -> None:
    found = plot_label(text, 20)
    assert len(found.replace("\\$", "$")) <= 20 and found.isprintable() and not re.search(r"(?<!\\)\$", found)


def test_nothing_of_the_process_is_touched() -> None:
    """No pyplot and no backend; and the import of the report alone does not need matplotlib."""
    in_a_new_process("""
        import sys, tempfile
        from pathlib import Path
        from streamline_hooks.pipeline import write_report
        assert "matplotlib" not in sys.modules
        report = {"similarity": {"cosine": [[1.0, 0.5], [0.5, 1.0]]}}
        with tempfile.TemporaryDirectory() as folder:
            assert "<svg" in write_report(Path(folder), compression=report, command="", title="").read_text()
        assert "matplotlib.pyplot" not in sys.modules
        import matplotlib
        assert matplotlib.get_backend(auto_select=False) is None
    """)
