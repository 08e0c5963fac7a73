"""From sources of any size to packed rows of tokens: each process's own, and no more than is asked for."""

from __future__ import annotations

import hashlib
import math
from bisect import bisect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from streamline_hooks.calibration.packing import Packer, Row
from streamline_hooks.calibration.streaming import content_digest, stream_documents
from streamline_hooks.distributed import Processes, here, together
from streamline_hooks.errors import StreamlineError
from streamline_hooks.passes import progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_Chooser = Callable[[str], str]
_Encoded = tuple[list[int], bool]

_DOCUMENTS_PER_PART = 4
_CHARACTERS_PER_TOKEN = 16  # more than text has


@dataclass(frozen=True, eq=False)
class PackedText:
    """Full rows of documents.

    Attributes
    ----------
    input_ids, position_ids : torch.IntTensor
        Of shape (rows, sequence_length). Positions begin again with each piece of a document.
    documents : int
        That the rows were made of.
    cuts : int
        How often one of them was cut, in order that no place is padding; what is cut off goes on as a piece of its
        own, and only what a document has beyond its share is left out.
    note : str
        Where the source ended before there were as many tokens as were asked for: how many there are.
    """

    input_ids: Tensor
    position_ids: Tensor
    documents: int
    cuts: int
    note: str = ""

    def batches(self, batch_size: int) -> list[dict[str, Tensor]]:
        """Batches for `profile`, `measure_moments`, `fit_windows` and whatever else runs a model.

        Parameters
        ----------
        batch_size : int

        Returns
        -------
        list of dict
            With ``input_ids`` and ``position_ids`` of shape (batch, tokens), int64; see `packed_batches`.
        """
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
    """Read documents until there are enough tokens, and pack them into this process's rows.

    Which part a document belongs to is drawn by its content and the seed, so that no two parts share one, whatever
    process reads it and wherever it is repeated. Unlike `split_documents`, it is not looked for paragraphs that two
    documents share. A document gives at most a quarter of a process's part, or one row where that is more.

    Only token numbers are kept, 8 bytes each with their positions, and the documents that a shuffle holds. Of several
    processes each has its own rows, of documents that no other has; hand them on with ``share=False``. Where a process
    stops depends on how many there are, and so do the rows.

    Parameters
    ----------
    source : str, Path or a sequence of them
        See `read_documents` and `stream_documents`.
    tokenizer : PreTrainedTokenizerBase
        Called as ``tokenizer(text, add_special_tokens=special_tokens, verbose=False)``.
    tokens : mapping of str to int
        Size of each part over all processes, rounded down to full rows, such as ``{"calibration": 41_000}``.
    sequence_length : int
        Tokens in a row.
    special_tokens : bool
        Whether each document gets those that its tokenizer adds, such as a BOS; a piece that was cut off has none.
    shuffle, seed, remember
        See `stream_documents`; the seed also deals the documents to parts.
    buffer : int
        See `pack`.
    processes : Processes, optional
        Which process this is. By default what `streamline_hooks.distributed.here` says, and then all of them fail if
        one does.

    Returns
    -------
    dict of str to PackedText
        One a part. A process has no rows where there are fewer than processes.

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
    _check(tokens, sequence_length)
    this = processes or here()
    chooser, encode = _chooser(tokens, seed), _encoder(tokenizer, special_tokens)
    parts = {
        name: _Part(len(range(this.rank, size // sequence_length, this.count)), Packer(sequence_length, buffer))
        for name, size in tokens.items()
    }
    with together("packed_text") if processes is None else nullcontext() as work:
        documents = stream_documents(source, shuffle=shuffle, seed=seed, remember=remember, processes=this)
        _fill(parts, documents, chooser, encode)
        packed = {name: part.end(name, this) for name, part in parts.items()}
        if work is not None:
            work.tell(None)  # where the others wait, if one fails
    return packed


class _Part:
    """The rows of one part that this process is to make."""

    def __init__(self, rows: int, packer: Packer) -> None:
        self.wanted, self.packer = rows * packer.length, packer
        self.most = max(packer.length, math.ceil(self.wanted / _DOCUMENTS_PER_PART))
        self.ids = torch.empty(rows, packer.length, dtype=torch.int32)
        self.positions = torch.empty_like(self.ids)
        self.full_rows = self.documents = self.shortened = 0

    @property
    def taken(self) -> int:
        """Tokens that are in rows or wait for one."""
        return self.full_rows * self.packer.length + self.packer.waiting

    @property
    def room(self) -> int:
        """How many tokens the next document may have."""
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


def _fill(
    parts: Mapping[str, _Part], documents: Iterator[str], chooser: _Chooser, encode: Callable[[str, int], _Encoded]
) -> None:
    """Read until every part is full, and show how far it is."""
    with progress(sum(part.wanted for part in parts.values()), "read and pack") as bar:
        while any(part.room for part in parts.values()):
            if (document := next(documents, None)) is None:
                return
            part = parts[chooser(document)]
            if limit := part.room:
                ids, whole = encode(document, limit)
                part.add(ids, whole)
                bar.update(len(ids))


def _chooser(tokens: Mapping[str, int], seed: int) -> _Chooser:
    """Deal documents to parts as their sizes are to one another, by nothing but content and seed."""
    bounds = list(accumulate(tokens.values()))
    names = list(tokens)

    def choose(document: str) -> str:
        drawn = hashlib.blake2b(b"%d " % seed + content_digest(document), digest_size=8).digest()
        return names[bisect(bounds, int.from_bytes(drawn) * bounds[-1] >> 64)]

    return choose


def _encoder(tokenizer: PreTrainedTokenizerBase, special_tokens: bool) -> Callable[[str, int], _Encoded]:
    """Tokenise a text up to a limit, and of a very long one no more than is used."""

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=special_tokens, verbose=False)["input_ids"])

    def limited(text: str, limit: int) -> _Encoded:
        start = text[: _CHARACTERS_PER_TOKEN * limit]
        ids = encode(start)
        # Twice as many as are used, so the word that the cut went through is far behind them.
        if len(start) < len(text) and len(ids) < 2 * limit:
            start, ids = text, encode(text)
        return ids[:limit], len(start) == len(text) and len(ids) <= limit

    return limited


def _check(tokens: Mapping[str, int], length: int) -> None:
    if not tokens:
        raise StreamlineError('No part was asked for; expected sizes by name, such as {"calibration": 41_000}.')
    for name, size in tokens.items():
        if length < 1 or size < length:
            raise StreamlineError(
                f"{size:,} tokens for the part {name!r} with sequence_length={length}: expected a positive sequence "
                f"length and at least one row in each part. Ask for {max(length, 1):,} tokens or more, or for a "
                "smaller --sequence-length."
            )
