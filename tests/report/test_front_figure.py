"""The points stand where their values say, and the line joins those that are on the front."""

from __future__ import annotations

import pytest

from streamline_hooks.pipeline.sweep import Point, Sweep
from streamline_hooks.report.drawing import Style
from streamline_hooks.report.front_figure import sweep_front
from tests.report import example
from tests.report.overlaps import drawn

PANELS = {"size": "parameters_ratio", "prefill": "prefill_ratio", "decode": "decode_ratio"}


def test_every_point_is_drawn_in_each_panel_that_it_has_a_value_for() -> None:
    said = example.sweep()
    points = [point for point in said["points"] if point["perplexity_ratio"] is not None]
    assert len(points) == len(said["points"]) - 1  # one was refused
    drawing = sweep_front(said)
    assert drawing is not None
    with drawn(drawing, Style()) as figure:
        for axes, (by, key) in zip(figure.axes, PANELS.items(), strict=True):
            best = sorted((p[key], p["perplexity_ratio"]) for p in points if by in p["front"])
            line, original, *marks = axes.lines
            assert [tuple(xy) for xy in line.get_xydata()] == [*best, (1.0, 1.0)] and len(best) >= 4
            assert original.get_xydata().tolist() == [[1.0, 1.0]]
            assert {tuple(mark.get_xydata()[0]) for mark in marks} == {
                (p[key], p["perplexity_ratio"]) for p in points if p[key] is not None
            }
            full = {tuple(m.get_xydata()[0]) for m in marks if m.get_markerfacecolor() == m.get_markeredgecolor()}
            assert full == set(best)
            names = {p["name"]: (p[key], p["perplexity_ratio"]) for p in points}
            assert len(axes.texts) >= 3
            assert all(names[text.get_text()] == tuple(text.xy) and tuple(text.xy) in full for text in axes.texts)


@pytest.mark.parametrize(("size", "joined"), [(0.9, [(0.9, 0.8)]), (1.1, [(1.0, 1.0), (1.1, 0.8)])])
def test_the_line_ends_at_the_original_unless_a_point_beats_it(size: float, joined: list[tuple[float, float]]) -> None:
    drawing = sweep_front(Sweep((Point("1", "linear", perplexity_ratio=0.8, parameters_ratio=size),)).report())
    assert drawing is not None
    with drawn(drawing, Style()) as figure:
        assert [tuple(xy) for xy in figure.axes[0].lines[0].get_xydata()] == joined


def test_points_on_no_front_are_joined_by_nothing() -> None:
    said = example.sweep()
    for point in said["points"]:
        point["front"] = []
    drawing = sweep_front(said)
    assert drawing is not None and "On the front: none" in drawing.alt
    with drawn(drawing, Style()) as figure:
        assert len(figure.axes[0].lines[0].get_xdata()) == 0 and not figure.axes[0].texts


def test_panels_that_were_not_measured_are_left_out() -> None:
    said = example.sweep()
    for point in said["points"]:
        point["prefill_ratio"] = point["decode_ratio"] = None
    drawing = sweep_front(said)
    assert drawing is not None
    with drawn(drawing, Style()) as figure:
        assert [axes.get_title("left") for axes in figure.axes] == ["Size"]
    assert sweep_front({"points": [{"name": "a", "perplexity_ratio": None}]}) is None and sweep_front({}) is None


def test_more_kinds_than_shapes_share_one() -> None:
    said = example.sweep()
    said["points"] = [{**p, "kind": f"kind {k}"} for k, p in enumerate(said["points"])]
    drawing = sweep_front(said)
    assert drawing is not None
    with drawn(drawing, Style()) as figure:
        keys = [text.get_text() for text in figure.legends[0].get_texts()]
    assert keys == ["original", *(f"kind {k}" for k in range(7)), "other kinds"]
