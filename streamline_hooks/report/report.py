"""Write the page."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from streamline_hooks.checkpoint.checksums import update_checksums
from streamline_hooks.core.files import atomic_file
from streamline_hooks.errors import StreamlineError

PAGE = "report.html"
_FOOTER = "<footer>Made by streamline_hooks.</footer>"  # by which a page of ours is recognised
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
    """Write one self-contained HTML page.

    The page loads nothing and runs no script; it follows the reader's light or dark scheme and the width of the
    window. Values that are missing are left out. The same values give the same bytes.

    Parameters
    ----------
    folder : Path
        Created if it does not exist; the page is ``report.html`` in it.
    compression : mapping, optional
        `CompressionResult.report`, or the content of a ``report.json``.
    evaluation : mapping, optional
        `Evaluation.report`, or the content of an ``evaluation.json``.
    sweep : mapping, optional
        `Sweep.report`.
    command : str
        The command that repeats the run.
    title : str

    Returns
    -------
    Path
        Of the page.

    Raises
    ------
    StreamlineError
        If all reports are empty, jinja2 or matplotlib is not installed, the folder has a ``report.html`` that this
        library did not write, or the file cannot be written. An existing page is untouched then.

    Examples
    --------
    >>> import tempfile
    >>> report = {"perplexity": {"original": 10.0, "removed": 40.0, "repaired": 15.0}}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     page = write_report(Path(folder), compression=report, command="streamline-hooks ...", title="A model")
    ...     page.name, "Perplexity by step" in page.read_text()
    ('report.html', True)
    """
    try:
        import jinja2
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise StreamlineError(
            f'The page needs {error.name}, which is not installed: pip install "streamline_hooks[report]".'
        ) from error
    from streamline_hooks.report.figures import WIDTHS
    from streamline_hooks.report.sections import key_numbers, sections

    if not (compression or evaluation or sweep):
        raise StreamlineError(
            "There is nothing to report: compression, evaluation and sweep are all empty. Give at least one of them, "
            "for instance the content of a report.json."
        )
    compression, evaluation, sweep = compression or {}, evaluation or {}, sweep or {}
    page = Path(folder) / PAGE
    if page.is_file() and _FOOTER not in page.read_text(encoding="utf-8", errors="replace"):
        raise StreamlineError(
            f"{page} was not written by this library and is not replaced. Move it elsewhere, or choose another folder."
        )
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True,
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    text = environment.get_template("report.html.jinja").render(
        title=title, model=evaluation.get("model"), reference=evaluation.get("reference"),
        key_numbers=key_numbers(compression, evaluation), sections=sections(compression, evaluation, sweep, command),
        widths=WIDTHS, footer=_FOOTER,
    )  # fmt: skip
    with atomic_file(page) as file:
        file.write_text(_UNWRITABLE.sub("\ufffd", text), encoding="utf-8")
    update_checksums(page.parent)  # lists every file of a model's folder
    return page
