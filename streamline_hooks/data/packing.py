"""Pack documents into rows of equal length without padding, such that no document attends to another."""

from __future__ import annotations

import hashlib
import math
from array import array
from bisect import bisect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from streamline_hooks.core import (
    Batch,
    Bound,
    Config,
    Processes,
    StreamlineError,
    current_processes,
    distributed_step,
    label_mask,
    padding_mask,
    progress_bar,
)
from streamline_hooks.data.documents import content_digest, stream_documents

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

if TYPE_CHECKING:
    TokenIds = array[int]
else:
    TokenIds = array  # array[int] needs Python 3.12
PackedRow = list[TokenIds]
"""The pieces of a row in order; each is a document or a part of a document."""
_DOCUMENTS_PER_PART = 4
_CHARACTERS_PER_TOKEN = 16  # an upper bound for ordinary text


@dataclass(frozen=True, eq=False)
class PackedText:
    """Full rows of packed documents.

    Attributes
    ----------
    input_ids, position_ids : torch.IntTensor
        Of shape (rows, sequence_length). Positions restart with each piece of a document.
    documents : int
        Number of documents in the rows.
    cuts : int
        Number of times that a document was cut. The remainder is packed as another piece, unless it exceeds the
        maximum share of the document.
    note : str
        The number of tokens, if the source contained fewer tokens than requested; otherwise empty.

    Examples
    --------
    >>> rows = torch.tensor([[5, 6, 7, 8]], dtype=torch.int32)
    >>> positions = torch.tensor([[0, 1, 2, 0]], dtype=torch.int32)
    >>> PackedText(rows, positions, documents=2, cuts=0).batches(batch_size=1)[0]["position_ids"].tolist()
    [[0, 1, 2, 0]]
    """

    input_ids: Tensor
    position_ids: Tensor
    documents: int
    cuts: int
    note: str = ""

    def batches(self, batch_size: int) -> list[dict[str, Tensor]]:
        """Return batches with ``input_ids`` and ``position_ids`` of shape (batch, tokens), int64."""
        parts = zip(self.input_ids.split(batch_size), self.position_ids.split(batch_size), strict=True)
        return [{"input_ids": ids.long(), "position_ids": p.long()} for ids, p in parts if len(ids)]


@dataclass(frozen=True)
class PackingConfig(Config):
    """Settings for streaming documents and packing them into rows.

    Attributes
    ----------
    sequence_length : int
        Tokens per row. 512 by default.
    special_tokens : bool
        Whether the tokenizer adds its special tokens to each document; pieces that were cut off have none. False by
        default.
    shuffle, remember : int
        See `stream_documents`. 0 and 1,000,000 by default.
    seed : int
        Seed of the shuffle and of the assignment of documents to parts. 0 by default.
    buffer : int
        See `pack`. 256 by default.

    Examples
    --------
    >>> PackingConfig(sequence_length=1024, shuffle=10_000).buffer
    256
    """

    bounds: ClassVar[Mapping[str, Bound]] = {"sequence_length": 1, "shuffle": 0, "remember": 0, "buffer": 1}

    sequence_length: int = 512
    special_tokens: bool = False
    shuffle: int = 0
    seed: int = 0
    remember: int = 1_000_000
    buffer: int = 256


