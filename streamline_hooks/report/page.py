"""The page: put together from JSON values, and written with its figures, whole or not at all."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from html import escape
from pathlib import Path
from typing import Any

from streamline_hooks.checkpoint.checksums import update_checksums
from streamline_hooks.core.files import atomic_file
from streamline_hooks.errors import StreamlineError
from streamline_hooks.report.drawing import Drawing
from streamline_hooks.report.sections import Section, key_numbers, sections
from streamline_hooks.report.style import STYLE_SHEET

PAGE = "report.html"
FIGURES = "figures"
# Names that an earlier report may have left, of figures that this one lacks.
NAMES = (
    "similarity", "influence", "candidates", "training", "perplexity_by_step", "perplexity", "accuracy", "speed",
    "front",
)  # fmt: skip
_FOOTER = "<footer>Made by streamline_hooks.</footer>"
# Nothing is loaded and nothing is run, even if something from outside got through.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_UNWRITABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")


def write_report(
    folder: Path,
    *,
    compression: Mapping[str, Any] | None = None,
    evaluation: Mapping[str, Any] | None = None,
    sweep: Mapping[str, Any] | None = None,
    command: str,
    title: str,
) -> Path:
    """Write one self-contained HTML page, and each of its figures as SVG and as PNG.

    The page loads nothing and runs nothing; it follows the reader's light or dark scheme and the width of the window.
    What is missing in the values is left out whole. The same values give the same bytes.

    Parameters
    ----------
    folder : Path
        Made where it is not there. ``report.html`` goes into it, and ``figures/NAME.svg`` and ``figures/NAME.png``.
    compression : mapping, optional
        `CompressionResult.report`, or the same read from a JSON file.
    evaluation : mapping, optional
        What was measured of a model, and under ``original`` the same of the one that it is compared with.
    sweep : mapping, optional
        ``points`` of several compressions.
    command : str
        That made it.
    title : str

    Returns
    -------
    Path
        Of the page.

    Raises
    ------
    StreamlineError
        If there is nothing to tell, matplotlib is not installed, or the files cannot be written; a page that was there
        before is untouched then. If there are files of these names that this library did not write.

    Examples
    --------
    >>> import tempfile
    >>> said = {"perplexity": {"original": 10.0, "removed": 40.0, "repaired": 15.0}}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     page = write_report(Path(folder), compression=said, command="streamline-hooks ...", title="A model")
    ...     page.name, sorted(file.name for file in (page.parent / "figures").iterdir())
    ('report.html', ['perplexity_by_step.png', 'perplexity_by_step.svg'])
    """
    found = sections(compression or {}, evaluation or {}, sweep or {}, command)
    if not (compression or evaluation or sweep):
        raise StreamlineError(
            "There is nothing to report: compression, evaluation and sweep are all empty. Give one of them at least, "
            "for instance the values of a report.json."
        )
    numbers = key_numbers(compression or {}, evaluation or {})
    head = _compared(evaluation or {})
    page = _html(title, head, numbers.html() if numbers.numbers else "", found)
    drawings = [part for section in found for part in section.parts if isinstance(part, Drawing)]
    files: dict[Path, bytes] = {}
    for drawing in drawings:
        files[Path(FIGURES, f"{drawing.name}.svg")] = drawing.svg
        files[Path(FIGURES, f"{drawing.name}.png")] = drawing.png
    files[Path(PAGE)] = page.encode()
    _write(Path(folder), files)
    update_checksums(Path(folder))  # of a model's folder, which lists all of its files
    return Path(folder) / PAGE


def _compared(evaluation: Mapping[str, Any]) -> str:
    """Which models the page is about."""
    model, reference = evaluation.get("model"), evaluation.get("reference")
    if not model:
        return ""
    return f"{model}, compared with {reference}" if reference else str(model)


def _html(title: str, subtitle: str, numbers: str, found: Sequence[Section]) -> str:
    links = "".join(f'<li><a href="#{section.anchor}">{escape(section.title)}</a></li>' for section in found)
    lines = [
        "<!doctype html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark">',
        f"<title>{escape(title)}</title>",
        f"<style>\n{STYLE_SHEET}</style>",
        "</head>",
        "<body>",
        "<header>",
        f"<h1>{escape(title)}</h1>",
        *([f"<p>{escape(subtitle)}</p>"] if subtitle else []),
        *([numbers] if numbers else []),
        f'<nav aria-label="Sections"><ul>{links}</ul></nav>',
        "</header>",
        "<main>",
    ]
    for section in found:
        lines += [f'<section id="{section.anchor}">', f"<h2>{escape(section.title)}</h2>"]
        lines += [part.html() for part in section.parts]
        lines.append("</section>")
    lines += ["</main>", _FOOTER, "</body>", "</html>", ""]
    return _UNWRITABLE.sub("\ufffd", "\n".join(lines))


def _write(folder: Path, files: Mapping[Path, bytes]) -> None:
    """Write all files before moving any, the page first, which shows its figures without the others.

    Figures that only an earlier page had are removed. The names of its figures tell which files are this library's.
    """
    earlier = _earlier_figures(folder)
    for name in files:
        if name != Path(PAGE) and name.stem not in earlier and (folder / name).exists():
            raise StreamlineError(
                f"{folder / name} belongs to no report of this library and is not replaced. Move it elsewhere, or "
                "choose another folder."
            )
    with ExitStack() as moves:  # in reverse order
        for name, content in files.items():
            moves.enter_context(atomic_file(folder / name)).write_bytes(content)
    for name in {Path(FIGURES, f"{figure}.{ending}") for figure in earlier for ending in ("svg", "png")} - set(files):
        (folder / name).unlink(missing_ok=True)


def _earlier_figures(folder: Path) -> set[str]:
    """Return the names of the figures of the page that is in a folder.

    Raises
    ------
    StreamlineError
        If the page is not one that this library wrote.
    """
    page = folder / PAGE
    if not page.is_file():
        return set()
    text = page.read_text(encoding="utf-8", errors="replace")
    if _FOOTER not in text:
        raise StreamlineError(
            f"{page} was not written by this library and is not replaced. Move it elsewhere, or choose another folder."
        )
    return {name for name in NAMES if f'id="figure-{name}"' in text}
