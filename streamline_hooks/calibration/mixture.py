"""Mix several sources of text in exact shares of sequences."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from streamline_hooks.calibration.dealing import Encoder, deal_parts, in_hash_order, long_paragraphs, shuffled
from streamline_hooks.calibration.split import PARTS, TokenSplit, check_sizes, fingerprint_of
from streamline_hooks.errors import StreamlineError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROUNDING = 0.002
"""How far from 1 shares may sum: three times 0.333 is a whole."""


def smallest_part(shares: Mapping[str, float], sequence_length: int) -> int:
    """Return the tokens of a part in which every source of a mixture has a sequence.

    Examples
    --------
    >>> smallest_part({"self": 0.75, "pydoc": 0.25}, 512)
    2048
    """
    return math.ceil(1 / min(shares.values()) - 1e-9) * sequence_length


def sequences_by_source(
    shares: Mapping[str, float], sizes: Mapping[str, int], sequence_length: int
) -> dict[str, dict[str, int]]:
    """Return, by part and source, how many sequences come from each source.

    Parameters
    ----------
    shares : mapping of str to float
    sizes : mapping of str to int
        Tokens of each part.
    sequence_length : int

    Raises
    ------
    StreamlineError
        If the share of a source is less than a sequence.

    Examples
    --------
    >>> sequences_by_source({"self": 0.75, "pydoc": 0.25}, {"test": 700}, 100)
    {'test': {'self': 5, 'pydoc': 2}}
    """
    check_sizes(sizes, sequence_length)
    wanted = {part: _apportioned(shares, size // sequence_length) for part, size in sizes.items()}
    for part, counts in wanted.items():
        if scarce := [source for source, count in counts.items() if not count]:
            raise StreamlineError(
                f"{part}_tokens={sizes[part]} with sequence_length={sequence_length} is "
                f"{sizes[part] // sequence_length} sequences, of which the share {shares[scarce[0]]:.6g} of "
                f"{scarce[0]!r} is none. Expected a sequence of each source. Ask for "
                f"{part}_tokens={smallest_part(shares, sequence_length)} or more, or for a smaller --sequence-length."
            )
    return wanted


def mixed_split(
    documents: Mapping[str, Sequence[str]],
    shares: Mapping[str, float],
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int = 0,
    sequence_length: int = 512,
    calibration_tokens: int = 41_000,
    validation_tokens: int = 8_192,
    test_tokens: int = 16_384,
    test_documents: Sequence[str] | None = None,
    conversations: Collection[str] = (),
) -> TokenSplit:
    """Split several sources so that each has its share of calibration, validation and test.

    Each source is split by itself, as `split_documents` does. Documents and long paragraphs of a source, used or not,
    are left out of the sources after it, so no text is in two parts. The shares are exact up to the rounding to
    sequences: each part takes sequences of one length from the sources in turn. (Interleaving documents, as
    `interleave_datasets` does, would give shares of documents.) If a source has too little text, the part shrinks and
    the shares stay.

    Parameters
    ----------
    documents : mapping of str to sequence of str
        The text of each source.
    shares : mapping of str to float
        The share of each source; they sum to 1.
    tokenizer, seed, sequence_length, calibration_tokens, validation_tokens, test_tokens
        As for `split_documents`; sizes are those of all sources together.
    test_documents : sequence of str, optional
        As for `split_documents`; then the test part is not mixed.
    conversations : collection of str
        Sources whose documents are whole conversations (`self_generated` with ``conversation=True``). They are not cut,
        and one that has a long paragraph of an earlier source is left out.

    Returns
    -------
    TokenSplit
        Its notes contain the tokens of each source.

    Raises
    ------
    StreamlineError
        If shares and documents do not match, a share of a part is less than a sequence, or a source has too little
        text.

    Examples
    --------
    >>> def tokenizer(text, **options):
    ...     return {"input_ids": [len(word) for word in text.split()]}
    >>> letters = [f"This is the letter number {n}." for n in range(60)]
    >>> stories = [f"Long long ago there lived the king number {n}." for n in range(60)]
    >>> split = mixed_split(
    ...     {"letters": letters, "stories": stories},
    ...     {"letters": 0.25, "stories": 0.75},
    ...     tokenizer,
    ...     sequence_length=6,
    ...     calibration_tokens=48,
    ...     validation_tokens=24,
    ...     test_tokens=24,
    ... )
    >>> split.notes
    ('calibration is letters 12, stories 36 tokens (25.0 %, 75.0 %)',)
    """
    _check_shares(documents, shares, conversations)
    sizes = {"test": test_tokens, "validation": validation_tokens, "calibration": calibration_tokens}
    check_sizes(sizes, sequence_length)
    forbidden: set[str] = set()
    known: set[str] = set()
    marks = _special_tokens(tokenizer) if conversations else None
    parts: dict[str, Tensor] = {}
    notes: list[str] = []
    if test_documents is not None:
        scored = shuffled(test_documents, seed)
        test = {"test": sizes.pop("test")}
        ids, more = deal_parts(scored, test, Encoder(tokenizer), sequence_length, seed)
        parts["test"], notes = _rows(ids["test"], sequence_length), more
        known.update(scored)
        forbidden.update(paragraph for document in scored for paragraph in long_paragraphs(document))
    wanted = sequences_by_source(shares, sizes, sequence_length)
    dealt: dict[str, dict[str, Tensor]] = {}
    for source in shares:
        whole = source in conversations
        own = in_hash_order(documents[source], seed) if whole else shuffled(documents[source], seed)
        usable = [text for text in own if text.strip() not in known]
        if whole:
            usable = [text for text in usable if forbidden.isdisjoint(_paragraphs(text, marks))]
        encode = Encoder(tokenizer, "") if whole else Encoder(tokenizer)
        of_source = {name: rows[source] * sequence_length for name, rows in wanted.items()}
        try:
            ids, more = deal_parts(usable, of_source, encode, sequence_length, seed, frozenset(forbidden), intact=whole)
        except StreamlineError as error:
            others = " without what the sources before it, or the test, have" if len(usable) < len(own) else ""
            raise StreamlineError(f"The source {source!r}{others}: {error}") from error
        dealt[source] = {name: _rows(of_part, sequence_length) for name, of_part in ids.items()}
        notes += [f"{source}: {note}" for note in more]
        known.update(text.strip() for text in own)
        forbidden.update(paragraph for text in own for paragraph in _paragraphs(text, marks if whole else None))
    for name, asked in wanted.items():
        there = {source: len(rows[name]) for source, rows in dealt.items()}
        kept = _within(shares, asked, there, name)
        if sum(kept.values()) < sum(asked.values()):
            scarce = " and ".join(source for source in shares if there[source] < asked[source])
            notes.append(
                f"{name} is {sum(kept.values()) * sequence_length:,} of {sum(asked.values()) * sequence_length:,} "
                f"tokens that were asked for, since there is too little text of {scarce} and the shares stay"
            )
        parts[name] = _in_turn([dealt[source][name][:count] for source, count in kept.items()])
        if name == "calibration" and len(shares) > 1:
            total = sum(kept.values())
            tokens = ", ".join(f"{source} {count * sequence_length:,}" for source, count in kept.items())
            reached = ", ".join(f"{count / total:.1%}".replace("%", " %") for count in kept.values())
            notes.append(f"calibration is {tokens} tokens ({reached})")
    calibration, validation, test_rows = (parts[name] for name in PARTS)
    return TokenSplit(calibration, validation, test_rows, fingerprint_of(calibration), tuple(notes))


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str] | None:
    added = getattr(tokenizer, "added_tokens_encoder", {})
    return re.compile("|".join(map(re.escape, sorted(added, key=len, reverse=True)))) if added else None


def _paragraphs(text: str, marks: re.Pattern[str] | None) -> Iterator[str]:
    """Yield the long paragraphs; of a conversation without special tokens and the line of the role."""
    if marks is None:
        yield from long_paragraphs(text)
        return
    for paragraph in long_paragraphs(marks.sub("\n\n", text)):
        yield paragraph
        yield from long_paragraphs(paragraph.partition("\n")[2])


def _check_shares(documents: Mapping[str, object], shares: Mapping[str, float], conversations: Collection[str]) -> None:
    if not shares or set(documents) != set(shares) or not set(conversations) <= set(shares):
        raise StreamlineError(
            f"Got documents of {sorted(documents)}, shares of {sorted(shares)} and conversations of "
            f"{sorted(conversations)}. Expected documents and a share of each source, one at least."
        )
    total = sum(shares.values())
    if not all(share > 0 for share in shares.values()) or not abs(total - 1) <= ROUNDING:
        raise StreamlineError(
            f"The shares are {dict(shares)}, which sum to {total:.6g}. Expected shares above 0 that sum to 1."
        )


def _apportioned(shares: Mapping[str, float], total: int) -> dict[str, int]:
    """Return whole numbers in these shares that sum to `total`, by largest remainders."""
    exact = {source: share * total / sum(shares.values()) for source, share in shares.items()}
    counts = {source: math.floor(value + 1e-9) for source, value in exact.items()}
    rest = sorted(exact, key=lambda source: counts[source] - exact[source])
    for source in rest[: total - sum(counts.values())]:
        counts[source] += 1
    return counts


def _within(
    shares: Mapping[str, float], asked: Mapping[str, int], there: Mapping[str, int], part: str
) -> dict[str, int]:
    """Return the most sequences in these shares, with no more of a source than it has."""
    for total in range(sum(asked.values()), 0, -1):
        counts = _apportioned(shares, total)
        if all(0 < count <= there[source] for source, count in counts.items()):
            return counts
    found = ", ".join(f"{source} {count}" for source, count in there.items())
    raise StreamlineError(
        f"The sources fill so few sequences of {part} ({found}) that no number of them is as the shares "
        f"{dict(shares)}. Give more text of {min(there, key=lambda source: there[source] / shares[source])!r}, a "
        "smaller share of it, or a smaller --sequence-length."
    )


def _in_turn(rows: Sequence[Tensor]) -> Tensor:
    """Return the rows of several sources, those of each evenly spaced."""
    places = torch.cat([(torch.arange(len(of)) + 0.5).double() / len(of) for of in rows])
    return torch.cat(list(rows))[places.argsort(stable=True)]


def _rows(ids: Sequence[int], length: int) -> Tensor:
    return torch.tensor(ids, dtype=torch.long).view(-1, length)
