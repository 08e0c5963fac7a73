"""Put documents together into rows of one length, so that no place is padding and none sees another document."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from streamline_hooks.batch import Batch, real_tokens
from streamline_hooks.errors import StreamlineError
from streamline_hooks.predicted import predicted_tokens

Ids = array
Row = list[Ids]
"""The pieces of a row, one after the other; each is a document, or a part of one."""


class Packer:
    """Takes documents, gives full rows.

    A row begins with the piece that has waited longest; then come those that together fill it best. Where something
    is missing still, the longest that waits is cut, and its rest goes on waiting. So every row is full and at most one
    piece is cut for it. A document that is longer than a row is cut into rows first.

    Parameters
    ----------
    length : int
        Tokens in a row.
    buffer : int
        Pieces that wait. The more, the fewer are cut.

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
    """Say which pieces fill a gap best, the first ones where several would do; none of the others fits in the rest."""
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
    """Yield rows of documents; every token is in one of them.

    Parameters
    ----------
    documents : iterable of sequence of int
        Token numbers of each; read as far as rows are asked for, and no further than the buffer reaches.
    sequence_length : int
        Tokens in a row. The last row may have fewer; nothing is padded.
    buffer : int
        Documents that wait for a row that they fit in.

    Yields
    ------
    list of array
        The pieces of a row, as they stand in it.

    Raises
    ------
    StreamlineError
        If a size is less than 1.

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
    """Make batches of rows, whose positions begin again with each piece.

    There is no attention mask: given positions alone, the models of Transformers that know packed rows let no token
    see another document. Others do not; `refuse_crossing` tells.

    Then whatever is a mean or a sum over tokens (`profile`, `measure_moments`, a KL) is that of the documents alone.
    What goes by sequence takes a row for one: intervals, the entropy, and the first and last tokens that are left out
    or chosen. What predicts the text has to leave out the `beginnings`.

    Parameters
    ----------
    rows : iterable of list of sequence of int
        See `pack`.
    batch_size : int
        Rows in a batch; one of another length is a batch of its own.

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
    """Say where a piece begins: wherever a position does not follow the one before it.

    What stands there is not to be predicted from the token before it, which belongs to another document.

    Parameters
    ----------
    position_ids : torch.Tensor
        Of shape (batch, tokens).

    Returns
    -------
    torch.Tensor
        Boolean, of the same shape.

    Examples
    --------
    >>> beginnings(torch.tensor([[0, 1, 2, 0, 1]])).tolist()
    [[True, False, False, True, False]]
    """
    first = torch.ones_like(position_ids[:, :1], dtype=torch.bool)
    return torch.cat([first, position_ids.diff(dim=1) != 1], dim=1)


def documents_of(batch: Batch | Tensor) -> list[list[Tensor]]:
    """The documents in each row of a batch, without padding.

    Parameters
    ----------
    batch : mapping or torch.Tensor
        Token ids of shape (batch, tokens), or ``input_ids`` with what belongs to them: ``attention_mask`` where there
        is padding, ``position_ids`` where rows are packed (see `predicted_tokens` for their shape).

    Returns
    -------
    list of list of torch.Tensor
        On the CPU. A row of padding alone has no part in it.

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
