"""Sum statistics over batches, running no block and no head that they do not need."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from torch import Tensor, nn

from streamline_hooks.batch import Batch
from streamline_hooks.errors import StreamlineError, UnsupportedSurgery
from streamline_hooks.layouts import USUAL, by_token, layout_of
from streamline_hooks.passes import recorded
from streamline_hooks.recorder import HiddenStateRecorder
from streamline_hooks.stack import find_stack
from streamline_hooks.statistics.bootstrap import poisson_weights
from streamline_hooks.statistics.content import sequence_contents
from streamline_hooks.statistics.identity import identity
from streamline_hooks.statistics.moments import WindowMoments
from streamline_hooks.statistics.profile import Profile


def profile(
    model: nn.Module,
    batches: Sequence[Batch | Tensor],
    *,
    tokens: Literal["all", "last"] | Sequence[Tensor] = "all",
    skip: int = 0,
    keep: Iterable[int] = (),
    replicates: int = 100,
    stack: str | None = None,
) -> Profile:
    """Compare every two places of the residual stream in one pass, which ends after the last block that may go.

    Parameters
    ----------
    model : torch.nn.Module
    batches : sequence of mapping or torch.Tensor
        What the model's forward takes.
    tokens : {"all", "last"} or sequence of torch.Tensor
        Which tokens count: all real ones, the last real one of each sequence, or, given one boolean mask of shape
        (batch, tokens) for each batch, those of the real ones that are chosen. The angular distance of the last real
        token is measured whatever is chosen.
    skip : int
        Leave out this many real tokens at the beginning of each sequence, which may be attention sinks.
    keep : iterable of int
        Blocks that must stay; negative numbers count from the end. Those at the end of the stack are not run, and the
        profile has no windows that reach into them.
    replicates : int
        Number of resamples of the sequences for confidence intervals; 0 for none.
    stack : str, optional
        Path of the stack, see `find_stack`.

    Returns
    -------
    Profile
        Of L + 1 places, if no block at the end must stay; the last is then the last block's own output, before the
        final norm.

    Raises
    ------
    StreamlineError
        If an argument does not fit the model or the batches, or a state is not finite.

    Examples
    --------
    >>> import torch
    >>> from streamline_hooks.testing import tiny_model
    >>> model = tiny_model("llama")
    >>> found = profile(model, [torch.arange(3, 43).view(4, 10)], keep=[-1])
    >>> found.places, found.length, found.tokens
    (8, 8, 40)
    """
    batches = list(batches)
    masks = None if isinstance(tokens, str) else list(tokens)
    if isinstance(tokens, str) and tokens not in ("all", "last"):
        raise StreamlineError(f"tokens={tokens!r} is unknown; expected 'all', 'last' or one mask for each batch.")
    if masks is not None and len(masks) != len(batches):
        raise StreamlineError(f"tokens holds {len(masks)} masks for {len(batches)} batches; give one for each.")
    if skip < 0 or replicates < 0:
        raise StreamlineError(f"skip={skip} and replicates={replicates} must be 0 or more.")
    found = find_stack(model, stack)
    reach = _reach(keep, len(found))
    if reach == len(found):
        record = HiddenStateRecorder(model, stop=True, stack=found.path)
    else:  # what enters the first block that is not run
        record = HiddenStateRecorder(model, range(reach + 1), outputs=False, stop=True, stack=found.path)
    chosen = tokens if isinstance(tokens, str) else "mask"
    result = Profile(reach + 1, replicates=replicates, about={**identity(found), "tokens": chosen, "skip": skip})
    cost = f"profile: {reach} of {len(found)} blocks, no head"
    for number, (batch, (_, real, _)) in enumerate(zip(batches, recorded(model, batches, record, cost), strict=True)):
        states = [by_token(record.inputs[k][0], found[k]) for k in record.blocks]
        if record.outputs:
            states.append(by_token(record.outputs[reach - 1][0], found[reach - 1]))
        counted = _counted(real, chosen, skip, None if masks is None else masks[number])
        weights = poisson_weights(sequence_contents(found, batch, real), replicates) if replicates else None
        result.update(states, counted, real=real, weights=weights)
    return result


def measure_moments(
    model: nn.Module,
    batches: Sequence[Batch | Tensor],
    windows: Sequence[range],
    *,
    stack: str | None = None,
    weighted: bool = True,
    what: str = "moments",
) -> list[WindowMoments]:
    """Sum the moments of several windows in one pass, which ends after the last block that any of them needs.

    Parameters
    ----------
    model : torch.nn.Module
    batches : sequence of mapping or torch.Tensor
        What the model's forward takes.
    windows : sequence of range
    stack : str, optional
        Path of the stack, see `find_stack`.
    weighted : bool
        See `WindowMoments`.
    what : str
        What the bar says, before what it costs.

    Returns
    -------
    list of WindowMoments
        One a window.

    Raises
    ------
    UnsupportedSurgery
        If the states are not laid out as (batch, tokens, features).
    StreamlineError
        If a state is not finite.
    """
    needed = {w.start for w in windows} | {w.stop - 1 for w in windows}
    record = HiddenStateRecorder(model, sorted(needed), stop=True, stack=stack)
    moments: list[WindowMoments] = []
    cost = f"{what}: {len(windows)} windows, {max(needed) + 1} of {len(record.stack)} blocks"
    unusual = {layout_of(record.stack[k]) for k in needed} - {USUAL}
    if unusual:
        raise UnsupportedSurgery(
            f"The states of {type(model).__name__} are laid out as ({', '.join(unusual.pop().split())}); a map of "
            "(batch, tokens, features) has no moments there. Remove without a repair (kind none)."
        )
    for _, mask, _ in recorded(model, batches, record, cost):
        features = record.inputs[windows[0].start][0].shape[-1]
        moments = moments or [WindowMoments(features, weighted) for _ in windows]
        for window, sums in zip(windows, moments, strict=True):
            sums.update(record.inputs[window.start][0], record.outputs[window.stop - 1][0], mask)
    return moments


def _reach(keep: Iterable[int], length: int) -> int:
    """How many blocks have to be run: those at the end that must stay need not."""
    given = list(keep)
    wrong = [k for k in given if not -length <= k < length]
    if wrong:
        raise StreamlineError(f"keep={wrong[0]} is out of range: the stack has {length} blocks, 0 to {length - 1}.")
    free = set(range(length)) - {k % length for k in given}
    if not free:
        raise StreamlineError(f"All {length} blocks must stay; keep fewer, or there is nothing to profile.")
    return max(free) + 1


def _counted(real: Tensor, tokens: str, skip: int, mask: Tensor | None) -> Tensor:
    """The tokens that count, of shape (batch, tokens)."""
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
