"""Measure gradient norms at every boundary of a stack, also if a forward skips blocks."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from streamline_hooks.read_hook import in_backward
from streamline_hooks.stack import BlockStack


class GradientProbe:
    """Sum the squared norm of the gradient that passes a state, whatever runs the backward.

    The state passes an autograd function whose backward adds the squared norm to the gradient of a scalar. So it
    accumulates over micro-batches, is right under both kinds of gradient checkpointing, and compiles without hooks. Two
    backwards through one state (``retain_graph=True``) each pass a part of the gradient, whose squares do not add up:
    the sum is NaN, except in a compiled model, which does not notice.
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
    """One `GradientProbe` before block 0 and behind each block.

    A skipped block passes on its input, so one state may belong to several boundaries. Where blocks were skipped and
    the boundaries cannot be assigned, they report NaN: the last blocks if the model skips them itself (LayerDrop), and
    skipped blocks under reentrant gradient checkpointing, which builds each block's graph in the backward. A compiled
    model is taken to run all blocks.
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
        """Return the summed squares at each boundary since the last call: None without a gradient, NaN if unknown."""
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
