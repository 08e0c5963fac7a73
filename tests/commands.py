"""The command line, run in this process."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from streamline_hooks import cli


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
