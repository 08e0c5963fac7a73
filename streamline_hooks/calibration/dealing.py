"""Split shuffled documents into parts: whole documents if there are many, pieces of them if there are few."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, islice
from typing import TYPE_CHECKING

from streamline_hooks.errors import StreamlineError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SEPARATOR = "\n\n"
_BLANK_LINES = re.compile(r"\n\s*\n")
# A paragraph of so many characters that appears twice is a copy; a shorter one may be a heading or a formula.
_COPY_LENGTH = 80
# A part is made of so many documents at least.
_DOCUMENTS_PER_PART = 4
# Text that fills this share of what could be filled is not cut finer to fill more.
_ENOUGH = 0.75


class Encoder:
    """Tokenize each text once, and only the beginning of a very long one."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, separator: str = _SEPARATOR) -> None:
        self.tokenizer = tokenizer
        self.separator = separator
        self._known: dict[str, list[int]] = {}

    def __call__(self, text: str, limit: int | None = None) -> list[int]:
        """Return the ids of the text and of the separator after it, or the first ``limit`` of them."""
        if limit is not None and text not in self._known and len(text) > 16 * limit:
            start = self._encode(text[: 16 * limit])
            # Twice as many ids as are used, so the word that the cut went through is far behind them.
            if len(start) >= 2 * limit:
                return start[:limit]
        if text not in self._known:
            self._known[text] = self._encode(text + self.separator)
        return self._known[text][:limit]

    def characters_per_token(self, texts: Iterable[str]) -> float:
        """Estimate the characters per token from the start of a few texts."""
        sample = _SEPARATOR.join(text[:2_000] for text in islice(texts, 20))
        return max(1, len(sample)) / max(1, len(self._encode(sample)))

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def deal_parts(
    documents: list[str],
    sizes: dict[str, int],
    encode: Encoder,
    length: int,
    seed: int,
    forbidden: frozenset[str] = frozenset(),
    *,
    intact: bool = False,
) -> tuple[dict[str, list[int]], list[str]]:
    """Fill parts in order from whole documents, else from pieces of them, and less if there is too little text.

    Parameters
    ----------
    documents : list of str
        In the order in which they are used, see `shuffled`.
    sizes : dict from str to int
        Tokens of each part, in the order in which they are filled.
    encode : Encoder
    length : int
        Tokens in a sequence; parts consist of full sequences.
    seed : int
        For the order of the pieces.
    forbidden : frozenset of str, optional
        Long paragraphs that no part may contain.
    intact : bool, default False
        Never cut a document or remove a paragraph from it.

    Returns
    -------
    dict from str to list of int, and list of str
        The ids of each part, and notes on what differs from what was asked for.

    Raises
    ------
    StreamlineError
        If the text does not fill one sequence of each part.
    """
    asked = [size // length for size in sizes.values()]
    rate = encode.characters_per_token(documents)
    coarse = min(4.0, max(1.0, min(asked) / _DOCUMENTS_PER_PART))
    best: list[list[int]] = []
    found, cut = 0, False
    # The last, finer cut is for text that barely fills one sequence of each part.
    for sequences in (None,) if intact else (None, coarse, 0.25):
        units, in_pieces = documents, False
        if sequences is not None:
            units, in_pieces = _cut(documents, forbidden, max(1, int(sequences * length * rate)), seed)
        found = int(sum(map(len, units)) / rate)
        possible = min(sum(asked), found // length)
        scarce = possible < sum(asked)
        for counts in _shrinking(asked, possible if scarce or sequences or intact else 0):
            if sum(counts) * length <= sum(map(len, best)):
                break
            if dealt := _deal(units, counts, forbidden, encode, length, whole=sequences is None, intact=intact):
                best, cut = [list(chain.from_iterable(part)) for part in dealt], in_pieces
                break
        if sum(map(len, best)) >= possible * length * (_ENOUGH if scarce or sequences else 1):
            break
    if not best:
        number = f"{len(documents):,} document{'s' * (len(documents) != 1)}"
        raise StreamlineError(
            f"The text holds about {found:,} tokens that can be used (in {number}). Expected at "
            f"the very least one sequence of {length:,} tokens for each of {' and '.join(sizes)}, which is "
            f"{len(sizes) * length:,} and somewhat more for what is cut off. Give more text, or a smaller "
            "--sequence-length."
        )
    notes = []
    if cut and len(sizes) > 1:
        notes.append(
            f"too few documents to fill {' and '.join(sizes)} with whole ones: cut into pieces, so two parts may hold "
            "pieces of one document"
        )
    if len(best[0]) < asked[0] * length or sum(map(len, best)) < sum(asked) * length:
        given = ", ".join(f"{name} {len(ids):,}" for name, ids in zip(sizes, best, strict=True))
        wanted = ", ".join(f"{name} {size:,}" for name, size in sizes.items())
        notes.append(f"the text holds about {found:,} tokens: {wanted} were asked for and shrunk to {given}")
    return dict(zip(sizes, best, strict=True)), notes


def deal_whole(
    documents: list[str], sizes: Mapping[str, int], encode: Encoder, length: int
) -> dict[str, list[list[int]]]:
    """Fill parts in order from whole documents, and return the ids of each document of each part.

    A document contributes at most a quarter of its part, or one sequence if that is more.

    Raises
    ------
    StreamlineError
        If there are too few documents.
    """
    dealt = _deal(documents, [size // length for size in sizes.values()], frozenset(), encode, length, whole=True)
    if dealt is None:
        found = int(sum(map(len, documents)) / encode.characters_per_token(documents))
        wanted = ", ".join(f"{name} {size:,}" for name, size in sizes.items())
        raise StreamlineError(
            f"The text holds about {found:,} tokens in {len(documents):,} documents, and {wanted} were asked for. "
            f"Expected so many from whole documents, each of which gives at most {length:,} or a quarter of its part, "
            "so that no document is in two parts. Give more documents, cut long ones at their chapters, or ask for "
            "fewer tokens."
        )
    return dict(zip(sizes, dealt, strict=True))


def check_counts(counts: Mapping[str, int], what: str, batch_size: int) -> None:
    """Raise unless the sizes of parts, and of batches, are positive; ``what`` names the unit in the plural."""
    if not counts:
        raise StreamlineError(f'No part was asked for. Expected a number of {what} by name: {{"calibration": 128}}.')
    for name, count in counts.items():
        if count < 1:
            raise StreamlineError(
                f"{count} {what} were asked for in the part {name!r}. Expected 1 or more. Leave the part out, or ask "
                "for more."
            )
    check_batch_size(batch_size, what)


def check_batch_size(batch_size: int, what: str) -> None:
    """Raise unless a batch size is positive."""
    if batch_size < 1:
        raise StreamlineError(
            f"batch_size={batch_size}: expected the number of {what} that are run at once, 1 or more."
        )


def _shrinking(asked: list[int], possible: int) -> Iterator[list[int]]:
    """Yield the sequences of each part as asked for, then fewer and fewer in the same ratio."""
    yield asked
    previous, total = asked, min(possible, sum(asked) - 1)
    while total >= len(asked):
        counts = [max(1, count * total // sum(asked)) for count in asked]
        if counts != previous:
            yield counts
        previous, total = counts, min(total - 1, int(total * 0.97))


def _deal(
    units: list[str],
    counts: list[int],
    forbidden: frozenset[str],
    encode: Encoder,
    length: int,
    whole: bool,
    intact: bool = False,
) -> list[list[list[int]]] | None:
    """Fill one part after the other with the ids of each text, or return None if the texts run out."""
    remaining = iter(units)
    seen = set(forbidden)
    dealt = []
    for count in counts:
        quota = count * length
        share = max(length, quota // _DOCUMENTS_PER_PART) if whole else quota
        part: list[list[int]] = []
        room = quota
        copies: set[str] = set()
        while room > 0:
            if (unit := next(remaining, None)) is None:
                return None
            text = unit if intact else _without(unit, seen)
            copies.update(long_paragraphs(text))
            if text and (ids := encode(text, min(share, room))):
                part.append(ids)
                room -= len(ids)
        seen |= copies
        dealt.append(part)
    return dealt


def _cut(documents: list[str], forbidden: frozenset[str], target: int, seed: int) -> tuple[list[str], bool]:
    """Cut documents at paragraphs into pieces of about ``target`` characters, and return whether any was cut.

    A long paragraph goes into one piece only, so no two pieces share one.
    """
    seen = set(forbidden)
    pieces: list[str] = []
    cut = False
    for document in documents:
        current: list[str] = []
        size = 0
        for paragraph in map(str.strip, _BLANK_LINES.split(document)):
            if len(paragraph) >= _COPY_LENGTH:
                if paragraph in seen:
                    continue
                seen.add(paragraph)
            for chunk in _chunks(paragraph, target):
                if current and size + len(chunk) > target:
                    pieces.append(_SEPARATOR.join(current))
                    current, size, cut = [], 0, True
                current.append(chunk)
                size += len(chunk)
        pieces.append(_SEPARATOR.join(current))
    return shuffled(pieces, seed), cut


def _chunks(paragraph: str, target: int) -> Iterator[str]:
    """Cut a paragraph that is longer than a piece at the end of a line or word."""
    start = 0
    while len(paragraph) - start > target:
        middle, limit = start + target // 2, start + target
        end = max(paragraph.rfind("\n", middle, limit), middle)
        if end == middle:
            end = max(paragraph.rfind(" ", middle, limit), middle)
        if end == middle:
            end = limit
        yield paragraph[start:end]
        start = end
    yield paragraph[start:]


def long_paragraphs(text: str) -> Iterator[str]:
    """Yield the paragraphs of 80 characters or more: met again, they are copies."""
    for paragraph in _BLANK_LINES.split(text):
        if len(stripped := paragraph.strip()) >= _COPY_LENGTH:
            yield stripped


def _without(text: str, seen: set[str]) -> str:
    """Return the text without the paragraphs in ``seen``, and the very same text where there are none."""
    if seen.isdisjoint(long_paragraphs(text)):
        return text
    return _SEPARATOR.join(part for part in _BLANK_LINES.split(text) if part.strip() not in seen).strip()


def shuffled(texts: Iterable[str], seed: int) -> list[str]:
    """Sort by a hash of seed and content, without empty and repeated texts."""
    return in_hash_order((stripped for text in texts if (stripped := text.strip())), seed)


def in_hash_order(texts: Iterable[str], seed: int) -> list[str]:
    """Sort by a hash of seed and content, without repeated texts."""
    return sorted(set(texts), key=lambda text: hashlib.sha256(f"{seed}\n{text}".encode()).digest())
