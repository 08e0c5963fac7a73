"""The page in headless Chromium: as wide as its window, in its scheme, with pictures, at a desk and on a phone."""

from __future__ import annotations

import base64
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from streamline_hooks.report import write_report
from streamline_hooks.report.drawing import NARROW, WIDE
from streamline_hooks.report.palette import DARK, LIGHT
from tests.report import example
from tests.report.browser import browser, hash_of, measure, screenshot

pytestmark = pytest.mark.slow  # a browser is started a dozen times
PALETTES = {"light": LIGHT, "dark": DARK}
YELLOW, PURPLE = (253, 231, 37), (68, 1, 84)  # the ends of viridis


def rgb(colour: str) -> tuple[int, int, int]:
    return (int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    browser()  # else drawing it is in vain
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


def pictures(page: Path) -> list[dict[str, str]]:
    """The addresses of each figure's pictures, by style."""
    found = []
    for figure in re.findall(r"<picture>(.*?)</picture>", page.read_text(), re.DOTALL):
        by_style = {"light-wide": re.search(r'<img src="([^"]*)"', figure)}
        for media, address in re.findall(r'<source media="([^"]*)" srcset="([^"]*)"', figure):
            scheme = "dark" if "dark" in media else "light"
            by_style[f"{scheme}-{'narrow' if 'max-width' in media else 'wide'}"] = address
        found.append({n: a if isinstance(a, str) else a[1] for n, a in by_style.items() if a})
    return found


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_its_window_and_shows_the_pictures_for_it(page: Path, tmp_path: Path, scheme: str) -> None:
    for width in (1280, 390, 320):
        measured = measure(page, width, scheme, tmp_path)
        assert (measured["innerWidth"], measured["dark"]) == (width, scheme == "dark")
        assert measured["scrollWidth"] <= width and measured["bodyWidth"] <= width
        assert measured["tooWide"] == [] and measured["overfull"] == []
        assert measured["tallest"] < 400  # a column that has collapsed is as tall as its words are long
        assert measured["scripts"] == 0 and measured["loaded"] == []
        assert measured["background"] == f"rgb{rgb(PALETTES[scheme].page)}"
        style = f"{scheme}-{'wide' if width == 1280 else 'narrow'}"
        assert [p["shown"] for p in measured["pictures"]] == [hash_of(by_style[style]) for by_style in pictures(page)]
        for picture in measured["pictures"]:
            assert picture["complete"] and picture["natural"] in (WIDE, NARROW)
            assert 0.75 * picture["natural"] <= picture["width"] <= width


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_screenshots_are_of_the_page(page: Path, tmp_path: Path, scheme: str) -> None:
    palette = PALETTES[scheme]
    for width in (1280, 390):
        with Image.open(screenshot(page, width, 2400, scheme, tmp_path)) as image:
            pixels = np.asarray(image.convert("RGB")).astype(np.int16)
        assert pixels.shape == (2400, width, 3)
        assert share(pixels, rgb(palette.page)) > 0.05 and share(pixels, rgb(palette.surface)) > 0.2  # in its scheme
        assert share(pixels, YELLOW) > 5e-4 and share(pixels, PURPLE) > 5e-4  # the heat map
        assert share(pixels, rgb(palette.gone)) > 1e-4 and share(pixels, rgb(palette.after)) > 1e-3  # the bars
        assert share(pixels, rgb(palette.ink)) > 1e-3  # text


def share(pixels: np.ndarray, colour: tuple[int, int, int]) -> float:
    """Of the pixels that have a colour, about."""
    return float((np.abs(pixels - np.array(colour, np.int16)).max(-1) <= 8).mean())


def test_the_check_sees_a_page_that_is_too_wide_and_text_that_is_cut(tmp_path: Path) -> None:
    page = tmp_path / "wide.html"
    cut = '<article style="width:9px;overflow:hidden"><p>unbroken</p></article>'
    page.write_text(f'<!doctype html><body style="margin:0">{cut}<div class="x" style="width:700px">a</div></body>')
    measured = measure(page, 390, "light", tmp_path)
    assert measured["scrollWidth"] == 700 and measured["tooWide"] == ["DIV.x"]
    assert measured["overfull"] == ["unbroken", "unbroken"]


def test_the_policy_stops_a_script_that_got_through(page: Path, tmp_path: Path) -> None:
    poisoned = tmp_path / "poisoned.html"
    script = '<script>document.body.innerHTML = ""</script><img src="data:image/svg+xml;base64,%s">'
    image = base64.b64encode(b'<svg xmlns="http://www.w3.org/2000/svg" width="7" height="7"/>').decode()
    poisoned.write_text(page.read_text().replace("<main>", "<main>" + script % image))
    measured = measure(poisoned, 390, "light", tmp_path)
    assert measured["scripts"] == 1 and len(measured["pictures"]) == len(pictures(page)) + 1
