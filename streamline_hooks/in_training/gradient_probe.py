"""How large the gradient is that passes a place of the residual stream."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


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
