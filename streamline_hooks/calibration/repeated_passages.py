"""Repeat passages in calibration text, so that blocks are also chosen on what a model copies from context."""

from __future__ import annotations

from dataclasses import replace
from math import ceil

from torch import Tensor

from streamline_hooks.calibration.split import TokenSplit, fingerprint_of
from streamline_hooks.errors import StreamlineError

_PARTS, _ROUNDING = ("calibration", "validation"), 1e-9


def with_repeated_passages(split: TokenSplit, share: float) -> TokenSplit:
    """Replace the second half of some sequences by their first half.

    Models continue such text by induction (arXiv 2209.11895). In prose that is a small part of the loss, so the removal
    of a window that hardly changes prose may destroy it.

    Parameters
    ----------
    split : TokenSplit
        Calibration and validation are changed; test is not.
    share : float
        Share of the sequences of each part, evenly spread from the first; above 0, at most 1.

    Raises
    ------
    StreamlineError
        If the share is out of range, a sequence is shorter than four tokens, or the rows are packed.

    Examples
    --------
    >>> import torch
    >>> rows = torch.arange(16).view(2, 8)
    >>> with_repeated_passages(TokenSplit(rows, rows, rows, fingerprint=""), 0.5).calibration[0].tolist()
    [0, 1, 2, 3, 0, 1, 2, 3]
    """
    if not 0 < share <= 1:
        raise StreamlineError(
            f"A share of {share:g} of the sequences cannot repeat themselves; expected 0 < share <= 1."
        )
    if split.positions:
        raise StreamlineError(
            "Packed rows hold several documents, of which half a row is no passage. Leave the repeated passages out "
            "(repeated=0), or give documents."
        )
    if split.sequence_length < 4:
        raise StreamlineError(
            f"Sequences of {split.sequence_length} tokens have no passage to repeat; expected four tokens or more."
        )
    parts = {name: _repeated(getattr(split, name), share) for name in _PARTS}
    said = ", ".join(f"{count} of {len(rows)} {name} sequences" for name, (rows, count) in parts.items())
    return replace(
        split,
        calibration=parts["calibration"][0],
        validation=parts["validation"][0],
        fingerprint=fingerprint_of(parts["calibration"][0]),
        notes=(*split.notes, f"the second half of {said} repeats the first"),
    )


def _repeated(rows: Tensor, share: float) -> tuple[Tensor, int]:
    """Return the rows, and how many of them are changed."""
    due = [ceil(k * share - _ROUNDING) for k in range(len(rows) + 1)]  # of the first k
    chosen = [k for k in range(len(rows)) if due[k + 1] > due[k]]
    half, made = rows.shape[1] // 2, rows.clone()
    made[chosen, half : 2 * half] = rows[chosen, :half]
    return made, len(chosen)
