"""Measure gradient norms at every boundary of a block stack, including forwards that skip blocks."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from streamline_hooks.modeling import BlockStack


class GradientProbe:
    """Sum the squared norms of the gradients with respect to a hidden state.

    The state passes an autograd function whose backward adds the squared norm to the gradient of a scalar. The sum
    therefore accumulates over micro-batches, is correct under both kinds of gradient checkpointing, and compiles
    without hooks. Two backwards through one state (``retain_graph=True``) each pass only a part of the gradient, so
    their squared norms cannot be added: the sum is NaN. In a compiled model this case is not detected.
    """

    def __init__(self, device: torch.device) -> None:
        self._total = torch.zeros((), dtype=torch.float32, device=device, requires_grad=True)

    def __call__(self, state: Tensor) -> Tensor:
        """Return a copy of the state whose gradient is measured."""
        copied: Tensor = _SumSquares.apply(state, self._total)
        return copied

    def pop(self) -> float | None:
        """Return and reset the sum: None without a gradient, NaN after two backwards through one state."""
        total, self._total.grad = self._total.grad, None
        return None if total is None else float(total)


class _SumSquares(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, state: Tensor, total: Tensor) -> Tensor:
        return state.clone()  # not a view, because some blocks modify their input in place

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        (gradient,) = gradients
        square = torch.linalg.vector_norm(gradient, dtype=torch.float32).square()
        if not torch.compiler.is_compiling() and torch._C._will_engine_execute_node(ctx.next_functions[1][0]):
            square = torch.full_like(square, torch.nan) if getattr(ctx, "was_summed", False) else square
            ctx.was_summed = True  # not reached by autograd.grad with respect to other tensors
        return gradient, square


class BoundaryProbes:
    """Gradient probes before block 0 and after each block.

    A skipped block returns its input, so one state may belong to several boundaries. Boundaries that cannot be assigned
    report NaN: after the last blocks if the model itself skips them (LayerDrop), and after skipped blocks under
    reentrant gradient checkpointing, which builds the graph of each block in the backward. A compiled model is assumed
    to run all blocks.
    """

    def __init__(self, stack: BlockStack) -> None:
        self._container, self._blocks = stack.container, stack.blocks
        devices = [device_of_block(block) for block in stack.blocks]
        self._probes = [GradientProbe(device) for device in (devices[0], *devices)]
        self._reached = 0  # boundaries probed so far in the current forward
        self._unknown: set[int] = set()
        self._deferred = [0] * len(stack)  # forwards of a block without a graph, which is built in the backward
        self._recomputed = [0] * len(stack)  # runs of a block in the backward

    def begin(self) -> None:
        """Start a forward."""
        if not torch.compiler.is_compiling() and self._reached:
            self._unknown.update(range(self._reached, len(self._probes)))
        self._reached = 0

    def enter(self, k: int, state: Tensor, recomputed: bool = False) -> Tensor:
        """Probe the input of block k, for each boundary up to block k that has no state yet."""
        if torch.compiler.is_compiling() or recomputed or k == 0:
            return self._probed(state, [0] if k == 0 else [])
        return self._probed(state, range(self._reached, k + 1), skipped=True)

    def leave(self, k: int, state: Tensor, recomputed: bool = False) -> Tensor:
        """Probe the output of block k."""
        if torch.compiler.is_compiling():
            if not recomputed:  # other blocks of a partly compiled model run uncompiled
                self._reached = k + 2
            return self._probed(state, [k + 1])
        if recomputed:
            self._recomputed[k] += state.requires_grad
            return self._probed(state, [k + 1])
        is_last = next(reversed(self._container._modules.values())) is self._blocks[k]
        self._reached = len(self._probes) if is_last else k + 2
        self._deferred[k] += not torch.is_grad_enabled()
        state = self._probed(state, [k + 1])
        return self._probed(state, range(k + 2, self._reached), skipped=True)

    def pop(self) -> list[float | None]:
        """Return and reset the sum of squares at each boundary: None without a gradient, NaN if unknown."""
        self.begin()
        for k, (recomputed, deferred) in enumerate(zip(self._recomputed, self._deferred, strict=True)):
            if recomputed > deferred > 0:  # two backwards, each of which built a graph
                self._unknown.update([k + 1] if k else [0, 1])
        squares = [probe.pop() for probe in self._probes]
        squares = [math.nan if k in self._unknown else square for k, square in enumerate(squares)]
        self._unknown = set()
        self._deferred, self._recomputed = [0] * len(self._blocks), [0] * len(self._blocks)
        return squares

    def _probed(self, state: Tensor, boundaries: Collection[int], skipped: bool = False) -> Tensor:
        if skipped and not torch.is_grad_enabled():
            self._unknown.update(boundaries)
        elif state.requires_grad:
            for boundary in boundaries:
                state = self._probes[boundary](state)
        return state


def device_of_block(block: nn.Module) -> torch.device:
    """Return the device of a block's parameters."""
    return next((p.device for p in block.parameters()), torch.device("cpu"))
