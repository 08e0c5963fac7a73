"""Figures in every style: legible, nothing over anything else, the same bytes, nothing of matplotlib changed."""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from io import BytesIO
from typing import Any

import matplotlib
import pytest
from PIL import Image

from streamline_hooks import StreamlineError
from streamline_hooks.report.depth_figures import influence, similarity
from streamline_hooks.report.drawing import BREAK, NARROW, STYLES, WIDE, Drawing, Style, fitted
from streamline_hooks.report.front_figure import sweep_front
from streamline_hooks.report.palette import DARK, LIGHT
from streamline_hooks.report.row_figures import accuracy, candidates, perplexity, speed, steps
from streamline_hooks.report.training_figure import training
from tests.processes import in_a_new_process
from tests.report import example
from tests.report.overlaps import drawn, faults
from tests.report.reading import Reader

OF_A_COMPRESSION = (similarity, influence, candidates, steps, training)
OF_AN_EVALUATION = (perplexity, accuracy, speed)
LONG = "a_name_that_is_much_longer_than_any_phone_is_wide/" * 3


def hard_compression() -> dict[str, Any]:
    """80 blocks, many windows, numbers of many sizes."""
    windows = ((1, 3), (5, 6), (8, 20), (22, 23), (25, 26), (30, 47), (50, 51), (60, 61), (70, 77))
    said = example.compression(80, windows)
    said["candidates"] = [{**said["candidates"][0], "distance": 10.0**k} for k in range(-3, 27)]
    said["perplexity"] |= {"removed": 3.2e12, "repaired": 11.551}
    return said


def hard_evaluation() -> dict[str, Any]:
    said = example.evaluation()
    for one in (said, said["original"]):
        for section in ("perplexity", "accuracy"):
            first = next(iter(one[section].values()))
            one[section] = {**{f"{LONG}{k}": first for k in range(12)}, **one[section], "$\\frac{1$ 你好 \x00": first}
    timed = said["speed"]
    other = timed["ratios"].pop("build/smollm2")
    timed["ratios"] |= {LONG: other, "$x^2$": {"prefill": {"median": 40.0, "low": None, "high": None}}}
    return said


def hard_sweep() -> dict[str, Any]:
    said = example.sweep()
    said["points"] += [{**p, "name": LONG, "kind": f"{p['kind']}:rank={k}"} for k, p in enumerate(said["points"])]
    said["points"][0]["perplexity_ratio"] = 1e4
    return said


CASES: dict[str, Callable[[], Drawing | None]] = {
    **{f"{f.__name__} of 4": lambda f=f: f(example.compression(4, ((1, 2),))) for f in OF_A_COMPRESSION},
    **{f"{f.__name__} of 30": lambda f=f: f(example.compression()) for f in OF_A_COMPRESSION},
    **{f"hard {f.__name__}": lambda f=f: f(hard_compression()) for f in OF_A_COMPRESSION},
    **{f"{f.__name__}": lambda f=f: f(example.evaluation()) for f in OF_AN_EVALUATION},
    **{f"hard {f.__name__}": lambda f=f: f(hard_evaluation()) for f in OF_AN_EVALUATION},
    "front": lambda: sweep_front(example.sweep()),
    "hard front": lambda: sweep_front(hard_sweep()),
}


def small() -> Drawing:
    found = steps({"perplexity": {"original": 10.0, "removed": 40.0, "repaired": 15.0}})
    assert found is not None
    return found


@pytest.mark.filterwarnings("ignore:Glyph:UserWarning")
@pytest.mark.parametrize("narrow", [False, True], ids=["wide", "narrow"])
@pytest.mark.parametrize("case", CASES)
def test_every_text_is_legible_and_covers_nothing(case: str, narrow: bool) -> None:
    drawing = CASES[case]()
    assert drawing is not None
    with drawn(drawing, Style(LIGHT, narrow)) as figure:
        assert faults(figure) == []


def test_the_check_sees_what_overlaps() -> None:
    drawing, style = small(), Style(LIGHT, narrow=True)
    with drawn(drawing, style) as figure:
        axes = figure.axes[0]
        x, y = axes.lines[0].get_xydata()[0]
        axes.annotate("over a mark", (x, y), ha="center", va="center", fontsize=7)
        figure.text(0.99, 0.5, "beyond the edge")
        axes.text(0, -0.42, "over a name", transform=axes.get_yaxis_transform(), va="center")
        found = " ".join(faults(figure))
    assert all(
        f in found for f in ("covers a mark", "too small", "leaves the figure", "'plain removal' and 'over a name'")
    )


def test_a_drawing_is_the_same_bytes_every_time_and_whatever_matplotlib_is_set_to() -> None:
    before = (small().svgs, small().png)
    with matplotlib.rc_context({"font.size": 31, "svg.fonttype": "none", "svg.hashsalt": None, "figure.dpi": 33}):
        own = dict(matplotlib.rcParams)
        assert (small().svgs, small().png) == before
        assert dict(matplotlib.rcParams) == own


def test_nothing_of_the_process_is_touched() -> None:
    """No pyplot, no backend chosen, no figure kept; and the report's import alone does not need matplotlib."""
    in_a_new_process("""
        import sys, tempfile
        from pathlib import Path
        from streamline_hooks.report import write_report
        assert "matplotlib" not in sys.modules
        said = {"perplexity": {"original": 1.0, "removed": 2.0}}
        with tempfile.TemporaryDirectory() as folder:
            write_report(Path(folder), compression=said, command="", title="")
        assert "matplotlib.pyplot" not in sys.modules
        import matplotlib
        assert matplotlib.get_backend(auto_select=False) is None
    """)


def test_styles_differ_as_they_say() -> None:
    drawing = small()
    assert len(set(drawing.svgs.values())) == len(STYLES) == 4
    for name, svg in drawing.svgs.items():
        root = ET.fromstring(svg)
        wanted = NARROW if name.endswith("narrow") else WIDE
        assert float(root.attrib["width"].removesuffix("pt")) == pytest.approx(0.75 * wanted)
        surface = (DARK if name.startswith("dark") else LIGHT).surface
        assert surface in svg.decode() and b"<text" not in svg and b"<script" not in svg
    with Image.open(BytesIO(drawing.png)) as image:
        assert image.width == 2 * WIDE


def test_the_html_has_every_style_under_its_condition() -> None:
    reader = Reader(small().html())
    sources = [attributes for tag, attributes in reader.tags if tag == "source"]
    assert [attributes["media"] for attributes in sources] == [
        f"(max-width: {BREAK - 1}px) and (prefers-color-scheme: light)",
        f"(min-width: {BREAK}px) and (prefers-color-scheme: dark)",
        f"(max-width: {BREAK - 1}px) and (prefers-color-scheme: dark)",
    ]
    image = next(attributes for tag, attributes in reader.tags if tag == "img")
    assert "plain removal 40.00, repaired 15.00" in str(image["alt"])


@pytest.mark.parametrize("text", ["$\\frac{1$", "a\nb\tc", "\x00\ud800", "", "W" * 500, "__init__"])
def test_text_from_outside_is_one_plain_line_that_fits(text: str) -> None:
    with Style().active():
        said = fitted(text, 100)
        figure = Style().figure(50)
        width = figure.text(0, 0, said).get_window_extent().width
    assert "\n" not in said and "\x00" not in said and width * 72 / figure.dpi <= 104  # hinted


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(StreamlineError, match=r'Install.*"streamline_hooks\[report\]"'):
        small().svg  # noqa: B018
