"""A page in headless Chromium: what it measures there, and how it looks."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from html import escape, unescape
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
SCHEMES = {"dark": 0, "light": 1}  # as Chromium numbers them
LEAST = 500  # CSS pixels: no window of Chromium is narrower, so that a phone is a frame in one

# The page stands in a frame of the wanted width, which shares this page's origin and can be measured from it.
HARNESS = """<!doctype html><html><head><meta charset="utf-8"><meta name="color-scheme" content="light dark">
<style>:root {{ color-scheme: light dark }} body {{ margin: 0 }} iframe {{ border: 0; display: block }}</style></head>
<body><iframe id="page" width="{width}" height="{height}" srcdoc="{page}"></iframe><pre id="measured"></pre>
<script>
addEventListener("load", () => {{
  const page = document.getElementById("page").contentDocument, view = page.defaultView;
  const inside = element => element.closest(".scroll, svg") !== null;
  const right = element => element.getBoundingClientRect().right;
  const wide = [...page.body.querySelectorAll("*")].filter(e => !inside(e) && right(e) > view.innerWidth + 0.5);
  const boxes = [...page.querySelectorAll("th, td, p, h1, h2, h3, dt, dd, figcaption, pre, article, figure")];
  const loaded = view.performance.getEntriesByType("resource").map(e => e.name.slice(0, 40));
  document.getElementById("measured").textContent = JSON.stringify({{
    innerWidth: view.innerWidth, scrollWidth: page.documentElement.scrollWidth,
    bodyWidth: page.body.scrollWidth, height: page.documentElement.scrollHeight,
    dark: view.matchMedia("(prefers-color-scheme: dark)").matches,
    background: view.getComputedStyle(page.body).backgroundColor,
    tooWide: wide.map(e => e.tagName + "." + e.className),
    figures: [...page.querySelectorAll("figure > svg")].map(e => ({{shown: e.getClientRects().length > 0,
      kind: e.getAttribute("class"), width: e.getBoundingClientRect().width,
      ink: view.getComputedStyle(e).getPropertyValue("--ink").trim()}})),
    scripts: page.scripts.length,
    overfull: boxes.filter(e => e.scrollWidth > e.clientWidth + 1).map(e => e.textContent),
    tallest: Math.max(0, ...boxes.filter(e => e.matches("th, td")).map(e => e.getBoundingClientRect().height)),
    loaded: loaded.filter(name => !name.startsWith("data:")),
  }});
}});
</script></body></html>"""


def browser() -> str:
    """The browser's path; skips the test where there is none."""
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        reason = f"none of {', '.join(NAMES)} is installed (Debian: apt-get install chromium)"
        if os.environ.get("STREAMLINE_REQUIRE_BROWSER") == "1":
            pytest.fail(f"{reason} (STREAMLINE_REQUIRE_BROWSER=1)", pytrace=False)
        pytest.skip(reason)
    return found


def measure(page: Path, width: int, scheme: str, work: Path) -> dict[str, Any]:
    """What a page measures in a window of a width."""
    harness = _harness(page, width, 900, work)
    dom = _run([f"--window-size={max(width, LEAST)},900", "--dump-dom", harness.as_uri()], scheme, work)
    found = re.search(r'<pre id="measured">(.*?)</pre>', dom, re.DOTALL)
    assert found and found[1], "the page was not measured"
    measured: dict[str, Any] = json.loads(unescape(found[1]))
    return measured


def screenshot(page: Path, width: int, height: int, scheme: str, work: Path) -> Path:
    """The page as it looks, cut to its width."""
    from PIL import Image

    image = work / f"{page.stem}-{width}-{scheme}.png"
    harness = _harness(page, width, height, work)
    _run(
        [f"--window-size={max(width, LEAST)},{height}", f"--screenshot={image}", harness.as_uri()],
        scheme,
        work,
    )
    with Image.open(image) as taken:
        taken.convert("RGB").crop((0, 0, width, height)).save(image)
    return image


def _harness(page: Path, width: int, height: int, work: Path) -> Path:
    file = work / f"harness-{width}.html"
    file.write_text(HARNESS.format(width=width, height=height, page=escape(page.read_text())))
    return file


def _run(options: list[str], scheme: str, work: Path) -> str:
    command = [
        browser(), "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
        "--disable-extensions", "--hide-scrollbars", "--disable-background-networking", "--force-device-scale-factor=1",
        f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}", f"--user-data-dir={work / 'profile'}",
        "--virtual-time-budget=20000", *options,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout
