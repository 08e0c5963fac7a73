"""Sum statistics over batches, running no block and no head that they do not need."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from streamline_hooks.arguments import checked
from streamline_hooks.batch import Batch, device_of
from streamline_hooks.distributed import DistributedStep, distributed_step
from streamline_hooks.layouts import by_token, require_usual
from streamline_hooks.passes import recorded
from streamline_hooks.precision import float64_device
from streamline_hooks.recorder import HiddenStateRecorder
from streamline_hooks.stack import BlockStack, find_stack
from streamline_hooks.statistics.bootstrap import poisson_weights
from streamline_hooks.statistics.chosen_tokens import blocks_run, chosen_masks, counted_tokens
from streamline_hooks.statistics.content import sequence_contents
from streamline_hooks.statistics.identity import identity
from streamline_hooks.statistics.moments import WindowMoments
from streamline_hooks.statistics.profile import Profile
from streamline_hooks.wrapping import refuse_wrapped


@distributed_step("profile")
@checked(skip=0, replicates=0)
def profile(
    model: nn.Module,
    batches: Sequence[Batch | Tensor],
    *,
    tokens: Literal["all", "last"] | Sequence[Tensor] = "all",
    skip: int = 0,
    keep: Iterable[int] = (),
    replicates: int = 100,
    stack: str | None = None,
    share: bool = True,
) -> Profile:
    """Compare every two places of the residual stream in one pass, which ends after the last block that may go.

    A place has one state, that which its block's own computation receives: where an earlier surgery put a module
    between two blocks, that behind it, for a window that ends there too. (What is fitted and judged is what leaves the
    window.)

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
    share : bool
        Where several processes measure together (an initialised `torch.distributed` group): whether each was given
        all batches, and runs its share of them (the default), or has batches of its own. Every process returns the
        same, of all batches. For what one process is to do by itself there is `streamline_hooks.distributed.alone`.

    Returns
    -------
    Profile
        Of L + 1 places, if no block at the end must stay; the last is then the last block's own output, before the
        final norm.

    Raises
    ------
    StreamlineError
        If an argument does not fit the model or the batches, or a state is not finite; or, of several processes, in
        all of them if one fails, is gone, or was given something else.

    Examples
    --------
    >>> import torch
    >>> from streamline_hooks.testing import tiny_model
    >>> model = tiny_model("llama")
    >>> found = profile(model, [torch.arange(3, 43).view(4, 10)], keep=[-1])
    >>> found.places, found.length, found.tokens
    (8, 8, 40)
    """
    with distributed_step("profile") as work:
        batches = list(batches)
        chosen, masks = chosen_masks(tokens, len(batches))
        found = find_stack(model, stack)
        reach = blocks_run(keep, len(found))
        about = {**identity(found), "tokens": chosen, "skip": skip}
        items = list(zip(batches, masks, strict=True))
        same: dict[str, Any] = {"blocks to run": reach, "tokens": chosen, "skip": skip, "replicates": replicates}
        mine = _part(work, found, items, share, **same)
        result = Profile(reach + 1, replicates=replicates, about=about)
        if reach == len(found):
            record = HiddenStateRecorder(model, stop=True, stack=found.path)
        else:  # what enters the first block that is not run
            record = HiddenStateRecorder(model, range(reach + 1), outputs=False, stop=True, stack=found.path)
        cost = f"profile: {reach} of {len(found)} blocks, no head{_shared(work)}"
        with recorded(model, [batch for batch, _ in mine], record, cost) as passed:
            for (batch, mask), (_, real, _) in zip(mine, passed, strict=True):
                states = [by_token(record.inputs[k][0], found[k]) for k in record.blocks]
                if record.outputs:
                    states.append(by_token(record.outputs[reach - 1][0], found[reach - 1]))
                counted = counted_tokens(real, chosen, skip, mask)
                weights = poisson_weights(sequence_contents(found, batch, real), replicates) if replicates else None
                result.update(states, counted, real=real, weights=weights)
        _add_up_profile(work, result)
        return result


@distributed_step("measure_moments")
@checked()
def measure_moments(
    model: nn.Module,
    batches: Sequence[Batch | Tensor],
    windows: Sequence[range],
    *,
    stack: str | None = None,
    weighted: bool = True,
    what: str = "moments",
    share: bool = True,
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
    share : bool
        As for `profile`.

    Returns
    -------
    list of WindowMoments
        One a window.

    Raises
    ------
    UnsupportedSurgery
        If the states are not laid out as (batch, tokens, features).
    StreamlineError
        If a state is not finite; or, of several processes, as for `profile`.
    """
    with distributed_step("measure_moments") as work:
        needed = {w.start for w in windows} | {w.stop - 1 for w in windows}
        record = HiddenStateRecorder(model, sorted(needed), stop=True, stack=stack)
        advice = "Take blocks out with LayerSurgeon, which fits no map."
        require_usual((record.stack[k] for k in needed), f"measure_moments: {type(model).__name__}", advice)
        mine = _part(work, record.stack, batches, share, windows=list(windows), weighted=weighted)
        moments: list[WindowMoments] = []
        cost = f"{what}: {len(windows)} windows, {max(needed) + 1} of {len(record.stack)} blocks{_shared(work)}"
        with recorded(model, mine, record, cost) as passed:
            for _, mask, _ in passed:
                features = record.inputs[windows[0].start][0].shape[-1]
                moments = moments or [WindowMoments(features, weighted) for _ in windows]
                for window, sums in zip(windows, moments, strict=True):
                    sums.update(record.inputs[window.start][0], record.outputs[window.stop - 1][0], mask)
        widths = work.all_gather_object(len(moments[0].xx) if moments else 0)
        if not moments and max(widths):  # this process's share is empty
            home = float64_device(device_of(model))
            moments = [WindowMoments(max(widths), weighted) for _ in windows]
            for sums in moments:
                sums.xx, sums.xd = sums.xx.to(home), sums.xd.to(home)
        for sums in moments:
            _add_up_moments(work, sums)
        return moments


def _part(work: DistributedStep, stack: BlockStack, items: Sequence[Any], share: bool, **same: Any) -> list[Any]:
    """The batches that this process is to run."""
    if work.processes.count == 1:
        return list(items)
    refuse_wrapped(stack.model)  # whose forwards wait for one another, while shares are uneven
    return work.take(items, share, **{**identity(stack), **same})


def _shared(work: DistributedStep) -> str:
    count = work.processes.count
    return f", one of {count} shares" if count > 1 else ""


def _add_up_profile(work: DistributedStep, result: Profile) -> None:
    if work.processes.count > 1:
        sums = result.sums.state_dict()
        merged = {name: work.all_reduce(v, "MAX" if name == "largest" else "SUM") for name, v in sums.items()}
        result.sums.load_state_dict(merged)


def _add_up_moments(work: DistributedStep, sums: WindowMoments) -> None:
    if work.processes.count > 1:
        sums.xx, sums.xd = work.all_reduce(sums.xx), work.all_reduce(sums.xd)
        counted = work.all_reduce(torch.tensor([sums.tokens, sums.dd], dtype=torch.float64))
        sums.tokens, sums.dd = int(counted[0]), float(counted[1])
