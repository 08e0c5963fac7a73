"""Terminal tables: aligned, complete when piped, without control characters, wrapped in a terminal."""

from __future__ import annotations

import sys

import pytest

from streamline_hooks.core.tables import table

ROWS = [["copa", 0.75, None], ["[bold]arc_easy :smile:", "12.5", "not measured " * 30]]


def test_a_piped_table_is_one_line_a_row_whatever_its_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setenv("FORCE_COLOR", "1")
    lines = table(ROWS, ["task", "accuracy", "note"]).split("\n")
    assert lines == [
        "task                    accuracy  note",
        "copa                        0.75",
        f"[bold]arc_easy :smile:      12.5  {ROWS[1][2]}".rstrip(),
    ]
    assert table([["a", "1.0"], ["b", "-"], ["c", "30 %"]]) == "a   1.0\nb     -\nc  30 %"
    assert table([["a", "1"], ["b", "2-3"]], ["x", "blocks"]) == "x  blocks\na  1\nb  2-3"
    assert table([], ["a", "b"]) == "a  b"


def test_a_terminal_wraps_long_text_and_loses_none_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "60")
    found = table(ROWS, ["task", "accuracy", "note"])
    assert all(len(line) <= 60 for line in found.split("\n")) and found.count("measured") == 30
    long = [["x" * 80, "1" * 80]]  # as wide as it must be
    assert "".join(table(long).split()) == "x" * 80 + "1" * 80


def test_control_characters_of_a_name_do_not_reach_the_terminal() -> None:
    assert table([["a\x1b[31m\nb\x07", "\ud800"]]).isprintable()
