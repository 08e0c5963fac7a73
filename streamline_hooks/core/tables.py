"""Format plain-text tables."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Iterable, Sequence

_NUMBER = re.compile(r"[-+]?\d[\d,]*(\.\d+)?(e[-+]?\d+)?( ?%| [kMG]?B)?( ± \d[\d.]*)?|-|")


def table(rows: Iterable[Sequence[object]], columns: Sequence[str] = ()) -> str:
    """Format rows as a plain-text table without a trailing newline.

    Columns of numbers are right-aligned. Long text wraps at the width of a terminal; if the output is not a terminal,
    every row is one line.

    Parameters
    ----------
    rows : iterable of sequence
        Cells, converted with `str`; None is an empty cell.
    columns : sequence of str
        Headings. By default the table has none.

    Returns
    -------
    str

    Examples
    --------
    >>> print(table([["copa", 0.75, None], ["arc_easy", "12.5", "not measured"]], ["task", "accuracy", "note"]))
    task      accuracy  note
    copa          0.75
    arc_easy      12.5  not measured
    """
    from rich.console import Console
    from rich.measure import Measurement
    from rich.table import Table
    from rich.text import Text

    cells = [[_printable("" if cell is None else str(cell)) for cell in row] for row in rows]
    grid = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=bool(columns))
    names = columns or [""] * max(map(len, cells), default=0)
    for k, name in enumerate(names):
        is_number = all(_NUMBER.fullmatch(row[k]) for row in cells if k < len(row))
        grid.add_column(Text(name), justify="right" if is_number and cells else "left", overflow="fold")
    for row in cells:
        grid.add_row(*map(Text, row))  # as Text, so that rich does not read brackets as markup
    console = Console(
        file=io.StringIO(), color_system=None, force_terminal=False, force_jupyter=False, width=1_000_000, _environ={}
    )
    if sys.stdout.isatty():
        console.width = max(Console().width, Measurement.get(console, console.options, grid).minimum)
    with console.capture() as capture:
        console.print(grid)
    return "\n".join(line.rstrip() for line in capture.get().rstrip("\n").split("\n"))


def _printable(text: str) -> str:
    return "".join(character if character.isprintable() else " " for character in text)
