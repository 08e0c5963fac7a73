"""Sum statistics over batches, running no block and no head that they do not need."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from streamline_hooks.batch import Batch
from streamline_hooks.errors import UnsupportedSurgery
from streamline_hooks.layouts import USUAL, by_token, layout_of
from streamline_hooks.passes import recorded
from streamline_hooks.recorder import HiddenStateRecorder
from streamline_hooks.statistics.moments import WindowMoments
from streamline_hooks.statistics.similarity import StateSimilarity


def measure_similarity(
    model: nn.Module, batches: Sequence[Batch | Tensor], *, stack: str | None = None
) -> StateSimilarity:
    """Compare every two places of the residual stream in one pass, which ends after the last block.

    Parameters
    ----------
    model : torch.nn.Module
    batches : sequence of mapping or torch.Tensor
        What the model's forward takes.
    stack : str, optional
        Path of the stack, see `find_stack`.

    Returns
    -------
    StateSimilarity
        Of the L + 1 states; the last is the last block's own output, before the final norm.

    Raises
    ------
    StreamlineError
        If a state is not finite, or is not laid out as (batch, tokens, features).
    """
    record = HiddenStateRecorder(model, stop=True, stack=stack)
    last = len(record.stack) - 1
    similarity = StateSimilarity(last + 2)
    for _, mask, _ in recorded(model, batches, record, f"rank: {last + 1} blocks"):
        states = [*(record.inputs[k][0] for k in range(last + 1)), record.outputs[last][0]]
        blocks = [*record.stack.blocks, record.stack[last]]
        similarity.update([by_token(state, block) for state, block in zip(states, blocks, strict=True)], mask)
    return similarity


def measure_moments(
    model: nn.Module,
    batches: Sequence[Batch | Tensor],
    windows: Sequence[range],
    *,
    stack: str | None = None,
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
        moments = moments or [WindowMoments(features) for _ in windows]
        for window, sums in zip(windows, moments, strict=True):
            sums.update(record.inputs[window.start][0], record.outputs[window.stop - 1][0], mask)
    return moments
