"""Sum the second moments that the closed-form repair of a window needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor

from streamline_hooks.core import StreamlineError, to_float64, validate_arguments

_TOKENS_AT_ONCE = 4096


class WindowMoments:
    """Weighted second moments of the state x that enters a window and the state y that leaves it.

    The sums are Σ w xxᵀ, Σ w xδᵀ and Σ w ‖δ‖², with δ = y − x and the weight w = 1/‖y‖² of each token. They determine
    the relative squared error of any linear repair x ↦ x + Wᵀx, the mean of ‖y − x − Wᵀx‖²/‖y‖², without another pass.
    The weight prevents a few tokens with massive activations from dominating the fit. Sums are float64 on the device of
    the states (on the CPU for MPS, which has no float64). Memory is 2·d² numbers for any number of tokens.

    Parameters
    ----------
    features : int
        Width d of the residual stream.
    weighted : bool
        Weight tokens by 1/‖y‖². Otherwise w = 1 and errors are absolute squared norms.

    Examples
    --------
    >>> import torch
    >>> moments = WindowMoments(2)
    >>> x = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    >>> moments.update(x, 2 * x, torch.ones(1, 2))
    >>> moments.error(torch.zeros(2, 2)), moments.error(torch.eye(2))
    (0.25, 0.0)
    """

    @validate_arguments(features=0)
    def __init__(self, features: int, weighted: bool = True) -> None:
        self.weighted = weighted
        self.tokens = 0
        self.xx = torch.zeros(features, features, dtype=torch.float64)
        self.xd = torch.zeros(features, features, dtype=torch.float64)
        self._dd = torch.zeros((), dtype=torch.float64)

    @property
    def dd(self) -> float:
        """The sum Σ w ‖δ‖²."""
        return float(self._dd)

    @dd.setter
    def dd(self, value: float) -> None:
        self._dd = torch.tensor(value, dtype=torch.float64)

    def update(self, entering: Tensor, leaving: Tensor, mask: Tensor, *, relative_to: Tensor | None = None) -> None:
        """Add one batch.

        Parameters
        ----------
        entering, leaving : torch.Tensor
            The states before and after the window, of shape (batch, tokens, features), or (tokens, features) if all
            tokens are in one row.
        mask : torch.Tensor
            The tokens to count, of shape (batch, tokens).
        relative_to : torch.Tensor, optional
            States of the same shape whose norms replace ‖y‖ in the weight. Default: `leaving`.

        Raises
        ------
        StreamlineError
            If the states differ in shape or do not have `features` features.
        """
        all_states = [entering, leaving] if relative_to is None else [entering, leaving, relative_to]
        all_states = [states[None] if states.ndim == mask.ndim else states for states in all_states]
        if entering.shape[-1] != len(self.xx) or len({states.shape for states in all_states}) > 1:
            raise StreamlineError(
                f"Got states of shapes {tuple(entering.shape)} and {tuple(leaving.shape)}. Expected equal shapes with "
                f"{len(self.xx)} features. Pass the states before and after one window."
            )
        real = {states.device: mask.to(states.device).bool() for states in all_states}
        parts = (states[real[states.device]].to(entering.device).split(_TOKENS_AT_ONCE) for states in all_states)
        for x, y, *reference in zip(*parts, strict=True):
            norm = to_float64(*reference or [y]).norm(dim=-1, keepdim=True).clamp_min(1e-300) if self.weighted else 1.0
            x, y = to_float64(x), to_float64(y)
            self.xx, self.xd = self.xx.to(x.device), self.xd.to(x.device)
            x, d = x / norm, (y - x) / norm
            self.xx.addmm_(x.T, x)
            self.xd.addmm_(x.T, d)
            self._dd = self._dd.to(x.device) + d.square().sum()
            self.tokens += len(x)

    def merge(self, other: Self) -> None:
        """Add the sums over other tokens."""
        if other.xx.shape != self.xx.shape or other.weighted != self.weighted:
            raise StreamlineError(
                f"Cannot merge moments with {len(other.xx)} features and weighted={other.weighted} into moments with "
                f"{len(self.xx)} features and weighted={self.weighted}. Expected equal settings. Measure both alike."
            )
        self.tokens += other.tokens
        self.xx = self.xx + other.xx.to(self.xx.device)
        self.xd = self.xd + other.xd.to(self.xd.device)
        self._dd = self._dd + other._dd.to(self._dd.device)

    def error(self, map_: Tensor) -> float:
        """Return the mean relative squared error of the repair x ↦ x + Wᵀx.

        It is (tr Σwδδᵀ − 2 tr WᵀΣwxδᵀ + tr WᵀΣwxxᵀW) / tokens. `map_` is W, of shape (features, features); W = 0 is
        plain removal. Raises `StreamlineError` if no token was counted.
        """
        if not self.tokens:
            raise StreamlineError(
                "No token has been counted. Expected at least one. Call update with a batch that has real tokens."
            )
        w = map_.to(self.xx)
        total = self.dd - 2 * (w * self.xd).sum() + (w * (self.xx @ w)).sum()
        return float(total) / self.tokens

    def state_dict(self) -> dict[str, Any]:
        """Return the sums as tensors and numbers."""
        sums = {"xx": self.xx.clone(), "xd": self.xd.clone(), "dd": self.dd}
        return {"tokens": self.tokens, "weighted": self.weighted, **sums}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the sums from `state_dict`."""
        self.tokens, self.dd, self.weighted = int(state["tokens"]), float(state["dd"]), bool(state["weighted"])
        self.xx, self.xd = state["xx"].clone(), state["xd"].clone()
