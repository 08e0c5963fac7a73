"""What a section is made of beside figures: tables, text, generations side by side, commands, key numbers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Protocol


class Part(Protocol):
    """Something that can be written as HTML."""

    def html(self) -> str:
        """Write it, with everything from outside escaped."""


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes
    ----------
    head : str
        With the unit, where there is one.
    text : bool
        Whether it holds words, which stand at the left and may be broken; numbers stand at the right.
    """

    head: str
    text: bool = False


@dataclass(frozen=True)
class Table:
    """A table under its title, that scrolls in its own box where it is too wide.

    Attributes
    ----------
    title : str
    columns : sequence of Column
    rows : sequence of sequence of str
        One cell a column; the first names the row. Without a head in any column there is no line of heads.
    strong : int or None
        A row to stand out.
    note : str
        Under the title.

    Examples
    --------
    >>> table = Table("Sizes", [Column("model", text=True), Column("MB")], [["<a>", "3.5"]])
    >>> "<td>3.5</td>" in table.html(), "&lt;a&gt;" in table.html()
    (True, True)
    """

    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[str]]
    strong: int | None = None
    note: str = ""

    def html(self) -> str:
        """Write it."""
        heads = "".join(f'<th scope="col"{_kind(column)}>{escape(column.head)}</th>' for column in self.columns)
        lines = []
        for k, row in enumerate(self.rows):
            first, *others = (_breakable(cell) for cell in row)
            cells = "".join(
                f"<td{_kind(column)}>{cell}</td>" for column, cell in zip(self.columns[1:], others, strict=True)
            )
            lines.append(f'<tr{_STRONG if k == self.strong else ""}><th scope="row">{first}</th>{cells}</tr>')
        return "\n".join(
            [
                f'<div class="{"slim table" if len(self.columns) <= _SLIM else "table"}">',
                f"<h3>{escape(self.title)}</h3>",
                *([f"<p>{escape(self.note)}</p>"] if self.note else []),
                f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(self.title)}">',
                "<table>",
                *([f"<thead><tr>{heads}</tr></thead>"] if any(column.head for column in self.columns) else []),
                "<tbody>",
                *lines,
                "</tbody>\n</table>\n</div>\n</div>",
            ]
        )


_STRONG = ' class="strong"'
_SLIM = 4  # columns up to which a table is no wider than it must be


def _breakable(cell: str) -> str:
    """A cell's text, with places where a long name may go on in the next line."""
    return re.sub("(?<=[_/])(?=.)", "<wbr>", escape(cell))


def _kind(column: Column) -> str:
    return ' class="text"' if column.text else ""


@dataclass(frozen=True)
class Paragraph:
    """Some text."""

    text: str

    def html(self) -> str:
        """Write it."""
        return f"<p>{escape(self.text)}</p>"


@dataclass(frozen=True)
class Command:
    """What was typed at a terminal; a line ends before an option, and not within it where that can be helped."""

    text: str

    def html(self) -> str:
        """Write it."""
        options = [f"<span>{escape(option)}</span>" for option in re.split(r"(?<=\s)(?=-)", self.text)]
        return f'<div class="table"><pre aria-label="Command"><code>{"".join(options)}</code></pre></div>'


@dataclass(frozen=True)
class SideBySide:
    """A prompt, and what several models wrote after it.

    Attributes
    ----------
    prompt : str
    written : sequence of (str, str)
        Each model's name and text.
    """

    prompt: str
    written: Sequence[tuple[str, str]]

    def html(self) -> str:
        """Write it."""
        texts = [
            f'<div><h3>{escape(name)}</h3><p class="written" dir="auto">{escape(text)}</p></div>'
            for name, text in self.written
        ]
        return "\n".join(
            [
                '<article class="sample">',
                f'<p class="prompt written" dir="auto">{escape(self.prompt)}</p>',
                '<div class="beside">',
                *texts,
                "</div>\n</article>",
            ]
        )


@dataclass(frozen=True)
class KeyNumber:
    """A number that the page opens with.

    Attributes
    ----------
    name, value, detail : str
    """

    name: str
    value: str
    detail: str = ""


@dataclass(frozen=True)
class KeyNumbers:
    """The row of numbers that the page opens with."""

    numbers: Sequence[KeyNumber]

    def html(self) -> str:
        """Write it."""
        cards = [
            f"<div><dt>{escape(n.name)}</dt><dd><strong>{escape(n.value)}</strong>"
            + (f"<span>{escape(n.detail)}</span>" if n.detail else "")
            + "</dd></div>"
            for n in self.numbers
        ]
        return "\n".join(['<dl class="numbers">', *cards, "</dl>"])
