"""The channels of a window's blocks that add most on text, in one block."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from streamline_hooks.batch import Batch
from streamline_hooks.block_call import BlockCall
from streamline_hooks.branches import Branch, Branches
from streamline_hooks.distributed import together
from streamline_hooks.errors import UnsupportedSurgery
from streamline_hooks.passes import recorded
from streamline_hooks.precision import widen
from streamline_hooks.recorder import HiddenStateRecorder
from streamline_hooks.replacements.channels import Channels, find_channels
from streamline_hooks.replacements.concatenated import concatenate
from streamline_hooks.stack import BlockStack
from streamline_hooks.surgery.silence import branches_in, called

Found = dict[tuple[int, Branch], Channels]


def fill_concatenated(
    branches: Sequence[Branch],
    stack: BlockStack,
    windows: Sequence[range],
    copies: Sequence[nn.Module],
    batches: Sequence[Batch | Tensor],
    probe: Batch | Tensor | None,
    what: str = "",
) -> dict[int, UnsupportedSurgery]:
    """Merge each window's blocks into a copy of its first one, by the channels that are needed most.

    How much a channel is needed is what it adds to the state: ‖a‖·‖w‖, of its activations over all tokens and its
    column of the layer that writes; of a group of heads the root of the sum of their squares.

    Parameters
    ----------
    branches : sequence of branch
        Which are merged; of the others the copy's own stays.
    stack : BlockStack
        Of the model as it is.
    windows : sequence of range
    copies : sequence of torch.nn.Module
        Of each window's first block; they are changed.
    batches : sequence of mapping or torch.Tensor
        What the activations are measured on, in one pass for all windows that ends after the last of their blocks.
    probe : mapping or torch.Tensor, optional
        What to look for branches on in a model that cannot be probed otherwise, without padding.
    what : str
        What the bar says, before what it costs.

    Returns
    -------
    dict of int to UnsupportedSurgery
        By the window's place, why its blocks cannot be merged.
    """
    refused: dict[int, UnsupportedSurgery] = {}
    found: Found = {}
    known: dict[int, Branches] = {}

    def merge_all(tell: Callable[[range, Branch], Tensor], into: Callable[[int], nn.Module]) -> None:
        """Merge every window that was not refused so far, by what is told of a branch of its blocks."""
        left = [place for place in range(len(windows)) if place not in refused]
        with called(stack, sorted({k for place in left for k in windows[place]}), probe) as calls:
            for place in left:
                try:
                    window = windows[place]
                    for k in window:
                        known[k] = known.get(k) or _branches(calls[k])
                        for b in branches:
                            found[k, b] = found.get((k, b)) or find_channels(
                                stack, cast(BlockCall, calls[k]), known[k], b
                            )
                    concatenate(
                        into(place),
                        [cast(BlockCall, calls[k]) for k in window],
                        [known[k] for k in window],
                        {b: [found[k, b] for k in window] for b in branches},
                        {b: tell(window, b) for b in branches},
                    )
                except UnsupportedSurgery as error:
                    refused[place] = error

    def by_turns(window: range, branch: Branch, last: bool = False) -> Tensor:
        places = torch.arange(found[window.start, branch].count)
        turns = (len(window) - 1 - places if last else places) % len(window)
        return (turns == torch.arange(len(window))[:, None]).float()

    # Before anything long is run: whether they can be merged, with units of the first blocks and of the last ones.
    for last in (False, True):
        merge_all(partial(by_turns, last=last), lambda place: copy.deepcopy(copies[place]))
    kept = {k for place, window in enumerate(windows) if place not in refused for k in window}
    if kept:
        measured = measure_needs(stack, {key: one for key, one in found.items() if key[0] in kept}, batches, what)
        with together("choose channels") as work:
            needs = work.of_first(lambda: measured)  # which each has rounded in its own way
        merge_all(lambda window, branch: torch.stack([needs[k, branch] for k in window]), lambda place: copies[place])
    return refused


def measure_needs(
    stack: BlockStack,
    channels: dict[tuple[int, Branch], Channels],
    batches: Sequence[Batch | Tensor],
    what: str = "",
) -> dict[tuple[int, Branch], Tensor]:
    """What each channel adds to the state on text, for branches of blocks, in float64 of shape (units,)."""
    sums = {key: torch.zeros(one.columns(stack[key[0]]).numel(), dtype=torch.float64) for key, one in channels.items()}
    received: dict[tuple[int, Branch], Tensor] = {}

    def keep(key: tuple[int, Branch]) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            received[key] = args[0]

        return hook

    last = max(k for k, _ in channels)
    record = HiddenStateRecorder(stack.model, [last], inputs=False, stop=True, stack=stack.path)
    handles = [
        stack[k].get_submodule(one.writer).register_forward_pre_hook(keep((k, branch)))
        for (k, branch), one in channels.items()
    ]
    try:
        with recorded(stack.model, batches, record, f"channels{what}: {last + 1} of {len(stack)} blocks") as passed:
            for _, mask, _ in passed:
                for key, given in received.items():
                    real = widen(given.reshape(*mask.shape, -1)[mask])
                    sums[key] = sums[key].to(real.device) + real.square().sum(dim=0)
                received.clear()
    finally:
        for handle in handles:
            handle.remove()
    return {key: _of_units(stack[key[0]], one, sums[key]) for key, one in channels.items()}


def _of_units(block: nn.Module, channels: Channels, sums: Tensor) -> Tensor:
    columns = channels.columns(block)
    added = sums * widen(channels.matrix(block)).square().sum(dim=0).to(sums)
    return added[columns.to(added.device)].sum(dim=1).sqrt().cpu()


def _branches(call: BlockCall | UnsupportedSurgery) -> Branches:
    branches = branches_in(call)
    if isinstance(branches, UnsupportedSurgery):
        raise branches
    return branches
