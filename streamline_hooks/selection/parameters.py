"""How many parameters leave a model with a window of blocks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

import torch
from torch import nn

from streamline_hooks.repair.folded import Folded, Scaled
from streamline_hooks.repair.stand_in import StandIn
from streamline_hooks.stack import BlockStack
from streamline_hooks.surgery.splice import AFTER, BEFORE, spliced

StandInFor = StandIn | Callable[[range], StandIn]
"""What stands in every window's place, or a function that makes it for a window."""


def parameters_by_window(stack: BlockStack) -> Callable[[range], int]:
    """A function that counts the parameters that leave the model with a window.

    Block k is the place 2k + 1; what an earlier surgery spliced before it is the place 2k, which goes only with the
    blocks on both sides, and what it spliced after the last is the place 2L, which goes with that block. A parameter
    goes when all places that hold it go.
    """
    blocks = {id(block) for block in stack.blocks}
    held: dict[int, tuple[nn.Parameter, set[int]]] = {}
    for k, block in enumerate(stack.blocks):
        before = [p for module in spliced(block, BEFORE) for p in module.parameters()]
        after = [p for module in spliced(block, AFTER) for p in module.parameters()]
        apart = {id(p) for p in (*before, *after)}
        own = [p for p in block.parameters() if id(p) not in apart]
        for place, parameters in ((2 * k, before), (2 * k + 1, own), (2 * k + 2, after)):
            for p in parameters:
                held.setdefault(id(p), (p, set()))[1].add(place)
    for p in _outside(stack.model, blocks):
        held.pop(id(p), None)
    sizes: Counter[tuple[int, int]] = Counter()
    for p, places in held.values():
        sizes[min(places), max(places)] += p.numel()

    def count(window: range) -> int:
        first, last = 2 * window.start + 1, 2 * window.stop - (window.stop < len(stack))
        return sum(size for (low, high), size in sizes.items() if first <= low and high <= last)

    return count


def _outside(module: nn.Module, blocks: set[int]) -> Iterator[nn.Parameter]:
    yield from (p for p in module._parameters.values() if p is not None)
    for child in module._modules.values():
        if child is not None and id(child) not in blocks:
            yield from _outside(child, blocks)


def parameters_of(stand_in: StandInFor, window: range) -> int:
    """The parameters of what stands in a window's place, made on the meta device; what is folded has none."""
    with torch.device("meta"):
        made = made_for(stand_in, window)
    return sum(p.numel() for p in made.parameters()) if isinstance(made, nn.Module) else 0


def made_for(stand_in: StandInFor, window: range) -> StandIn:
    """What stands in a window's place."""
    if stand_in is None or isinstance(stand_in, (nn.Module, Folded, Scaled)):
        return stand_in
    return stand_in(window)
