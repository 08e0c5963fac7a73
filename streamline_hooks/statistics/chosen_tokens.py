"""Choose the tokens that a profile counts, and the blocks that must run for them."""

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
    """Return how many blocks must run: protected blocks at the end need not."""
    free = set(range(length)) - set(block_numbers(keep, length, "keep"))
    if not free:
        raise StreamlineError(f"All {length} blocks must stay; keep fewer, or there is nothing to profile.")
    return max(free) + 1


def counted_tokens(real: Tensor, tokens: str, skip: int, mask: Tensor | None) -> Tensor:
    """Return the tokens that count among the real ones, boolean of shape (batch, tokens).

    The first `skip` real tokens of each sequence do not count; with ``tokens="last"`` only the last one does.
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
