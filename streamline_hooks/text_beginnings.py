"""Beginnings of a text that is given as batches, for a model to write on from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from streamline_hooks.batch import Batch
from streamline_hooks.calibration.packing import beginnings


def text_beginnings(tokenizer: Any, batches: Sequence[Batch | Tensor], *, count: int, length: int) -> list[str]:
    """The first tokens of some rows, evenly spread over them.

    Parameters
    ----------
    tokenizer : transformers.PreTrainedTokenizerBase
    batches : sequence of mapping or torch.Tensor
        Token ids of shape (batch, tokens). Of packed rows only what their first document has is taken.
    count : int
        At most so many; fewer where there are fewer rows.
    length : int
        In tokens.

    Returns
    -------
    list of str
        Without special tokens.
    """
    rows = [row for batch in batches for row in _first_pieces(batch)]
    taken = min(count, len(rows))
    starts = [rows[k * len(rows) // taken] for k in range(taken)]
    return [tokenizer.decode(row[:length], skip_special_tokens=True) for row in starts]


def _first_pieces(batch: Batch | Tensor) -> list[Tensor]:
    """The rows of a batch, of packed ones what their first document has."""
    if isinstance(batch, Tensor):
        return list(batch)
    if "position_ids" not in batch:
        return list(batch["input_ids"])
    lengths = [int((*own.nonzero().flatten().tolist(), len(own))[1]) for own in beginnings(batch["position_ids"])]
    return [row[:length] for row, length in zip(batch["input_ids"], lengths, strict=True)]
