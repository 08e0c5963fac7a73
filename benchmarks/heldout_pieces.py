"""Short pieces of the held-out text: contexts with a last word to predict, and beginnings to continue.

All domains are used except WikiText, which has spaces around punctuation.
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
    """Return pieces of whole sentences, split before the last word, balanced over the domains."""
    pieces = {
        name: [piece for text in paragraphs_of_domain for piece in _pieces(text, tokenizer, name)]
        for name, paragraphs_of_domain in paragraphs(data).items()
    }
    return _draw_in_turn(pieces, count, f"{seed} last words")


def beginnings(data: Path, tokenizer: Any, count: int, seed: int) -> list[str]:
    """Return the first words of paragraphs, balanced over the domains."""
    pieces = {
        name: [begun for text in texts if (begun := _beginning(text, tokenizer))]
        for name, texts in paragraphs(data).items()
    }
    return _draw_in_turn(pieces, count, f"{seed} beginnings")


def paragraphs(data: Path) -> dict[str, list[str]]:
    """Return the paragraphs of each domain, without headings."""
    by_domain = {}
    for path in sorted((data / "text" / "heldout").glob("*.txt")):
        if path.stem.startswith("wikitext"):
            continue
        texts = (" ".join(text.split()) for text in re.split(r"\n\s*\n", path.read_text(encoding="utf-8")))
        by_domain[path.stem] = [text for text in texts if text and not text.startswith("=")]
    if not by_domain:
        raise SystemExit(f"There is no held-out text in {data / 'text' / 'heldout'}. Expected domains as *.txt.")
    return by_domain


def _pieces(text: str, tokenizer: Any, name: str) -> Iterator[LastWord]:
    sentences: list[str] = []
    for sentence in _END.split(text):
        sentences.append(sentence)
        piece = " ".join(sentences)
        tokens = _count(piece, tokenizer)
        if tokens < LEAST:
            continue
        match = _LAST.fullmatch(piece)
        if tokens <= MOST and match:
            yield LastWord(match[1].rstrip(), match[2], name)
        sentences = []


def _beginning(text: str, tokenizer: Any) -> str:
    words: list[str] = []
    for word in text.split():
        words.append(word)
        if len(words) * 6 >= BEGUN[0] and (tokens := _count(" ".join(words), tokenizer)) >= BEGUN[0]:
            return " ".join(words) if tokens <= BEGUN[1] else ""
    return ""


def _count(text: str, tokenizer: Any) -> int:
    return len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _draw_in_turn(pieces: dict[str, list[Any]], count: int, seed: str) -> list[Any]:
    """Return a seeded subset that takes the domains in turn."""
    if empty := [name for name, domain_pieces in pieces.items() if not domain_pieces]:
        raise SystemExit(f"The held-out text {empty[0]} has no piece of a suitable length. Use a longer text.")
    shuffled = [
        Random(f"{seed} {name}").sample(domain_pieces, len(domain_pieces)) for name, domain_pieces in pieces.items()
    ]
    turns = [piece for turn in zip_longest(*shuffled) for piece in turn if piece is not None]
    if len(turns) < count:
        raise SystemExit(
            f"The held-out text has {len(turns)} pieces of a suitable length; {count} needed. Use more text."
        )
    return turns[:count]
