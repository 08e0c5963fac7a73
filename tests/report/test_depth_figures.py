"""What stands on the heat map and in the bars is what the values say."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle

from streamline_hooks.report.depth_figures import influence, similarity
from streamline_hooks.report.drawing import STYLES, Style
from streamline_hooks.report.palette import LIGHT
from tests.report import example
from tests.report.overlaps import drawn


def outlines(axes: Any) -> dict[str, Rectangle]:
    return {patch.get_gid(): patch for patch in axes.patches if patch.get_gid()}


@pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)
@pytest.mark.parametrize("windows", [((2, 10),), ((0, 1), (3, 5)), ((27, 30),), ()])
def test_windows_are_outlined_where_they_are(windows: tuple[tuple[int, int], ...], style: Style) -> None:
    said = example.compression(30, windows or ((2, 3),))
    if not windows:
        said["candidates"], said["plan"]["removed"] = [], []
    drawing = similarity(said)
    assert drawing is not None
    with drawn(drawing, style) as figure:
        maps = [axes for axes in figure.axes if axes.images]
        assert len(maps) == 2
        for axes, name in zip(maps, ("cosine", "angular_distance"), strict=True):
            assert np.array_equal(axes.images[0].get_array(), np.array(said["similarity"][name]))
            found = outlines(axes)
            assert len(found) == len(windows)
            for start, stop in windows:
                # From the middle of nothing: cell k is drawn from k - 0.5 to k + 0.5, and both ends are inside.
                corners = found[f"window-{name}-{start}-{stop}"].get_bbox()
                assert (corners.x0, corners.y0, corners.x1, corners.y1) == (
                    start - 0.5,
                    start - 0.5,
                    stop + 0.5,
                    stop + 0.5,
                )
            dots = [tuple(line.get_xydata()[0]) for line in axes.lines]
            assert dots == [(stop, start) for start, stop in windows]
            assert axes.yaxis_inverted() and not axes.xaxis_inverted()


@pytest.mark.parametrize("name", ["cosine", "angular_distance"])
@pytest.mark.parametrize(
    ("kept", "label", "told"),
    [
        (0, "state entering block (30: the end)", ""),
        (1, "state entering block", "The last block was to stay and was not measured."),
        (4, "state entering block", "The last 4 blocks were to stay and were not measured."),
        (None, "state entering block", ""),  # nothing says how many there are
    ],
)
def test_last_blocks_that_were_not_measured_are_told(kept: int | None, label: str, told: str, name: str) -> None:
    said = example.compression()
    places = 31 - (kept or 0)
    said["similarity"] = {name: [row[:places] for row in said["similarity"][name][:places]]}
    if kept is None:
        del said["plan"]
    drawings = [similarity(said), influence(said)] if name == "cosine" else [similarity(said)]
    for drawing in drawings:
        assert drawing is not None
        assert told in drawing.alt and told in drawing.caption
        assert told or "not measured" not in drawing.alt + drawing.caption
    assert drawings[0] is not None
    with drawn(drawings[0], Style()) as figure:
        assert figure.axes[0].get_xlabel() == label


def test_the_caption_tells_the_cosine_of_the_window() -> None:
    said = example.compression()
    said["similarity"]["cosine"][2][10] = 0.4321
    drawing = similarity(said)
    assert drawing is not None and "cosine 2–9: 0.432" in drawing.caption and "(2–9)" in drawing.alt


def test_bright_is_alike_in_both_maps() -> None:
    drawing = similarity(example.compression())
    assert drawing is not None
    with drawn(drawing, Style()) as figure:
        cosine, angular = (axes.images[0] for axes in figure.axes if axes.images)
        assert np.allclose(cosine.cmap(1.0), angular.cmap(0.0)) and np.allclose(cosine.cmap(0.0), angular.cmap(1.0))


@pytest.mark.parametrize("missing", [None, math.nan, math.inf])
def test_a_missing_cell_is_a_hole(missing: float | None) -> None:
    said = example.compression()
    said["similarity"]["cosine"][3][5] = missing
    drawing = similarity(said)
    assert drawing is not None
    with drawn(drawing, Style()) as figure:
        shown = figure.axes[0].images[0].get_array()
        assert shown.mask[3, 5] and shown.mask.sum() == 1


def test_one_map_alone_and_none() -> None:
    said = example.compression()
    del said["similarity"]["angular_distance"]
    drawing = similarity(said)
    assert drawing is not None
    with drawn(drawing, Style()) as figure:
        assert len([axes for axes in figure.axes if axes.images]) == 1
    said["similarity"]["cosine"] = [[None, None], [None, None]]
    assert similarity(said) is None and influence(said) is None
    assert similarity({}) is None and influence({}) is None


@pytest.mark.parametrize("length", [4, 30])
def test_bars_are_one_minus_the_cosine_of_each_block(length: int) -> None:
    said = example.compression(length, ((1, 3),))
    cosine = said["similarity"]["cosine"]
    drawing = influence(said)
    assert drawing is not None
    with drawn(drawing, Style()) as figure:
        bars = {round(bar.get_x() + bar.get_width() / 2): bar for bar in figure.axes[0].patches}
        assert set(bars) == set(range(length))
        for k, bar in bars.items():
            assert bar.get_height() == pytest.approx(1 - cosine[k][k + 1], abs=1e-12)
            assert to_hex(bar.get_facecolor()) == (LIGHT.gone if k in (1, 2) else LIGHT.after)
            assert bool(bar.get_hatch()) == (k in (1, 2))


def test_silenced_branches_are_marked_above_their_block() -> None:
    said = example.compression()
    said["candidates"][0]["silenced"] = [[4, "attention"], [9, "attention"], [9, "mlp"]]
    said["candidates"][0]["windows"] = []
    drawing = influence(said)
    assert drawing is not None
    with drawn(drawing, Style()) as figure:
        marks = {line.get_label(): (line.get_marker(), line.get_xdata().tolist()) for line in figure.axes[0].lines}
        assert marks == {"attention silenced": ("v", [4, 9]), "MLP silenced": ("^", [9])}
        assert all(line.get_ydata().min() > 1 for line in figure.axes[0].lines)  # in parts of the axes
        keys = [text.get_text() for text in figure.legends[0].get_texts()]
        assert keys == ["stays", "attention silenced", "MLP silenced"]


def test_an_axis_that_one_block_would_fill_is_logarithmic_and_says_so() -> None:
    said = example.compression()
    for k in range(1, 30):
        said["similarity"]["cosine"][k][k + 1] = 0.99
    drawing = influence(said)
    assert drawing is not None
    with drawn(drawing, Style()) as figure:
        assert figure.axes[0].get_yscale() == "log" and "log scale" in figure.axes[0].get_ylabel()
    said["similarity"]["cosine"][5][6] = 1.0  # a block that does nothing has no logarithm
    drawing = influence(said)
    assert drawing is not None
    with drawn(drawing, Style()) as figure:
        assert figure.axes[0].get_yscale() == "linear" and "log" not in figure.axes[0].get_ylabel()
