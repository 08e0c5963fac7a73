"""AdamW for vectors and Muon for matrices, as one optimizer, for `benchmarks.retained_quality`.

`torch.optim.Muon` takes matrices only and orthogonalizes in bfloat16, which is slow on a CPU without it. Here the
iteration runs in the dtype of the weights, with the coefficients of PyTorch. The learning rate of a matrix is scaled by
0.2·√max(rows, columns), with which updates are as large as those of AdamW (arXiv 2502.16982).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_COEFFICIENTS, _STEPS, _MOMENTUM = (3.4445, -4.7750, 2.0315), 5, 0.95


class MuonWithAdamW(torch.optim.AdamW):
    """Update matrices by Muon with Nesterov momentum, and all other parameters by AdamW."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Make one step."""
        gradients = {}
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.ndim == 2 and parameter.grad is not None:
                    gradients[parameter], parameter.grad = parameter.grad, None  # AdamW passes over it
        super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter in gradients:
                    self._update(parameter, gradients[parameter], group["lr"], group["weight_decay"])
                    parameter.grad = gradients[parameter]

    def _update(self, matrix: Tensor, gradient: Tensor, rate: float, decay: float) -> None:
        momentum = self.state[matrix].setdefault("momentum", torch.zeros_like(matrix))
        momentum.lerp_(gradient, 1 - _MOMENTUM)
        update = orthogonalized(gradient.lerp(momentum, _MOMENTUM))
        matrix.mul_(1 - rate * decay)
        matrix.add_(update, alpha=-rate * 0.2 * math.sqrt(max(matrix.shape)))


def orthogonalized(matrix: Tensor) -> Tensor:
    """Return a matrix with the same singular vectors and singular values near 1, by the Newton–Schulz iteration."""
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if is_tall else matrix
    x = x / x.norm().clamp_min(1e-7)
    a, b, c = _COEFFICIENTS
    for _ in range(_STEPS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if is_tall else x


@contextmanager
def muon_instead_of_adamw() -> Iterator[None]:
    """Let training runs inside this context use Muon for matrices."""
    adamw = torch.optim.AdamW
    torch.optim.AdamW = MuonWithAdamW  # type: ignore[misc]
    try:
        yield
    finally:
        torch.optim.AdamW = adamw  # type: ignore[misc]
