"""Print the results, messages and errors of commands."""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path, PurePath
from typing import Any, TextIO


class EchoHandler(logging.Handler):
    """Print log messages without the level and the name of the logger."""

    def __init__(self, to_stderr: bool) -> None:
        super().__init__()
        self.to_stderr = to_stderr

    def emit(self, record: logging.LogRecord) -> None:
        """Print a message, warnings to stderr."""
        file = sys.stderr if self.to_stderr or record.levelno >= logging.WARNING else sys.stdout
        print_line(self.format(record), file)


def print_log(to_stderr: bool) -> None:
    """Print the log of the library, to stderr if stdout has data."""
    logger = logging.getLogger("streamline_hooks")
    logger.handlers[:] = [handler for handler in logger.handlers if not isinstance(handler, EchoHandler)]
    logger.addHandler(EchoHandler(to_stderr))
    logger.setLevel(logging.INFO)


class Printer:
    """Print results and lines on rank 0.

    With ``--json`` results are printed as JSON to stdout, and lines to stderr.
    """

    def __init__(self, as_json: bool, is_first: bool = True) -> None:
        self.as_json, self.is_first = as_json, is_first

    def __call__(self, result: Any, *, as_json: bool | None = None) -> None:
        """Print a result: its report as JSON, or its table. None is ``null`` as JSON and nothing as text."""
        if not self.is_first:
            return
        if self.as_json if as_json is None else as_json:
            print_json(None if result is None else result.report())
        elif result is not None:
            self.line(f"\n{result.table()}" if hasattr(result, "title") else result.table())

    def line(self, text: str) -> None:
        """Print a non-empty line."""
        if self.is_first and text:
            print_line(text, sys.stderr if self.as_json else sys.stdout)


def print_line(text: str, file: TextIO) -> None:
    """Print a line; discard all output if the reader closed the pipe, as ``| head`` does."""
    try:
        print(text, file=file, flush=True)
    except BrokenPipeError:
        discard_output(file)


def discard_output(file: TextIO) -> None:
    """Discard all further output to stdout or stderr."""
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), file.fileno())


def print_json(value: Any) -> None:
    """Print a value as JSON."""
    print_line(json.dumps(value, indent=2, default=str), sys.stdout)


def print_error(text: str) -> None:
    """Print an error to stderr, after the name of the program."""
    print_line(f"streamline-hooks: {text}", sys.stderr)


def _without_folders(argument: str) -> str:
    """Reduce absolute paths in an argument to their last part, so that published pages contain no local folders.

    Examples
    --------
    >>> [
    ...     _without_folders(argument)
    ...     for argument in ("--output=/data/small", "/a/code.txt:0.5,pydoc:0.5", "texts/a.txt")
    ... ]
    ['--output=small', 'code.txt:0.5,pydoc:0.5', 'texts/a.txt']
    """
    parts = re.split("([=,])", argument)
    return "".join(PurePath(part).name if PurePath(part).is_absolute() else part for part in parts)


def write_page(folder: Path, title: str, **reports: Mapping[str, Any] | None) -> str:
    """Write the report page of a command, and return a line about it; print a failure as a warning."""
    if find_spec("jinja2") is None or find_spec("matplotlib") is None:
        return 'No report page was written. It needs: pip install "streamline_hooks[report]".'
    try:
        from streamline_hooks.pipeline import write_report

        command = shlex.join([Path(sys.argv[0]).name, *map(_without_folders, sys.argv[1:])])
        return f"report page: {write_report(folder, command=command, title=title, **reports)}"
    except Exception as error:  # a broken matplotlib can raise anything; the results must not be lost
        print_line(
            f"warning: the report page in {folder} was not written: {type(error).__name__}: {error} The results are "
            "complete.",
            sys.stderr,
        )
        return "No report page was written."
