"""The second moments for the closed-form repair of a window."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor

from streamline_hooks.arguments import checked
from streamline_hooks.errors import StreamlineError
from streamline_hooks.precision import widen

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
    weighted : bool
        Whether tokens have this weight; else w = 1, and errors are squares of norms, not relative.

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

    @checked(features=0)
    def __init__(self, features: int, weighted: bool = True) -> None:
        self.weighted = weighted
        self.tokens = 0
        self.xx = torch.zeros(features, features, dtype=torch.float64)
        self.xd = torch.zeros(features, features, dtype=torch.float64)
        self.dd = 0.0

    def update(self, entering: Tensor, leaving: Tensor, mask: Tensor, *, relative_to: Tensor | None = None) -> None:
        """Add one batch.

        Parameters
        ----------
        entering, leaving : torch.Tensor
            The states before and after the window, of shape (batch, tokens, features), or (tokens, features) where all
            tokens are in one row.
        mask : torch.Tensor
            The tokens that count, of shape (batch, tokens).
        relative_to : torch.Tensor, optional
            States of the same shape by whose norm an error is measured, where these are but parts of them; by default
            those that leave.
        """
        if relative_to is not None:
            relative_to = _in_rows(relative_to, mask)
        entering, leaving = _in_rows(entering, mask), _in_rows(leaving, mask)
        whole = leaving if relative_to is None else relative_to
        if entering.shape[-1] != len(self.xx) or not entering.shape == leaving.shape == whole.shape:
            raise StreamlineError(
                f"Got states of shape {tuple(entering.shape)} and {tuple(leaving.shape)}; expected two of the same "
                f"shape with {len(self.xx)} features."
            )
        real = mask.to(entering.device).bool()
        entering, leaving = entering[real], leaving[real]
        whole = leaving if relative_to is None else relative_to[real]
        for x, y, z in zip(*(states.split(_TOKENS_AT_ONCE) for states in (entering, leaving, whole)), strict=True):
            x, y = widen(x), widen(y)
            self.xx, self.xd = self.xx.to(x.device), self.xd.to(x.device)
            norm = widen(z).norm(dim=-1, keepdim=True).clamp_min(1e-300) if self.weighted else 1.0
            x, d = x / norm, (y - x) / norm
            self.xx.addmm_(x.T, x)
            self.xd.addmm_(x.T, d)
            self.dd += float(d.square().sum())
            self.tokens += len(x)

    def merge(self, other: Self) -> None:
        """Add the sums of another part of the tokens."""
        if other.xx.shape != self.xx.shape or other.weighted != self.weighted:
            raise StreamlineError(
                f"Cannot merge moments of width {len(other.xx)}, weighted={other.weighted}, into those of width "
                f"{len(self.xx)}, weighted={self.weighted}."
            )
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
        sums = {"xx": self.xx.clone(), "xd": self.xd.clone(), "dd": self.dd}
        return {"tokens": self.tokens, "weighted": self.weighted, **sums}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take sums up again."""
        self.tokens, self.dd, self.weighted = int(state["tokens"]), float(state["dd"]), bool(state["weighted"])
        self.xx, self.xd = state["xx"].clone(), state["xd"].clone()


def _in_rows(states: Tensor, mask: Tensor) -> Tensor:
    """States with the axis of a mask's rows: where they have none, all tokens are in one row."""
    return states[None] if states.ndim == mask.ndim else states
