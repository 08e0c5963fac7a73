"""Which tokens a profile counts, and which blocks it has to run for them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from streamline_hooks.errors import StreamlineError


def chosen_masks(
    tokens: str | Sequence[Tensor], batches: int, *, skip: int, replicates: int
) -> tuple[str, list[Tensor] | None]:
    """Look at what a profile was asked for.

    Parameters
    ----------
    tokens : str or sequence of torch.Tensor
        See `profile`.
    batches : int
        How many there are.
    skip, replicates : int
        See `profile`.

    Returns
    -------
    chosen : str
        "all", "last" or "mask".
    masks : list of torch.Tensor or None
        One for each batch, where masks were given.

    Raises
    ------
    StreamlineError
        If an argument is wrong.
    """
    masks = None if isinstance(tokens, str) else list(tokens)
    if isinstance(tokens, str) and tokens not in ("all", "last"):
        raise StreamlineError(f"tokens={tokens!r} is unknown; expected 'all', 'last' or one mask for each batch.")
    if masks is not None and len(masks) != batches:
        raise StreamlineError(f"tokens holds {len(masks)} masks for {batches} batches; give one for each.")
    if skip < 0 or replicates < 0:
        raise StreamlineError(f"skip={skip} and replicates={replicates} must be 0 or more.")
    return (tokens if isinstance(tokens, str) else "mask"), masks


def blocks_run(keep: Iterable[int], length: int) -> int:
    """How many blocks have to be run: those at the end that must stay need not.

    Examples
    --------
    >>> blocks_run([0, -1, -2], length=8)
    6
    """
    given = list(keep)
    wrong = [k for k in given if not -length <= k < length]
    if wrong:
        raise StreamlineError(f"keep={wrong[0]} is out of range: the stack has {length} blocks, 0 to {length - 1}.")
    free = set(range(length)) - {k % length for k in given}
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
