"""The RMS norm through which a branch reads the residual stream."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from streamline_hooks.branches import Branch, tolerance
from streamline_hooks.errors import UnsupportedSurgery


@dataclass(frozen=True)
class BranchNorm:
    """A norm h ↦ h·w / √(mean(h²) + ε).

    Attributes
    ----------
    weight : torch.Tensor
        w, of shape (features,).
    eps : float
    """

    weight: Tensor
    eps: float

    def __call__(self, state: Tensor) -> Tensor:
        """Normalise a state of shape (..., features)."""
        return F.rms_norm(state, self.weight.shape, self.weight.to(state.device, state.dtype), self.eps)


@contextmanager
def watching_norms(blocks: Mapping[int, nn.Module]) -> Iterator[dict[int, list[tuple[nn.Module, Tensor, Tensor]]]]:
    """Keep what goes in and out of every submodule of blocks that has the looks of a norm, in their last forward."""
    seen: dict[int, list[tuple[nn.Module, Tensor, Tensor]]] = {k: [] for k in blocks}
    handles = []

    def keep(k: int, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        seen[k].append((module, args[0].detach().clone(), output.detach().clone()))

    try:
        for k, block in blocks.items():
            for module in block.modules():
                if isinstance(_eps(module), float) and getattr(getattr(module, "weight", None), "ndim", 0) == 1:
                    handles.append(module.register_forward_hook(lambda m, a, o, k=k: keep(k, m, a, o)))
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def norm_of(k: int, branch: Branch, state: Tensor, seen: list[tuple[nn.Module, Tensor, Tensor]]) -> BranchNorm:
    """The norm that was given the state that enters a branch, once it is sure that it is an RMS norm.

    Parameters
    ----------
    k : int
        The block's number.
    branch : {"attention", "mlp"}
    state : torch.Tensor
        What entered the branch, of shape (batch, tokens, features).
    seen : list
        As `watching_norms` keeps it.

    Raises
    ------
    UnsupportedSurgery
        If no norm was given that state, or what it gave is not that of an RMS norm.
    """
    for module, given, made in seen:
        if given.numel() != state.numel() or not torch.equal(given.reshape(state.shape), state):
            continue
        eps = _eps(module)
        assert eps is not None
        for shift in (0.0, 1.0):  # Gemma's weights are around zero
            norm = BranchNorm(module.get_parameter("weight").detach().clone() + shift, eps)
            bound = max(tolerance(made.dtype), tolerance(torch.float32))  # in which norms compute, of whatever they are
            if (norm(given) - made).abs().max() <= bound * made.abs().max():
                return norm
        raise UnsupportedSurgery(
            f"The {branch} of block {k} reads the state through a {type(module).__name__}, which is no RMS norm. Fit a "
            "map of the state as it is (normed=False).",
            "norm",
        )
    raise UnsupportedSurgery(
        f"The {branch} of block {k} does not read the state through a norm of its own. Fit a map of the state as it is "
        "(normed=False).",
        "norm",
    )


def _eps(module: nn.Module) -> float | None:
    found = [getattr(module, name) for name in ("variance_epsilon", "eps") if hasattr(module, name)]
    return float(found[0]) if found and isinstance(found[0], (int, float)) else None
