"""The page in headless Chromium: as wide as its window, in its scheme, with figures, at a desk and on a phone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from streamline_hooks.pipeline.report import write_report
from tests.pipeline import example
from tests.pipeline.browser import browser, measure, screenshot

pytestmark = pytest.mark.slow  # a browser is started several times
PAGE = {"light": (246, 246, 243), "dark": (20, 23, 26)}
REMOVED = {"light": (194, 78, 0), "dark": (245, 146, 74)}


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    browser()  # without one there is no need to draw
    evaluation = example.evaluation()
    long = "unbroken" * 60
    evaluation["samples"].append({"prompt": long, "text": f"<script>alert(1)</script> {long}", "reference": long})
    evaluation["perplexity"][f"a/{long[:120]}"] = {"value": 3.0, "bits_per_byte": 1.0, "tokens": 5}
    return write_report(
        tmp_path_factory.mktemp("page"),
        compression=example.compression(),
        evaluation=evaluation,
        sweep=example.sweep(),
        command=f"{example.COMMAND} --calibration {long}",
        title="SmolLM2-135M, 8 of 30 blocks removed",
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_its_window_and_shows_the_figures_for_it(page: Path, tmp_path: Path, scheme: str) -> None:
    for width in (1280, 390):
        measured = measure(page, width, scheme, tmp_path)
        assert (measured["innerWidth"], measured["dark"]) == (width, scheme == "dark")
        assert measured["scrollWidth"] <= width and measured["tooWide"] == []
        assert measured["tallest"] < 400  # a column that has collapsed is as tall as its words are long
        assert measured["scripts"] == 0 and measured["loaded"] == []
        assert measured["background"] == f"rgb{PAGE[scheme]}"
        shown = [figure for figure in measured["figures"] if figure["shown"]]
        assert 2 * len(shown) == len(measured["figures"]) == 12
        assert {figure["kind"] for figure in shown} == {"wide" if width == 1280 else "narrow"}
        assert all(0.8 * min(width, 1000) <= figure["width"] <= width for figure in shown)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_figures_have_the_colors_of_the_scheme(page: Path, tmp_path: Path, scheme: str) -> None:
    for width in (1280, 390):
        with Image.open(screenshot(page, width, 2400, scheme, tmp_path)) as image:
            pixels = np.asarray(image.convert("RGB")).astype(np.int16)
        for color, least in ((PAGE[scheme], 0.05), (REMOVED[scheme], 1e-4), ((253, 231, 37), 5e-4)):  # end of viridis
            assert (np.abs(pixels - np.array(color, np.int16)).max(-1) <= 8).mean() > least


def test_the_check_sees_a_page_that_is_too_wide(tmp_path: Path) -> None:
    page = tmp_path / "wide.html"
    page.write_text('<!doctype html><body style="margin:0"><div class="x" style="width:700px">a</div></body>')
    measured = measure(page, 390, "light", tmp_path)
    assert measured["scrollWidth"] == 700 and measured["tooWide"] == ["DIV.x"]