def packed_text(
    source: str | Path | Sequence[str | Path],
    tokenizer: PreTrainedTokenizerBase,
    tokens: Mapping[str, int],
    config: PackingConfig | None = None,
    *,
    processes: Processes | None = None,
) -> dict[str, PackedText]:
    """Stream documents until there are enough tokens, and pack them into the rows of this rank.

    A document is assigned to a part by its content and the seed, so no two parts share a document on any rank. Unlike
    `split_documents`, paragraphs that occur in two documents are not detected. A document contributes at most a quarter
    of the rank's part, or one row if that is more. Each rank gets rows of different documents; functions that would
    divide batches among ranks need ``shard=False``. The rows depend on the number of ranks.

    Parameters
    ----------
    source : str, Path or a sequence of them
        See `read_documents` and `stream_documents`.
    tokenizer : PreTrainedTokenizerBase
        Called as ``tokenizer(text, add_special_tokens=config.special_tokens, verbose=False)``.
    tokens : mapping of str to int
        Size of each part in tokens over all ranks, rounded down to full rows, such as ``{"calibration": 41_000}``.
    config : PackingConfig, optional
        Default: ``PackingConfig()``.
    processes : Processes, optional
        Rank and world size. Default: `streamline_hooks.core.current_processes`; all ranks then raise if one rank fails.

    Returns
    -------
    dict of str to PackedText
        The rows of each part. A rank gets no rows if there are more ranks than rows.

    Raises
    ------
    StreamlineError
        If a part is smaller than a row, or the source does not fill one row of a part.

    Examples
    --------
    Any callable that returns ``input_ids`` works; this tokenizer maps each word to its length:

    >>> def tokenizer(text, **options):
    ...     return {"input_ids": [len(word) for word in text.split()]}
    >>> parts = packed_text("pydoc", tokenizer, {"calibration": 8192, "test": 2048}, PackingConfig(sequence_length=128))
    >>> {name: tuple(part.input_ids.shape) for name, part in parts.items()}
    {'calibration': (64, 128), 'test': (16, 128)}
    """
    config = config or PackingConfig()
    length, seed = config.sequence_length, config.seed
    if not tokens:
        raise StreamlineError('No part was requested. Expected a size for each part, such as {"calibration": 41_000}.')
    for name, size in tokens.items():
        if size < length:
            raise StreamlineError(
                f"{size:,} tokens for the part {name!r} with sequence_length={length} are less than a row. Expected at "
                f"least one row in each part. Request {length:,} tokens or more, or a smaller --sequence-length."
            )
    rank = processes or current_processes()
    parts = {
        name: _PartBuilder(len(range(rank.rank, size // length, rank.count)), Packer(length, config.buffer))
        for name, size in tokens.items()
    }
    # Documents are assigned to parts in proportion to the part sizes; the assignment depends on content and seed only.
    names, bounds = list(tokens), list(accumulate(tokens.values()))
    with distributed_step("packed_text") if processes is None else nullcontext() as work:
        documents = stream_documents(
            source, shuffle=config.shuffle, seed=seed, remember=config.remember, processes=rank
        )
        with progress_bar(sum(part.wanted for part in parts.values()), "read and pack") as bar:
            while any(part.remaining for part in parts.values()):
                if (document := next(documents, None)) is None:
                    break
                digest = hashlib.blake2b(b"%d " % seed + content_digest(document), digest_size=8).digest()
                part = parts[names[bisect(bounds, int.from_bytes(digest) * bounds[-1] >> 64)]]
                if limit := part.remaining:
                    ids, is_complete = _encode(tokenizer, document, limit, config.special_tokens)
                    part.add(ids, is_complete)
                    bar.update(len(ids))
        packed = {name: part.end(name, rank) for name, part in parts.items()}
        if work is not None:
            work.all_gather_object(None)  # all ranks raise here if one rank failed
    return packed


class _PartBuilder:
    """Collect the rows of one part on this rank."""

    def __init__(self, rows: int, packer: Packer) -> None:
        self.wanted, self.packer = rows * packer.length, packer
        self.longest = max(packer.length, math.ceil(self.wanted / _DOCUMENTS_PER_PART))
        self.ids = torch.empty(rows, packer.length, dtype=torch.int32)
        self.positions = torch.empty_like(self.ids)
        self.full_rows = self.documents = self.shortened = 0

    @property
    def remaining(self) -> int:
        """Return the maximum number of tokens of the next document."""
        return min(self.longest, self.wanted - self.full_rows * self.packer.length - self.packer.waiting)

    def add(self, ids: Sequence[int], is_complete: bool) -> None:
        self.documents += bool(ids)
        self.shortened += not is_complete
        self._keep(self.packer.add(ids))

    def end(self, name: str, this: Processes) -> PackedText:
        self._keep(self.packer.rest())
        rank = f" of rank {this.rank} of {this.count}" if this.count > 1 else ""
        length, tokens = self.packer.length, self.full_rows * self.packer.length
        if self.wanted and not tokens:
            raise StreamlineError(
                f"{self.wanted:,} tokens were requested for the part {name!r}{rank}, and the source does not fill one "
                f"row of {length:,} tokens. Give more text, or a smaller --sequence-length."
            )
        note = f"{name}{rank}: {self.wanted:,} tokens were requested, and the source ended after {tokens:,}"
        ids, positions, cuts = self.ids[: self.full_rows], self.positions[: self.full_rows], self.packer.cuts
        return PackedText(ids, positions, self.documents, cuts + self.shortened, note if tokens < self.wanted else "")

    def _keep(self, rows: list[PackedRow]) -> None:
        for row in rows:
            if sum(map(len, row)) == self.packer.length:  # the last row of a source may be shorter
                self.ids[self.full_rows] = torch.tensor([token for piece in row for token in piece])
                self.positions[self.full_rows] = torch.cat([torch.arange(len(piece)) for piece in row])
                self.full_rows += 1


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, limit: int, special_tokens: bool) -> tuple[list[int], bool]:
    """Tokenize a text up to a limit; return the ids and whether they are complete."""
    start = text[: _CHARACTERS_PER_TOKEN * limit]
    ids = list(tokenizer(start, add_special_tokens=special_tokens, verbose=False)["input_ids"])
    # The cut may split a word. With twice as many ids as needed, that word is beyond the ids returned.
    if len(start) < len(text) and len(ids) < 2 * limit:
        start, ids = text, list(tokenizer(text, add_special_tokens=special_tokens, verbose=False)["input_ids"])
    return ids[:limit], len(start) == len(text) and len(ids) <= limit


class Packer:
    """Pack documents into rows of `length` tokens with few cuts.

    Up to `buffer` pieces wait for a row. A row begins with the piece that has waited longest, followed by the pieces
    that fill it best; if a gap remains, the longest waiting piece is cut. `waiting` is the number of waiting tokens,
    `cuts` the number of cuts.
    """

    def __init__(self, length: int, buffer: int = 256) -> None:
        for name, value in (("sequence_length", length), ("buffer", buffer)):
            if value < 1:
                raise StreamlineError(f"{name}={value} is invalid. Expected 1 or more. Increase it or use the default.")
        self.length, self.buffer = length, buffer
        self.waiting = self.cuts = 0
        self._pieces: list[TokenIds] = []

    def add(self, document: Iterable[int]) -> list[PackedRow]:
        """Add the ids of a document, and return the rows that are now full."""
        ids = document if isinstance(document, array) else array("i", document)
        row_count = len(ids) // self.length
        rows = [[ids[i * self.length : (i + 1) * self.length]] for i in range(row_count)]
        rest = ids[row_count * self.length :]
        self.cuts += row_count if rest else max(0, row_count - 1)
        if rest:
            self._pieces.append(rest)
            self.waiting += len(rest)
        while len(self._pieces) >= self.buffer and self.waiting >= self.length:
            rows.append(self._row())
        return rows

    def rest(self) -> list[PackedRow]:
        """Return the remaining pieces as rows, of which only the last may be shorter."""
        rows = []
        while self._pieces:
            rows.append(self._row())
        return rows

    def _row(self) -> PackedRow:
        first, *waiting = self._pieces
        gap = self.length - len(first)
        chosen = fill_sequence([len(piece) for piece in waiting], gap)
        row = [first, *(waiting[i] for i in chosen)]
        taken = set(chosen)
        self._pieces = [piece for i, piece in enumerate(waiting) if i not in taken]
        gap -= sum(len(piece) for piece in row[1:])
        if gap and self._pieces:  # all waiting pieces are longer than the gap
            longest = max(range(len(self._pieces)), key=lambda i: len(self._pieces[i]))
            piece = self._pieces[longest]
            row.append(piece[:gap])
            self._pieces[longest] = piece[gap:]
            self.cuts += 1
            gap = 0
        self.waiting -= self.length - gap
        return row


def fill_sequence(lengths: Sequence[int], gap: int) -> list[int]:
    """Return the indices of the pieces that together fill a gap best, preferring earlier pieces."""
    within = (1 << gap + 1) - 1
    reached = [1]  # for the pieces from index i on: bit n is set if some of them have n tokens in total
    for length in reversed(lengths):
        reached.append(reached[-1] | reached[-1] << length & within)
    left = reached.pop().bit_length() - 1
    chosen = []
    for i, length in enumerate(lengths):
        by_others = reached.pop()
        if length <= left and by_others >> left - length & 1:
            chosen.append(i)
            left -= length
    return chosen


def pack(documents: Iterable[Sequence[int]], sequence_length: int, *, buffer: int = 256) -> Iterator[PackedRow]:
    """Yield rows of documents that together contain all tokens.

    Parameters
    ----------
    documents : iterable of sequence of int
        Token ids of each document; read lazily.
    sequence_length : int
        Tokens per row. The last row may be shorter; nothing is padded.
    buffer : int, default 256
        Number of documents that wait for a row in which they fit. A larger buffer needs fewer cuts and more memory.

    Yields
    ------
    list of array
        The pieces of a row in order.

    Raises
    ------
    StreamlineError
        If `sequence_length` or `buffer` is less than 1.

    Examples
    --------
    >>> [[list(piece) for piece in row] for row in pack([[1, 2, 3, 4, 5, 6], [7], [8, 9]], 4)]
    [[[1, 2, 3, 4]], [[5, 6], [8, 9]], [[7]]]
    """
    packer = Packer(sequence_length, buffer)

    def rows() -> Iterator[PackedRow]:
        for document in documents:
            yield from packer.add(document)
        yield from packer.rest()

    return rows()


def packed_batches(rows: Iterable[PackedRow], batch_size: int) -> list[dict[str, Tensor]]:
    """Batch packed rows, with position ids that restart at each piece.

    There is no attention mask: models of Transformers that support packed rows separate documents by their position
    ids. Use `check_packing` to check a model. Means over tokens (`profile`, `measure_moments`, KL) are means over the
    documents; statistics per sequence treat a row as a sequence. Exclude the `document_starts` from predictions.

    Parameters
    ----------
    rows : iterable of list of sequence of int
        See `pack`.
    batch_size : int
        Rows per batch; a row of another length starts a new batch.

    Returns
    -------
    list of dict
        With ``input_ids`` and ``position_ids`` of shape (batch, tokens), int64.

    Raises
    ------
    StreamlineError
        If `batch_size` is less than 1.

    Examples
    --------
    >>> (batch,) = packed_batches([[[5, 6, 7], [8, 9]]], batch_size=8)
    >>> batch["input_ids"].tolist(), batch["position_ids"].tolist()
    ([[5, 6, 7, 8, 9]], [[0, 1, 2, 0, 1]])
    """
    if batch_size < 1:
        raise StreamlineError(f"batch_size={batch_size} is invalid. Expected 1 row or more per batch.")
    batches: list[list[tuple[list[int], list[int]]]] = []
    for row in rows:
        ids = [token for piece in row for token in piece]
        positions = [position for piece in row for position in range(len(piece))]
        if not batches or len(batches[-1]) == batch_size or len(batches[-1][0][0]) != len(ids):
            batches.append([])
        batches[-1].append((ids, positions))
    return [
        {"input_ids": torch.tensor([ids for ids, _ in batch]), "position_ids": torch.tensor([p for _, p in batch])}
        for batch in batches
    ]


def document_starts(position_ids: Tensor) -> Tensor:
    """Return the mask of the first tokens of pieces, boolean of shape (batch, tokens).

    The token before such a token belongs to another document, so these tokens are excluded from predictions.

    Parameters
    ----------
    position_ids : torch.Tensor
        Of shape (batch, tokens).

    Examples
    --------
    >>> document_starts(torch.tensor([[0, 1, 2, 0, 1]])).tolist()
    [[True, False, False, True, False]]
    """
    first = torch.ones_like(position_ids[:, :1], dtype=torch.bool)
    return torch.cat([first, position_ids.diff(dim=1) != 1], dim=1)


def documents_of(batch: Batch | Tensor) -> list[list[Tensor]]:
    """Return the documents in each row of a batch on the CPU, without padding; rows of only padding are dropped.

    `batch` is token ids of shape (batch, tokens), or a mapping with ``input_ids``, with ``attention_mask`` if there is
    padding, and with ``position_ids`` if rows are packed.
    """
    inputs = {"input_ids": batch} if isinstance(batch, Tensor) else batch
    ids, mask = inputs["input_ids"].cpu(), padding_mask(inputs)
    ones = torch.ones_like(ids, dtype=torch.bool)
    begins = ~ones  # remains False at the first token of each row
    begins[:, 1:] = ~label_mask(ones, inputs.get("position_ids"))
    rows = []
    for row, tokens in enumerate(ids):
        real = ones[row] if mask is None else mask[row].cpu().bool()
        edges = begins[row][real][1:].nonzero().flatten() + 1
        rows.append(list(tokens[real].tensor_split(edges)))
    return [documents for documents in rows if len(documents[0])]
