"""Short pieces of the held-out text: some whose last word is asked for, and some that are begun to be written on.

Of all domains but WikiText, whose blanks around each mark nobody writes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.last_words import LastWord

LEAST, MOST = 64, 128  # tokens of a piece with its last word
BEGUN = (24, 32)  # tokens of a beginning
_END = re.compile(r"(?<=[a-z]{4}[.!?])\s+")  # four letters: not the dot of an abbreviation
_LAST = re.compile(r"(.+\s)([A-Za-z]{4,})[.!?]", re.DOTALL)


def last_words(data: Path, tokenizer: Any, count: int, seed: int) -> list[LastWord]:
    """Pieces of whole sentences without the full stop, as many of each domain as there are."""
    found = {
        name: [piece for text in texts for piece in _pieces(text, tokenizer, name)]
        for name, texts in _paragraphs(data).items()
    }
    return _dealt(found, count, f"{seed} last words")


def beginnings(data: Path, tokenizer: Any, count: int, seed: int) -> list[str]:
    """The first words of paragraphs, as many of each domain as there are."""
    found = {
        name: [begun for text in texts if (begun := _beginning(text, tokenizer))]
        for name, texts in _paragraphs(data).items()
    }
    return _dealt(found, count, f"{seed} beginnings")


def _paragraphs(data: Path) -> dict[str, list[str]]:
    """Of each domain, without headings."""
    found = {}
    for path in sorted((data / "text" / "heldout").glob("*.txt")):
        if path.stem.startswith("wikitext"):
            continue
        texts = (" ".join(text.split()) for text in re.split(r"\n\s*\n", path.read_text(encoding="utf-8")))
        found[path.stem] = [text for text in texts if text and not text.startswith("=")]
    if not found:
        raise SystemExit(f"There is no held-out text in {data / 'text' / 'heldout'}; expected domains as *.txt.")
    return found


def _pieces(text: str, tokenizer: Any, name: str) -> Iterator[LastWord]:
    held: list[str] = []
    for sentence in _END.split(text):
        held.append(sentence)
        piece = " ".join(held)
        tokens = _count(piece, tokenizer)
        if tokens < LEAST:
            continue
        ends = _LAST.fullmatch(piece)
        if tokens <= MOST and ends:
            yield LastWord(ends[1].rstrip(), ends[2], name)
        held = []


def _beginning(text: str, tokenizer: Any) -> str:
    words: list[str] = []
    for word in text.split():
        words.append(word)
        if len(words) * 6 >= BEGUN[0] and (tokens := _count(" ".join(words), tokenizer)) >= BEGUN[0]:
            return " ".join(words) if tokens <= BEGUN[1] else ""
    return ""


def _count(text: str, tokenizer: Any) -> int:
    return len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _dealt(found: dict[str, list[Any]], count: int, seed: str) -> list[Any]:
    """A seeded subset, one of each domain in turn for as long as it has some."""
    if empty := [name for name, several in found.items() if not several]:
        raise SystemExit(f"The held-out text {empty[0]} has no piece of the length that is asked for.")
    shuffled = [Random(f"{seed} {name}").sample(several, len(several)) for name, several in found.items()]
    turns = [one for turn in zip_longest(*shuffled) for one in turn if one is not None]
    if len(turns) < count:
        raise SystemExit(f"The held-out text has {len(turns)} pieces of the length that is asked for; {count} needed.")
    return turns[:count]
