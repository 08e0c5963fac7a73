"""The command line, run in this process."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import pytest

from streamline_hooks import cli


def without_repeated(defaults: Sequence[Any], options: Sequence[Any]) -> list[Any]:
    """Return options and their defaults, which are pairs of a flag and a value, without the defaults that are given."""
    pairs = zip(defaults[::2], defaults[1::2], strict=True)
    return [item for flag, value in pairs if flag not in options for item in (flag, value)] + list(options)


def run(
    arguments: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[int, str, str]:
    """Exit code, and what was printed to either stream."""
    monkeypatch.setattr(sys, "argv", ["streamline-hooks", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
        raise SystemExit(0)
    printed = capsys.readouterr()
    return int(stopped.value.code or 0), printed.out, printed.err
