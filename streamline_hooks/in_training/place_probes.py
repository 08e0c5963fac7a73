"""How large the gradients are at all places of a stack, also where a forward goes without some of its blocks."""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
from torch import Tensor, nn

from streamline_hooks.in_training.gradient_probe import GradientProbe
from streamline_hooks.read_hook import in_backward
from streamline_hooks.stack import BlockStack


class PlaceProbes:
    """One `GradientProbe` a place: before block 0, and behind each block.

    A block that a forward goes without hands on the state that entered it, so that one state may be that of several
    places: of those that were passed over, when the next block is entered, and of those up to the end, when the last
    one that is left in the stack returns. Where blocks were passed over and that is not so, nothing is told of these
    places: of the last ones that a model itself passes over (LayerDrop), and under reentrant gradient checkpointing,
    which makes the graph of each block in the backward, when it is not known any more which ran. A compiled model is
    taken to run all blocks.

    Parameters
    ----------
    stack : BlockStack

    Examples
    --------
    >>> import torch
    >>> from streamline_hooks.stack import find_stack
    >>> from streamline_hooks.testing import tiny_model
    >>> probes = PlaceProbes(find_stack(tiny_model("llama", blocks=3)))
    >>> state = torch.ones(1, 1, 4, requires_grad=True)
    >>> probes.begin()
    >>> state = probes.leave(0, probes.enter(0, state))
    >>> probes.leave(2, probes.enter(2, state)).sum().backward()  # without block 1
    >>> probes.take()
    [4.0, 4.0, 4.0, 4.0]
    """

    def __init__(self, stack: BlockStack) -> None:
        self._container, self._blocks = stack.container, stack.blocks
        devices = [device_of_block(block) for block in stack.blocks]
        self._probes = [GradientProbe(device) for device in (devices[0], *devices)]
        self._reached = 0  # places up to which the states of the forward that runs were probed
        self._untold: set[int] = set()
        self._later = [0] * len(stack)  # runs of a block whose graph is made in the backward
        self._again = [0] * len(stack)  # runs in the backward

    def begin(self) -> None:
        """A forward begins: no block of it has run."""
        if not torch.compiler.is_compiling():
            if self._reached:
                self._untold.update(range(self._reached, len(self._probes)))
            self._reached = 0

    def enter(self, k: int, state: Tensor) -> Tensor:
        """Probe what enters block k where it is the state of a place that has none yet."""
        if torch.compiler.is_compiling() or in_backward() or k == 0:
            return self._probed(state, [0] if k == 0 else [])
        return self._probed(state, range(self._reached, k + 1), passed_over=True)

    def leave(self, k: int, state: Tensor) -> Tensor:
        """Probe what leaves block k."""
        if torch.compiler.is_compiling():
            return self._probed(state, [k + 1])
        if in_backward():
            self._again[k] += state.requires_grad
            return self._probed(state, [k + 1])
        is_last = next(reversed(self._container._modules.values())) is self._blocks[k]
        self._reached = len(self._probes) if is_last else k + 2
        self._later[k] += not torch.is_grad_enabled()
        state = self._probed(state, [k + 1])
        return self._probed(state, range(k + 2, self._reached), passed_over=True)

    def take(self) -> list[float | None]:
        """The summed squares at each place since they were last taken.

        Returns
        -------
        list of float or None
            None where no gradient has passed, NaN where what has cannot be told.
        """
        self.begin()
        found = [probe.take() for probe in self._probes]
        for k, (again, later) in enumerate(zip(self._again, self._later, strict=True)):
            if again > later > 0:  # two backwards, of which each made a graph
                self._untold.update([k + 1] if k else [0, 1])
        told = [math.nan if place in self._untold else square for place, square in enumerate(found)]
        self._untold = set()
        self._later, self._again = [0] * len(self._blocks), [0] * len(self._blocks)
        return told

    def _probed(self, state: Tensor, places: Collection[int], passed_over: bool = False) -> Tensor:
        if passed_over and not torch.is_grad_enabled():
            self._untold.update(places)
        elif state.requires_grad:
            for place in places:
                state = self._probes[place](state)
        return state


def device_of_block(block: nn.Module) -> torch.device:
    """Where a block's parameters are, and so the states that it returns."""
    return next((p.device for p in block.parameters()), torch.device("cpu"))
