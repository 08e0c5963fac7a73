"""Reading a page back: its tags, whether they are balanced, its text and its tables."""

from __future__ import annotations

from html.parser import HTMLParser

VOID = {"meta", "img", "source", "br", "hr", "wbr", "link", "input"}


class Reader(HTMLParser):
    """A page, read strictly."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.texts: list[tuple[str, str]] = []  # the innermost tag, and what stands in it
        self._open: list[str] = []
        self._title = ""
        self.feed(page)
        self.close()
        assert self._open == [], f"left open: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"an attribute of {tag} comes twice"
        self.tags.append((tag, dict(attrs)))
        if tag in VOID:
            return
        self._open.append(tag)
        if tag == "caption":
            self._title = ""
        elif tag == "tbody":
            self.tables.setdefault(self._title, [])
        elif tag == "tr":
            self.tables.setdefault(self._title, []).append([])
        elif tag in ("th", "td"):
            self.tables[self._title][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open and self._open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        inside = self._open[-1] if self._open else ""
        self.texts.append((inside, data))
        if inside == "caption":
            self._title += data
        elif inside in ("th", "td"):
            self.tables[self._title][-1][-1] += data

    @property
    def text(self) -> str:
        """What a reader sees."""
        return " ".join(data for tag, data in self.texts if tag not in ("style", "title", "desc"))

    def headings(self) -> list[str]:
        return [data for tag, data in self.texts if tag == "h2"]

    def ids(self) -> list[str]:
        return [str(attributes["id"]) for _, attributes in self.tags if "id" in attributes]
