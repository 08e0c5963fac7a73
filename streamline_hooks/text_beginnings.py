"""Beginnings of a text that is given as batches, for a model to write on from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from streamline_hooks.batch import Batch
from streamline_hooks.calibration.packing import documents_of


def text_beginnings(tokenizer: Any, batches: Sequence[Batch | Tensor], *, count: int, length: int) -> list[str]:
    """The first tokens of some rows, evenly spread over them; of few rows also later pieces that do not overlap.

    Parameters
    ----------
    tokenizer : transformers.PreTrainedTokenizerBase
    batches : sequence of mapping or torch.Tensor
        Token ids of shape (batch, tokens), padded on either side, or packed.
    count : int
        At most so many; fewer where there is too little text.
    length : int
        In tokens.

    Returns
    -------
    list of str
        Without special tokens, and none of these alone.
    """
    rows = [documents for batch in batches for documents in documents_of(batch)]
    pieces = [row[0][:length] for row in rows]
    if len(pieces) < count:
        # As far apart as a beginning is long, so that what is written on one is not what the next one begins with.
        pieces = [document[k : k + length] for row in rows for document in row for k in _places(len(document), length)]
    texts = [text for piece in pieces if (text := tokenizer.decode(piece, skip_special_tokens=True)).strip()]
    taken = min(count, len(texts))
    return [texts[k * len(texts) // taken] for k in range(taken)]


def _places(tokens: int, length: int) -> range:
    """Where the pieces of a document begin: all are whole but for that of a document that is shorter."""
    return range(0, max(1, tokens - length + 1), 2 * length)
