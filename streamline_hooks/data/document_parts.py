"""Split shuffled documents into parts: whole documents if there are enough, otherwise pieces of documents."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, islice
from typing import TYPE_CHECKING

from streamline_hooks.core import StreamlineError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SEPARATOR = "\n\n"
_BLANK_LINES = re.compile(r"\n\s*\n")
_MIN_COPY_CHARACTERS = 80  # a shorter paragraph that occurs twice may be a heading and is not treated as a copy
_DOCUMENTS_PER_PART = 4  # the minimum
_SUFFICIENT_FILL = 0.75  # documents are not cut finer if this share of the possible tokens is reached


class Encoder:
    """Tokenize each text once, and only the beginning of a very long text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, separator: str = _SEPARATOR) -> None:
        self.tokenizer = tokenizer
        self.separator = separator
        self._known: dict[str, list[int]] = {}

    def __call__(self, text: str, limit: int | None = None) -> list[int]:
        """Return the token ids of the text and the separator after it, truncated to ``limit`` ids."""
        if limit is not None and text not in self._known and len(text) > 16 * limit:
            start = self._encode(text[: 16 * limit])
            # The cut may split a word. With twice as many ids as needed, that word is beyond the ids returned.
            if len(start) >= 2 * limit:
                return start[:limit]
        if text not in self._known:
            self._known[text] = self._encode(text + self.separator)
        return self._known[text][:limit]

    def characters_per_token(self, texts: Iterable[str]) -> float:
        """Estimate the characters per token from the first characters of a few texts."""
        sample = _SEPARATOR.join(text[:2_000] for text in islice(texts, 20))
        return max(1, len(sample)) / max(1, len(self._encode(sample)))

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def fill_parts(
    documents: list[str],
    sizes: dict[str, int],
    encode: Encoder,
    length: int,
    seed: int,
    forbidden: frozenset[str] = frozenset(),
    *,
    intact: bool = False,
) -> tuple[dict[str, list[int]], list[str]]:
    """Fill parts from whole documents, or from pieces of documents; shrink the parts if there is too little text.

    `documents` are in the order of `hash_shuffle`; `sizes` are in tokens, in the order of filling; `seed` determines
    the order of the pieces. No part contains a paragraph of `forbidden`. With `intact`, no document is cut and no
    paragraph is removed. Return the token ids of each part, and notes on deviations from the requested sizes. Raise if
    the text does not fill one sequence of each part.
    """
    requested = [size // length for size in sizes.values()]
    rate = encode.characters_per_token(documents)
    coarse = min(4.0, max(1.0, min(requested) / _DOCUMENTS_PER_PART))
    best: list[list[int]] = []
    available, cut = 0, False
    # The finest cut is for text that hardly fills one sequence of each part.
    for sequences in (None,) if intact else (None, coarse, 0.25):
        units, in_pieces = documents, False
        if sequences is not None:
            units, in_pieces = _cut_into_pieces(documents, forbidden, max(1, int(sequences * length * rate)), seed)
        available = int(sum(map(len, units)) / rate)
        possible = min(sum(requested), available // length)
        scarce = possible < sum(requested)
        for counts in _shrinking_counts(requested, possible if scarce or sequences or intact else 0):
            if sum(counts) * length <= sum(map(len, best)):
                break
            if filled := _fill_in_order(
                units, counts, forbidden, encode, length, whole=sequences is None, intact=intact
            ):
                best, cut = [list(chain.from_iterable(part)) for part in filled], in_pieces
                break
        if sum(map(len, best)) >= possible * length * (_SUFFICIENT_FILL if scarce or sequences else 1):
            break
    if not best:
        number = f"{len(documents):,} document{'s' * (len(documents) != 1)}"
        raise StreamlineError(
            f"The text has about {available:,} usable tokens (in {number}). Expected at least one sequence of "
            f"{length:,} tokens for each of {' and '.join(sizes)}: {len(sizes) * length:,} tokens, and slightly more "
            "because documents are truncated. Give more text, or a smaller --sequence-length."
        )
    notes = []
    if cut and len(sizes) > 1:
        notes.append(
            f"too few documents to fill {' and '.join(sizes)} with whole documents: they were cut into pieces, so two "
            "parts may contain pieces of one document"
        )
    if len(best[0]) < requested[0] * length or sum(map(len, best)) < sum(requested) * length:
        reached = ", ".join(f"{name} {len(ids):,}" for name, ids in zip(sizes, best, strict=True))
        wanted = ", ".join(f"{name} {size:,}" for name, size in sizes.items())
        notes.append(f"the text has about {available:,} tokens: {wanted} were requested and shrunk to {reached}")
    return dict(zip(sizes, best, strict=True)), notes


def fill_parts_with_whole_documents(
    documents: list[str], sizes: Mapping[str, int], encode: Encoder, length: int
) -> dict[str, list[list[int]]]:
    """Fill parts in order from whole documents, and return the token ids of each document, by part.

    A document contributes at most a quarter of its part, or one sequence if that is more. Raise if there are too few
    documents.
    """
    filled = _fill_in_order(
        documents, [size // length for size in sizes.values()], frozenset(), encode, length, whole=True
    )
    if filled is None:
        available = int(sum(map(len, documents)) / encode.characters_per_token(documents))
        wanted = ", ".join(f"{name} {size:,}" for name, size in sizes.items())
        raise StreamlineError(
            f"{wanted} tokens were requested, and the text has about {available:,} tokens in {len(documents):,} "
            f"documents. Expected enough whole documents: each contributes at most {length:,} tokens or a quarter of "
            "its part, and no document is in two parts. Give more documents, split long documents, or request fewer "
            "tokens."
        )
    return dict(zip(sizes, filled, strict=True))


def check_counts(counts: Mapping[str, int], what: str, batch_size: int) -> None:
    """Raise unless the part sizes and the batch size are positive; ``what`` is the unit in the plural."""
    if not counts:
        raise StreamlineError(
            f'No part was requested. Expected a number of {what} for each part, such as {{"calibration": 128}}.'
        )
    for name, count in counts.items():
        if count < 1:
            raise StreamlineError(
                f"{count} {what} were requested for the part {name!r}. Expected at least 1. Omit the part, or request "
                "more."
            )
    check_batch_size(batch_size, what)


def check_batch_size(batch_size: int, what: str) -> None:
    """Raise unless the batch size is positive."""
    if batch_size < 1:
        raise StreamlineError(f"batch_size={batch_size} is invalid. Expected 1 or more {what} per batch.")


def _shrinking_counts(requested: list[int], possible: int) -> Iterator[list[int]]:
    """Yield the requested number of sequences of each part, then ever fewer in the same ratio."""
    yield requested
    previous, total = requested, min(possible, sum(requested) - 1)
    while total >= len(requested):
        counts = [max(1, count * total // sum(requested)) for count in requested]
        if counts != previous:
            yield counts
        previous, total = counts, min(total - 1, int(total * 0.97))


def _fill_in_order(
    units: list[str],
    counts: list[int],
    forbidden: frozenset[str],
    encode: Encoder,
    length: int,
    whole: bool,
    intact: bool = False,
) -> list[list[list[int]]] | None:
    """Fill the parts in order with the token ids of each text; return None if there are too few texts."""
    remaining = iter(units)
    seen = set(forbidden)
    filled = []
    for count in counts:
        quota = count * length
        share = max(length, quota // _DOCUMENTS_PER_PART) if whole else quota
        part: list[list[int]] = []
        missing = quota
        copies: set[str] = set()
        while missing > 0:
            if (unit := next(remaining, None)) is None:
                return None
            text = unit if intact else _remove_paragraphs(unit, seen)
            copies.update(long_paragraphs(text))
            if text and (ids := encode(text, min(share, missing))):
                part.append(ids)
                missing -= len(ids)
        seen |= copies
        filled.append(part)
    return filled


def _cut_into_pieces(documents: list[str], forbidden: frozenset[str], target: int, seed: int) -> tuple[list[str], bool]:
    """Cut documents at paragraphs into pieces of about ``target`` characters; return whether any document was cut.

    Each long paragraph is used in one piece only.
    """
    seen = set(forbidden)
    pieces: list[str] = []
    cut = False
    for document in documents:
        current: list[str] = []
        size = 0
        for paragraph in map(str.strip, _BLANK_LINES.split(document)):
            if len(paragraph) >= _MIN_COPY_CHARACTERS:
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
    return hash_shuffle(pieces, seed), cut


def _chunks(paragraph: str, target: int) -> Iterator[str]:
    """Cut a paragraph longer than ``target`` characters at the ends of lines or words."""
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
    """Yield the paragraphs of at least 80 characters, which are treated as copies if they occur twice."""
    for paragraph in _BLANK_LINES.split(text):
        if len(stripped := paragraph.strip()) >= _MIN_COPY_CHARACTERS:
            yield stripped


def _remove_paragraphs(text: str, seen: set[str]) -> str:
    """Return the text without the paragraphs in ``seen``; unchanged if it contains none of them."""
    if seen.isdisjoint(long_paragraphs(text)):
        return text
    return _SEPARATOR.join(part for part in _BLANK_LINES.split(text) if part.strip() not in seen).strip()


def hash_shuffle(texts: Iterable[str], seed: int) -> list[str]:
    """Sort texts by a hash of seed and content, and drop empty and repeated texts."""
    return sort_by_hash((stripped for text in texts if (stripped := text.strip())), seed)


def sort_by_hash(texts: Iterable[str], seed: int) -> list[str]:
    """Sort texts by a hash of seed and content, and drop repeated texts."""
    return sorted(set(texts), key=lambda text: hashlib.sha256(f"{seed}\n{text}".encode()).digest())
