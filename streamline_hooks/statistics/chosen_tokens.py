"""Which tokens a profile counts, and which blocks it has to run for them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from streamline_hooks.arguments import block_numbers
from streamline_hooks.errors import StreamlineError


def chosen_masks(tokens: str | Sequence[Tensor], batches: int) -> tuple[str, Sequence[Tensor | None]]:
    """Return how tokens are chosen ("all", "last" or "mask"), and the mask of each batch where masks were given."""
    if isinstance(tokens, str):
        return tokens, [None] * batches
    if len(tokens) != batches:
        raise StreamlineError(f"tokens holds {len(tokens)} masks for {batches} batches. Expected one for each.")
    return "mask", tokens


def blocks_run(keep: Iterable[int], length: int) -> int:
    """How many blocks have to be run: those at the end that must stay need not.

    Examples
    --------
    >>> blocks_run([0, -1, -2], length=8)
    6
    """
    free = set(range(length)) - set(block_numbers(keep, length, "keep"))
    if not free:
        raise StreamlineError(f"All {length} blocks must stay; keep fewer, or there is nothing to profile.")
    return max(free) + 1


def counted_tokens(real: Tensor, tokens: str, skip: int, mask: Tensor | None) -> Tensor:
    """The tokens that count, of those that are no padding; boolean, of shape (batch, tokens).

    Parameters
    ----------
    real : torch.Tensor
        Which tokens are no padding, of shape (batch, tokens).
    tokens : str
        "last" for each sequence's last real token; anything else for all.
    skip : int
        Real tokens that are left out at the beginning of each sequence.
    mask : torch.Tensor or None
        Which of them are chosen, of shape (batch, tokens).
    """
    order = real.cumsum(dim=1)
    counted = real & (order > skip)
    if tokens == "last":
        counted &= order == order[:, -1:]
    if mask is not None:
        if mask.shape != real.shape:
            raise StreamlineError(
                f"A mask in tokens has the shape {tuple(mask.shape)}; its batch has {tuple(real.shape)} (batch, "
                "tokens). Give one entry a token."
            )
        counted &= mask.to(real.device).bool()
    return counted
