"""The page that several commands end with."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import typer

from streamline_hooks.cli.command_line import command_line


def write_page(folder: Path, title: str, **said: Any) -> str:
    """Write the page of a command, and return a line that names it.

    Call it after the results were printed. A page that cannot be written is a warning on stderr with its reason.
    """
    if find_spec("jinja2") is None or find_spec("matplotlib") is None:
        return 'No page was written; it needs an extra: pip install "streamline_hooks[report]".'
    try:
        from streamline_hooks.report import write_report

        return f"a page of it: {write_report(folder, command=command_line(), title=title, **said)}"
    except Exception as error:  # whatever a broken matplotlib raises: no page is worth a result
        typer.echo(
            f"warning: the page in {folder} was not written: {type(error).__name__}: {error} The results are complete.",
            err=True,
        )
        return "There is no page."
