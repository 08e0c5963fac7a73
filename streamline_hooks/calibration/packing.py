"""Pack documents into rows of one length, without padding, such that no document sees another."""

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
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from streamline_hooks.batch import Batch, real_tokens
from streamline_hooks.calibration.documents import content_digest, stream_documents
from streamline_hooks.distributed import Processes, distributed_step, here
from streamline_hooks.errors import StreamlineError
from streamline_hooks.passes import progress
from streamline_hooks.predicted import predicted_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ids = array
Row = list[Ids]
"""The pieces of a row, one after the other; each is a document, or a part of one."""
_DOCUMENTS_PER_PART = 4
_CHARACTERS_PER_TOKEN = 16  # more than text has


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
        How often a document was cut; its rest is a piece of its own, except for what exceeds its share.
    note : str
        The number of tokens, if the source ended before there were as many as were asked for.
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


def packed_text(
    source: str | Path | Sequence[str | Path],
    tokenizer: PreTrainedTokenizerBase,
    tokens: Mapping[str, int],
    *,
    sequence_length: int = 512,
    special_tokens: bool = False,
    shuffle: int = 0,
    seed: int = 0,
    remember: int = 1_000_000,
    buffer: int = 256,
    processes: Processes | None = None,
) -> dict[str, PackedText]:
    """Stream documents until there are enough tokens, and pack them into this rank's rows.

    The part of a document is drawn by its content and the seed, so no two parts share a document, on any rank. Unlike
    in `split_documents`, paragraphs that two documents share are not looked for. A document contributes at most a
    quarter of a rank's part, or one row if that is more. Each rank has rows of documents that no other rank has; pass
    them on with ``share=False``. The rows depend on the number of ranks.

    Parameters
    ----------
    source : str, Path or a sequence of them
        See `read_documents` and `stream_documents`.
    tokenizer : PreTrainedTokenizerBase
        Called as ``tokenizer(text, add_special_tokens=special_tokens, verbose=False)``.
    tokens : mapping of str to int
        Size of each part over all ranks, rounded down to full rows, such as ``{"calibration": 41_000}``.
    sequence_length : int, default 512
    special_tokens : bool, default False
        Whether documents get the special tokens of their tokenizer; pieces that were cut off get none.
    shuffle, seed, remember
        See `stream_documents`; the seed also assigns documents to parts.
    buffer : int, default 256
        See `pack`.
    processes : Processes, optional
        Rank and world size. Default: `streamline_hooks.distributed.here`; then every rank raises if one does.

    Returns
    -------
    dict of str to PackedText
        One per part; without rows on a rank beyond the number of rows.

    Raises
    ------
    StreamlineError
        If a part is smaller than a row, or the source does not fill one row of it.

    Examples
    --------
    Any callable that returns ``input_ids`` will do; this one replaces each word by its length:

    >>> def tokenizer(text, **options):
    ...     return {"input_ids": [len(word) for word in text.split()]}
    >>> parts = packed_text("pydoc", tokenizer, {"calibration": 8192, "test": 2048}, sequence_length=128)
    >>> {name: tuple(part.input_ids.shape) for name, part in parts.items()}
    {'calibration': (64, 128), 'test': (16, 128)}
    """
    if not tokens:
        raise StreamlineError('No part was asked for; expected sizes by name, such as {"calibration": 41_000}.')
    for name, size in tokens.items():
        if sequence_length < 1 or size < sequence_length:
            raise StreamlineError(
                f"{size:,} tokens for the part {name!r} with sequence_length={sequence_length}: expected a positive "
                f"sequence length and at least one row in each part. Ask for {max(sequence_length, 1):,} tokens or "
                "more, or for a smaller --sequence-length."
            )
    rank = processes or here()
    parts = {
        name: _Part(len(range(rank.rank, size // sequence_length, rank.count)), Packer(sequence_length, buffer))
        for name, size in tokens.items()
    }
    # Documents are assigned to parts in proportion to their sizes, by nothing but content and seed.
    names, bounds = list(tokens), list(accumulate(tokens.values()))
    with distributed_step("packed_text") if processes is None else nullcontext() as work:
        documents = stream_documents(source, shuffle=shuffle, seed=seed, remember=remember, processes=rank)
        with progress(sum(part.wanted for part in parts.values()), "read and pack") as bar:
            while any(part.room for part in parts.values()):
                if (document := next(documents, None)) is None:
                    break
                drawn = hashlib.blake2b(b"%d " % seed + content_digest(document), digest_size=8).digest()
                part = parts[names[bisect(bounds, int.from_bytes(drawn) * bounds[-1] >> 64)]]
                if limit := part.room:
                    ids, whole = _encoded(tokenizer, document, limit, special_tokens)
                    part.add(ids, whole)
                    bar.update(len(ids))
        packed = {name: part.end(name, rank) for name, part in parts.items()}
        if work is not None:
            work.all_gather_object(None)  # the others wait here, in case one fails
    return packed


class _Part:
    """The rows of one part that this rank makes."""

    def __init__(self, rows: int, packer: Packer) -> None:
        self.wanted, self.packer = rows * packer.length, packer
        self.most = max(packer.length, math.ceil(self.wanted / _DOCUMENTS_PER_PART))
        self.ids = torch.empty(rows, packer.length, dtype=torch.int32)
        self.positions = torch.empty_like(self.ids)
        self.full_rows = self.documents = self.shortened = 0

    @property
    def taken(self) -> int:
        """Return the number of tokens in rows and in the packer."""
        return self.full_rows * self.packer.length + self.packer.waiting

    @property
    def room(self) -> int:
        """Return the maximal number of tokens of the next document."""
        return min(self.most, self.wanted - self.taken)

    def add(self, ids: Sequence[int], whole: bool) -> None:
        self.documents += bool(ids)
        self.shortened += not whole
        self._keep(self.packer.add(ids))

    def end(self, name: str, this: Processes) -> PackedText:
        self._keep(self.packer.rest())
        of = f" of process {this.rank} of {this.count}" if this.count > 1 else ""
        length, held = self.packer.length, self.full_rows * self.packer.length
        if self.wanted and not held:
            raise StreamlineError(
                f"The source does not fill one row of {length:,} tokens for the part {name!r}{of}, of which "
                f"{self.wanted:,} tokens were asked for. Give more text, or a smaller --sequence-length."
            )
        note = f"{name}{of}: {self.wanted:,} tokens were asked for, and the source ended after {held:,}"
        kept = slice(self.full_rows)
        return PackedText(
            self.ids[kept],
            self.positions[kept],
            self.documents,
            self.packer.cuts + self.shortened,
            note if held < self.wanted else "",
        )

    def _keep(self, rows: list[Row]) -> None:
        for row in rows:
            if sum(map(len, row)) == self.packer.length:  # all but the last, where the source ended
                self.ids[self.full_rows] = torch.tensor([token for piece in row for token in piece])
                self.positions[self.full_rows] = torch.cat([torch.arange(len(piece)) for piece in row])
                self.full_rows += 1


def _encoded(tokenizer: PreTrainedTokenizerBase, text: str, limit: int, special_tokens: bool) -> tuple[list[int], bool]:
    """Tokenize up to a limit, and return whether that is the whole text."""
    start = text[: _CHARACTERS_PER_TOKEN * limit]
    ids = list(tokenizer(start, add_special_tokens=special_tokens, verbose=False)["input_ids"])
    # Twice the limit, so that the word at the cut is far behind what is used.
    if len(start) < len(text) and len(ids) < 2 * limit:
        start, ids = text, list(tokenizer(text, add_special_tokens=special_tokens, verbose=False)["input_ids"])
    return ids[:limit], len(start) == len(text) and len(ids) <= limit


class Packer:
    """Pack documents into full rows.

    A row begins with the piece that has waited longest, followed by the pieces that together fill it best. If it is not
    full, the longest waiting piece is cut. Documents longer than a row are first cut into rows.

    Parameters
    ----------
    length : int
        Tokens in a row.
    buffer : int, default 256
        Number of waiting pieces. With more, fewer are cut.

    Attributes
    ----------
    waiting : int
        Tokens that are in no row yet.
    cuts : int
        How often a document was cut.

    Examples
    --------
    >>> packer = Packer(4, buffer=3)
    >>> [[list(piece) for piece in row] for ids in ([1, 2, 3], [4, 5], [6]) for row in packer.add(ids)]
    [[[1, 2, 3], [6]]]
    >>> [[list(piece) for piece in row] for row in packer.rest()]
    [[[4, 5]]]
    """

    def __init__(self, length: int, buffer: int = 256) -> None:
        for name, value in (("sequence_length", length), ("buffer", buffer)):
            if value < 1:
                raise StreamlineError(f"{name}={value}: expected 1 or more. Give a larger number, or the default.")
        self.length, self.buffer = length, buffer
        self.waiting = self.cuts = 0
        self._pieces: list[Ids] = []

    def add(self, document: Iterable[int]) -> list[Row]:
        """Take a document's ids, and give the rows that are full now."""
        ids = document if isinstance(document, array) else array("i", document)
        whole = len(ids) // self.length
        rows = [[ids[i * self.length : (i + 1) * self.length]] for i in range(whole)]
        rest = ids[whole * self.length :]
        self.cuts += whole if rest else max(0, whole - 1)
        if rest:
            self._pieces.append(rest)
            self.waiting += len(rest)
        while len(self._pieces) >= self.buffer and self.waiting >= self.length:
            rows.append(self._row())
        return rows

    def rest(self) -> list[Row]:
        """Give what is waiting: full rows, and at last one that is shorter if the tokens do not come out even."""
        rows = []
        while self._pieces:
            rows.append(self._row())
        return rows

    def _row(self) -> Row:
        first, *others = self._pieces
        gap = self.length - len(first)
        chosen = fill_sequence([len(piece) for piece in others], gap)
        row = [first, *(others[i] for i in chosen)]
        taken = set(chosen)
        self._pieces = [piece for i, piece in enumerate(others) if i not in taken]
        gap -= sum(len(piece) for piece in row[1:])
        if gap and self._pieces:  # they are all longer
            longest = max(range(len(self._pieces)), key=lambda i: len(self._pieces[i]))
            piece = self._pieces[longest]
            row.append(piece[:gap])
            self._pieces[longest] = piece[gap:]
            self.cuts += 1
            gap = 0
        self.waiting -= self.length - gap
        return row


def fill_sequence(lengths: Sequence[int], gap: int) -> list[int]:
    """Return the pieces that fill a gap best, the first ones if several do."""
    within = (1 << gap + 1) - 1
    reached = [1]  # by the pieces from some one on: bit n says whether some of them have n tokens together
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


def pack(documents: Iterable[Sequence[int]], sequence_length: int, *, buffer: int = 256) -> Iterator[Row]:
    """Yield rows of documents that together contain every token.

    Parameters
    ----------
    documents : iterable of sequence of int
        Token ids; read only as far as rows are asked for.
    sequence_length : int
        Tokens in a row. The last row may be shorter; nothing is padded.
    buffer : int, default 256
        Documents that wait for a row that they fit in.

    Yields
    ------
    list of array
        The pieces of a row in order.

    Examples
    --------
    >>> [[list(piece) for piece in row] for row in pack([[1, 2, 3, 4, 5, 6], [7], [8, 9]], 4)]
    [[[1, 2, 3, 4]], [[5, 6], [8, 9]], [[7]]]
    """
    packer = Packer(sequence_length, buffer)

    def rows() -> Iterator[Row]:
        for document in documents:
            yield from packer.add(document)
        yield from packer.rest()

    return rows()


def packed_batches(rows: Iterable[Row], batch_size: int) -> list[dict[str, Tensor]]:
    """Batch rows, with position ids that restart at each piece.

    There is no attention mask: models of Transformers that support packed rows keep documents apart by their position
    ids. Use `refuse_crossing` to check a model. Means over tokens (`profile`, `measure_moments`, KL) are those of the
    documents; statistics by sequence take a row for a sequence. Exclude the `beginnings` from predictions.

    Parameters
    ----------
    rows : iterable of list of sequence of int
        See `pack`.
    batch_size : int
        Rows in a batch; a row of another length is a batch of its own.

    Returns
    -------
    list of dict
        With ``input_ids`` and ``position_ids`` of shape (batch, tokens), int64.

    Examples
    --------
    >>> (batch,) = packed_batches([[[5, 6, 7], [8, 9]]], batch_size=8)
    >>> batch["input_ids"].tolist(), batch["position_ids"].tolist()
    ([[5, 6, 7, 8, 9]], [[0, 1, 2, 0, 1]])
    """
    if batch_size < 1:
        raise StreamlineError(f"batch_size={batch_size}: expected 1 row or more in a batch.")
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


def beginnings(position_ids: Tensor) -> Tensor:
    """Return where pieces begin, as booleans of the shape of ``position_ids``: (batch, tokens).

    The token there is not to be predicted from the token before it, which belongs to another document.

    Examples
    --------
    >>> beginnings(torch.tensor([[0, 1, 2, 0, 1]])).tolist()
    [[True, False, False, True, False]]
    """
    first = torch.ones_like(position_ids[:, :1], dtype=torch.bool)
    return torch.cat([first, position_ids.diff(dim=1) != 1], dim=1)


def documents_of(batch: Batch | Tensor) -> list[list[Tensor]]:
    """Return the documents in each row of a batch, without padding, on the CPU.

    Parameters
    ----------
    batch : mapping or torch.Tensor
        Token ids of shape (batch, tokens), or ``input_ids`` with ``attention_mask`` if there is padding, and
        ``position_ids`` if rows are packed.

    Returns
    -------
    list of list of torch.Tensor
        Without rows of padding alone.

    Examples
    --------
    >>> ids, mask = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 0]]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]])
    >>> documents_of({"input_ids": ids, "attention_mask": mask})
    [[tensor([5, 6])], [tensor([7, 8, 9])]]
    >>> documents_of({"input_ids": ids[1:], "position_ids": torch.tensor([[0, 1, 0, 1]])})
    [[tensor([7, 8]), tensor([9, 0])]]
    """
    given = {"input_ids": batch} if isinstance(batch, Tensor) else batch
    ids, mask = given["input_ids"].cpu(), real_tokens(given)
    every = torch.ones_like(ids, dtype=torch.bool)
    begins = ~every  # of the first tokens of rows it says nothing
    begins[:, 1:] = ~predicted_tokens(every, given.get("position_ids"))
    found = []
    for row, tokens in enumerate(ids):
        real = every[row] if mask is None else mask[row].cpu().bool()
        edges = begins[row][real][1:].nonzero().flatten() + 1
        found.append(list(tokens[real].tensor_split(edges)))
    return [documents for documents in found if len(documents[0])]
