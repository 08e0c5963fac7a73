"""The page that several commands end with."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from streamline_hooks.cli.command_line import command_line


def write_page(folder: Path, title: str, **said: Any) -> str:
    """Write a page of what was measured, and say where it is, or that there is none and why."""
    if find_spec("matplotlib") is None:
        return 'There is no page, which matplotlib draws: pip install "streamline_hooks[report]".'
    from streamline_hooks.report import write_report

    return f"a page of it: {write_report(folder, command=command_line(), title=title, **said)}"
