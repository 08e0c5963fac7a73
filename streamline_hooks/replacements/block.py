"""Blocks of the model's own class in a window's place: copies of its first ones, which take slots."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from streamline_hooks.batch import Batch
from streamline_hooks.errors import StreamlineError, UnsupportedSurgery
from streamline_hooks.stack import BlockStack
from streamline_hooks.surgery.silence import find_zeros, silent_inside
from streamline_hooks.surgery.splice import AFTER, BEFORE, set_splices


class InheritedBlocks(nn.ModuleList):
    """Several blocks that stand in the place of one window, a slot each.

    They are given to `streamline_hooks.repair.place`, which puts them in one by one; the list itself is never run.
    """

    def __init__(self, blocks: Iterable[nn.Module]) -> None:
        super().__init__(blocks)
        if len(self) < 2:
            raise StreamlineError(f"InheritedBlocks holds {len(self)} blocks; expected two or more. One needs no list.")


def inherit(stack: BlockStack, window: range, count: int = 1) -> nn.Module:
    """Copy the first blocks of a window.

    Parameters
    ----------
    stack : BlockStack
        Of a model that no surgeon has changed: a copy knows which block it was by the number that it bears.
    window : range
    count : int
        How many. The stack becomes shorter by the rest of the window.

    Returns
    -------
    torch.nn.Module
        One block, or `InheritedBlocks`, all parameters of which are trained, but for what was silenced before; without
        what is spliced beside them, and under ``torch.device("meta")`` without memory for the weights.

    Raises
    ------
    UnsupportedSurgery
        If the window has not more blocks than that.
    """
    if not 1 <= count < len(window):
        raise UnsupportedSurgery(
            f"{count} inherited block{'s' * (count != 1)} cannot stand in the place of the {len(window)} from "
            f"{window.start} on: the stack would not become shorter. Choose a longer window, or another kind.",
            "inherited",
        )
    blocks = [_copied(stack[k]) for k in window[:count]]
    return blocks[0] if count == 1 else InheritedBlocks(blocks)


def inherit_silenced(stack: BlockStack, window: range, batch: Batch | Tensor | None = None) -> nn.Module:
    """Copy the first block of a window with an attention that adds nothing.

    The output projection of its attention and the bias are at zero and are not trained, so that it stays a block that
    maps each token by itself; the checkpoint is a plain one.

    Parameters
    ----------
    stack : BlockStack
        As for `inherit`.
    window : range
        Of two blocks at least.
    batch : mapping or torch.Tensor, optional
        What to run a model on that cannot be probed otherwise, without padding.

    Returns
    -------
    torch.nn.Module

    Raises
    ------
    UnsupportedSurgery
        If the block has not the usual two residual branches.
    """
    block = inherit(stack, window)
    zeros = find_zeros(stack, window.start, "attention", batch)
    with torch.no_grad():
        for path in zeros:
            block.get_parameter(path).zero_().requires_grad_(False)
    return block


def _copied(block: nn.Module) -> nn.Module:
    """A copy of a block alone, to be trained."""
    memo: dict[int, object] = {}
    if torch.empty(0).is_meta:
        memo = {
            id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.is_floating_point()) for p in block.parameters()
        }
    duplicate = copy.deepcopy(block, memo)
    for place in (BEFORE, AFTER):
        set_splices(duplicate, place, [])
    silent = silent_inside(block)
    held = dict(block.named_parameters())
    for name, parameter in duplicate.named_parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(id(held[name]) not in silent)
    return duplicate
