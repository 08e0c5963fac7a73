"""Text that says a passage twice: what a model predicts from what stands before it, and prose hardly asks for."""

from __future__ import annotations

from dataclasses import replace
from math import ceil

from torch import Tensor

from streamline_hooks.calibration.split import TokenSplit, fingerprint_of
from streamline_hooks.errors import StreamlineError

_PARTS, _ROUNDING = ("calibration", "validation"), 1e-9


def with_repeated_passages(split: TokenSplit, share: float) -> TokenSplit:
    """Let the second half of some sequences repeat the first.

    A model continues there what it has read once (induction, arXiv 2209.11895), as it does when it copies, counts,
    keeps to names and formats, or quotes. In prose that is a small part of the loss: a window of blocks whose removal
    hardly changes prose may take all of it away. So blocks are chosen on both.

    Parameters
    ----------
    split : TokenSplit
        Its calibration and validation are changed; the test part is not.
    share : float
        Of the sequences of each part, evenly spread from the first one on, which is among them; above 0, at most 1.

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
    """The rows, and how many of them are changed."""
    due = [ceil(k * share - _ROUNDING) for k in range(len(rows) + 1)]  # of the first k
    chosen = [k for k in range(len(rows)) if due[k + 1] > due[k]]
    half, made = rows.shape[1] // 2, rows.clone()
    made[chosen, half : 2 * half] = rows[chosen, :half]
    return made, len(chosen)
