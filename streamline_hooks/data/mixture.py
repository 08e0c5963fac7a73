"""Mix several sources of text, with an exact share of the sequences from each source."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from streamline_hooks.core import StreamlineError
from streamline_hooks.data.document_parts import Encoder, fill_parts, hash_shuffle, long_paragraphs, sort_by_hash
from streamline_hooks.data.split import (
    PARTS,
    TokenSplit,
    check_sizes,
    recorded_source,
    rows_fingerprint,
    sources_of,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHARE_TOLERANCE = 0.002
"""Maximum deviation of the sum of the shares from 1, so that three shares of 0.333 are accepted."""


def smallest_part(shares: Mapping[str, float], sequence_length: int) -> int:
    """Return the smallest size in tokens of a part in which each source of a mixture has a sequence."""
    return math.ceil(1 / min(shares.values()) - 1e-9) * sequence_length


def sequences_by_source(
    shares: Mapping[str, float], sizes: Mapping[str, int], sequence_length: int
) -> dict[str, dict[str, int]]:
    """Return the number of sequences by part and source; raise if a source has none in a part."""
    check_sizes(sizes, sequence_length)
    wanted = {part: _apportion(shares, size // sequence_length) for part, size in sizes.items()}
    for part, counts in wanted.items():
        if scarce := [source for source, count in counts.items() if not count]:
            raise StreamlineError(
                f"{part}_tokens={sizes[part]} with sequence_length={sequence_length} is "
                f"{sizes[part] // sequence_length} sequences, and the share {shares[scarce[0]]:.6g} of {scarce[0]!r} "
                "is less than one sequence. Expected at least one sequence of each source. Request "
                f"{part}_tokens={smallest_part(shares, sequence_length)} or more, or a smaller --sequence-length."
            )
    return wanted


@dataclass(frozen=True)
class MixedSource:
    """Documents of a source, and their share of a mixture.

    Attributes
    ----------
    documents : sequence of str
    share : float
        Fraction of the sequences from this source. The shares of all sources of a mixture sum to 1.
    conversations : bool
        Whether the documents are whole conversations (`self_generated` with ``conversation=True``). Conversations are
        not cut; a conversation that contains a long paragraph of an earlier source is left out.

    Examples
    --------
    >>> MixedSource(["A document.", "Another document."], share=0.5).conversations
    False
    """

    documents: Sequence[str]
    share: float
    conversations: bool = False


def mixed_split(
    sources: Mapping[str, MixedSource],
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int = 0,
    sequence_length: int = 512,
    calibration_tokens: int = 41_000,
    validation_tokens: int = 8_192,
    test_tokens: int = 16_384,
    test_documents: Sequence[str] | None = None,
) -> TokenSplit:
    """Split several sources such that each has its share of calibration, validation and test.

    Each source is split separately, like `split_documents`. Documents and long paragraphs of a source, used or not, are
    left out of later sources, so no text is in two parts. The shares are fractions of sequences, not of documents, and
    are exact up to rounding; the sequences of all sources are interleaved. If a source has too little text, the part
    shrinks and the shares are kept.

    Parameters
    ----------
    sources : mapping of str to MixedSource
        The text and the share of each source, by name.
    tokenizer, seed, sequence_length, calibration_tokens, validation_tokens, test_tokens
        As for `split_documents`; the sizes are totals over all sources.
    test_documents : sequence of str, optional
        As for `split_documents`; the test part is then not mixed.

    Returns
    -------
    TokenSplit
        Its notes contain the number of tokens of each source.

    Raises
    ------
    StreamlineError
        If the shares do not sum to 1, a source has less than one sequence of a part, or a source has too little text.

    Examples
    --------
    Any callable that returns ``input_ids`` works; this tokenizer maps each word to its length:

    >>> def tokenizer(text, **options):
    ...     return {"input_ids": [len(word) for word in text.split()]}
    >>> sources = {
    ...     "prose": MixedSource([f"This is the document number {n}." for n in range(60)], share=0.75),
    ...     "code": MixedSource([f"x = {n}" for n in range(60)], share=0.25),
    ... }
    >>> sizes = {"calibration_tokens": 96, "validation_tokens": 48, "test_tokens": 48}
    >>> split = mixed_split(sources, tokenizer, sequence_length=12, **sizes)
    >>> split.notes[-1]
    'calibration is prose 72, code 24 tokens (75.0 %, 25.0 %)'
    """
    shares = {name: source.share for name, source in sources.items()}
    documents = {name: source.documents for name, source in sources.items()}
    conversations = [name for name, source in sources.items() if source.conversations]
    total = sum(shares.values())
    if not all(share > 0 for share in shares.values()) or not abs(total - 1) <= SHARE_TOLERANCE:
        raise StreamlineError(
            f"The shares {shares} sum to {total:.6g}. Expected shares above 0 that sum to 1. Change the shares."
        )
    sizes = {"test": test_tokens, "validation": validation_tokens, "calibration": calibration_tokens}
    check_sizes(sizes, sequence_length)
    forbidden: set[str] = set()
    known: set[str] = set()
    special = sorted(getattr(tokenizer, "added_tokens_encoder", {}) if conversations else {}, key=len, reverse=True)
    marks = re.compile("|".join(map(re.escape, special))) if special else None
    parts: dict[str, Tensor] = {}
    notes: list[str] = []
    if test_documents is not None:
        test_texts = hash_shuffle(test_documents, seed)
        test = {"test": sizes.pop("test")}
        ids, part_notes = fill_parts(test_texts, test, Encoder(tokenizer), sequence_length, seed)
        parts["test"], notes = _rows(ids["test"], sequence_length), part_notes
        known.update(test_texts)
        forbidden.update(paragraph for document in test_texts for paragraph in long_paragraphs(document))
    wanted = sequences_by_source(shares, sizes, sequence_length)
    rows_by_source: dict[str, dict[str, Tensor]] = {}
    for source in shares:
        is_conversation = source in conversations
        ordered = sort_by_hash(documents[source], seed) if is_conversation else hash_shuffle(documents[source], seed)
        paragraphs = {text: set(_paragraphs(text, marks if is_conversation else None)) for text in ordered}
        usable = [t for t in ordered if t.strip() not in known and not (is_conversation and forbidden & paragraphs[t])]
        encode = Encoder(tokenizer, "") if is_conversation else Encoder(tokenizer)
        source_sizes = {name: rows[source] * sequence_length for name, rows in wanted.items()}
        try:
            ids, part_notes = fill_parts(
                usable, source_sizes, encode, sequence_length, seed, frozenset(forbidden), intact=is_conversation
            )
        except StreamlineError as error:
            context = " (without text of earlier sources or of the test part)" if len(usable) < len(ordered) else ""
            raise StreamlineError(f"The source {source!r}{context}: {error}") from error
        rows_by_source[source] = {name: _rows(part_ids, sequence_length) for name, part_ids in ids.items()}
        notes += [f"{source}: {note}" for note in part_notes]
        known.update(text.strip() for text in ordered)
        forbidden.update(*paragraphs.values())
    for name, requested in wanted.items():
        available = {source: len(rows[name]) for source, rows in rows_by_source.items()}
        counts = _largest_available_counts(shares, requested, available, name)
        if sum(counts.values()) < sum(requested.values()):
            scarce = " and ".join(source for source in shares if available[source] < requested[source])
            notes.append(
                f"{name} is {sum(counts.values()) * sequence_length:,} of "
                f"{sum(requested.values()) * sequence_length:,} requested tokens, because there is too little text of "
                f"{scarce} and the shares are kept"
            )
        parts[name] = _interleave([rows_by_source[source][name][:count] for source, count in counts.items()])
        if name == "calibration" and len(shares) > 1:
            tokens = ", ".join(f"{source} {count * sequence_length:,}" for source, count in counts.items())
            reached = ", ".join(f"{count / sum(counts.values()):.1%}".replace("%", " %") for count in counts.values())
            notes.append(f"calibration is {tokens} tokens ({reached})")
    calibration, validation, test_rows = (parts[name] for name in PARTS)
    source_names = {source: sources_of(documents[source]) for source in shares}
    mixture = [
        {"name": name, "share": share, "sources": source_names[name], "conversation": name in conversations}
        for name, share in shares.items()
    ]
    source_record = recorded_source({"mixture": mixture}, test_documents) if all(source_names.values()) else {}
    fingerprint = rows_fingerprint(calibration)
    return TokenSplit(calibration, validation, test_rows, fingerprint, tuple(notes), source=source_record)


def _paragraphs(text: str, marks: re.Pattern[str] | None) -> Iterator[str]:
    """Yield the long paragraphs of a text; `marks` matches special tokens, at which conversations are also split."""
    for paragraph in long_paragraphs(text if marks is None else marks.sub("\n\n", text)):
        yield paragraph
        if marks is not None:
            yield from long_paragraphs(paragraph.partition("\n")[2])


def _apportion(shares: Mapping[str, float], total: int) -> dict[str, int]:
    """Distribute `total` over the sources in proportion to the shares, by the largest-remainder method."""
    exact = {source: share * total / sum(shares.values()) for source, share in shares.items()}
    counts = {source: math.floor(value + 1e-9) for source, value in exact.items()}
    rest = sorted(exact, key=lambda source: counts[source] - exact[source])
    for source in rest[: total - sum(counts.values())]:
        counts[source] += 1
    return counts


def _largest_available_counts(
    shares: Mapping[str, float], requested: Mapping[str, int], available: Mapping[str, int], part: str
) -> dict[str, int]:
    """Return the largest numbers of sequences that have these shares and are available."""
    for total in range(sum(requested.values()), 0, -1):
        counts = _apportion(shares, total)
        if all(0 < count <= available[source] for source, count in counts.items()):
            return counts
    listing = ", ".join(f"{source} {count}" for source, count in available.items())
    raise StreamlineError(
        f"The sources fill too few sequences of {part} ({listing}) for the shares {dict(shares)}. Give more text of "
        f"{min(available, key=lambda source: available[source] / shares[source])!r}, a smaller share of it, or a "
        "smaller --sequence-length."
    )


def _interleave(rows: Sequence[Tensor]) -> Tensor:
    """Concatenate the rows of several sources such that the rows of each source are evenly spaced."""
    positions = torch.cat([(torch.arange(len(source)) + 0.5).double() / len(source) for source in rows])
    return torch.cat(list(rows))[positions.argsort(stable=True)]


def _rows(ids: Sequence[int], length: int) -> Tensor:
    return torch.tensor(ids, dtype=torch.long).view(-1, length)
