"""How large the gradients are at all places of a stack, also where a forward goes without some of its blocks."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from streamline_hooks.read_hook import in_backward
from streamline_hooks.stack import BlockStack


class GradientProbe:
    """Sum the squares of the gradient that passes a state, whatever runs the backward.

    The state goes through a step of its own in the graph, whose backward hands on the gradient as it is and adds its
    squared norm to the gradient of a number beside it. So it is summed over micro-batches as any parameter's gradient
    is, is right under both kinds of gradient checkpointing, and is compiled with the rest: no hook is called.

    Two backwards through one state (``retain_graph=True``, of losses that are differentiated one by one) each hand on a
    part of its gradient, and the squares of parts do not add up to that of the whole: the sum is NaN then. In a
    compiled model this is not noticed, and the sum is that of the parts' squares.

    Parameters
    ----------
    device : torch.device
        Where the states are.

    Examples
    --------
    >>> probe, state = GradientProbe(torch.device("cpu")), torch.ones(2, 3, 4, requires_grad=True)
    >>> (2 * probe(state)).sum().backward()
    >>> round(probe.take(), 3), state.grad.unique().item()
    (96.0, 2.0)
    """

    def __init__(self, device: torch.device) -> None:
        self._beside = torch.zeros((), dtype=torch.float32, device=device, requires_grad=True)

    def __call__(self, state: Tensor) -> Tensor:
        """Give an equal state, of shape (batch, tokens, features), behind which the gradient is summed."""
        return _Passing.apply(state, self._beside)

    def take(self) -> float | None:
        """The sum since it was last taken; None where no gradient has passed, NaN where one has in parts."""
        found, self._beside.grad = self._beside.grad, None
        return None if found is None else float(found)


class _Passing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, state: Tensor, beside: Tensor) -> Tensor:
        return state.clone()  # not a view: some blocks work on their input in place

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        (gradient,) = gradients
        square = torch.linalg.vector_norm(gradient, dtype=torch.float32).square()
        if not torch.compiler.is_compiling() and torch._C._will_engine_execute_node(ctx.next_functions[1][0]):
            square = torch.full_like(square, torch.nan) if getattr(ctx, "was_summed", False) else square
            ctx.was_summed = True  # where it is: autograd.grad of something else sums nothing
        return gradient, square


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
