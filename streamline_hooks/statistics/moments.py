"""The second moments that a closed-form repair of a window needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor

from streamline_hooks.errors import StreamlineError
from streamline_hooks.statistics.precision import widen

_TOKENS_AT_ONCE = 4096


class WindowMoments:
    """Weighted second moments of the state x that enters a window and the state y that leaves it.

    With δ = y − x and each token's weight w = 1/‖y‖², it sums Σ w xxᵀ, Σ w xδᵀ and Σ w ‖δ‖². Then the relative
    squared error of any linear repair x ↦ x + Wᵀx, the mean of ‖y − x − Wᵀx‖²/‖y‖², is known without another pass.
    The weight keeps a few tokens with massive activations from ruling the fit.

    Parameters
    ----------
    features : int
        Width d of the residual stream.

    Notes
    -----
    Sums are float64 on the device of the states (on the CPU for MPS, which has none). Memory is 2·d² numbers, however
    many the tokens.

    Examples
    --------
    >>> import torch
    >>> moments = WindowMoments(2)
    >>> x = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    >>> moments.update(x, 2 * x, torch.ones(1, 2))
    >>> moments.error(torch.zeros(2, 2)), moments.error(torch.eye(2))
    (0.25, 0.0)
    """

    def __init__(self, features: int) -> None:
        self.tokens = 0
        self.xx = torch.zeros(features, features, dtype=torch.float64)
        self.xd = torch.zeros(features, features, dtype=torch.float64)
        self.dd = 0.0

    def update(self, entering: Tensor, leaving: Tensor, mask: Tensor) -> None:
        """Add one batch.

        Parameters
        ----------
        entering, leaving : torch.Tensor
            The states before and after the window, of shape (batch, tokens, features).
        mask : torch.Tensor
            The tokens that count, of shape (batch, tokens).
        """
        if entering.shape[-1] != len(self.xx) or leaving.shape != entering.shape:
            raise StreamlineError(
                f"Got states of shape {tuple(entering.shape)} and {tuple(leaving.shape)}; expected two of the same "
                f"shape with {len(self.xx)} features."
            )
        real = mask.to(entering.device).bool()
        for x, y in zip(entering[real].split(_TOKENS_AT_ONCE), leaving[real].split(_TOKENS_AT_ONCE), strict=True):
            x, y = widen(x), widen(y)
            self.xx, self.xd = self.xx.to(x.device), self.xd.to(x.device)
            norm = y.norm(dim=-1, keepdim=True).clamp_min(1e-300)
            x, d = x / norm, (y - x) / norm
            self.xx.addmm_(x.T, x)
            self.xd.addmm_(x.T, d)
            self.dd += float(d.square().sum())
            self.tokens += len(x)

    def merge(self, other: Self) -> None:
        """Add the sums of another part of the tokens."""
        if other.xx.shape != self.xx.shape:
            raise StreamlineError(f"Cannot merge moments of width {len(other.xx)} into those of width {len(self.xx)}.")
        self.tokens += other.tokens
        self.xx = self.xx + other.xx.to(self.xx.device)
        self.xd = self.xd + other.xd.to(self.xd.device)
        self.dd += other.dd

    def error(self, map_: Tensor) -> float:
        """Mean relative squared error of x ↦ x + Wᵀx.

        Parameters
        ----------
        map_ : torch.Tensor
            W, of shape (features, features); zero is plain removal.

        Returns
        -------
        float
            (tr Σwδδᵀ − 2 tr WᵀΣwxδᵀ + tr WᵀΣwxxᵀW) / tokens.
        """
        if not self.tokens:
            raise StreamlineError("No token has been counted yet; update with a batch that has real tokens.")
        w = map_.to(self.xx)
        total = self.dd - 2 * (w * self.xd).sum() + (w * (self.xx @ w)).sum()
        return float(total) / self.tokens

    def state_dict(self) -> dict[str, Any]:
        """The sums, for a file."""
        return {"tokens": self.tokens, "xx": self.xx.clone(), "xd": self.xd.clone(), "dd": self.dd}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take sums up again."""
        self.tokens, self.dd = int(state["tokens"]), float(state["dd"])
        self.xx, self.xd = state["xx"].clone(), state["xd"].clone()
