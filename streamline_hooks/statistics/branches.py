"""How much each residual branch of each block, attention or MLP, changes the state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor

from streamline_hooks.branches import BRANCHES, Branch
from streamline_hooks.errors import StreamlineError
from streamline_hooks.precision import widen

_TOKENS_AT_ONCE = 4096


class BranchScores:
    """Sums, for each block and branch, of how alike the states before and after are and how large the difference is.

    A token's cosine is that of the residual stream before and after the branch, and its relative magnitude
    ‖after − before‖/‖before‖. One minus the mean cosine is the score by which He et al. (What Matters in
    Transformers?, arXiv 2406.15786) drop attention or MLP alone, each with its norm and its residual
    connection.

    Parameters
    ----------
    blocks : int
        Number of blocks of the stack.

    Notes
    -----
    All sums are float64; memory does not grow with the tokens. What was never counted is NaN.

    Examples
    --------
    >>> import torch
    >>> scores = BranchScores(1)
    >>> before, after = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[1.0, 1.0]]])
    >>> scores.update(0, "attention", before, after, torch.ones(1, 1))
    >>> scores.cosine, scores.magnitude[0, 0].item()
    (tensor([[0.7071,    nan]], dtype=torch.float64), 1.0)
    """

    def __init__(self, blocks: int) -> None:
        self.tokens = torch.zeros(blocks, len(BRANCHES), dtype=torch.int64)
        self._cosine = torch.zeros(blocks, len(BRANCHES), dtype=torch.float64)
        self._magnitude = torch.zeros(blocks, len(BRANCHES), dtype=torch.float64)

    def update(self, k: int, branch: Branch, before: Tensor, after: Tensor, mask: Tensor) -> None:
        """Add one batch of one branch.

        Parameters
        ----------
        k : int
            The block.
        branch : {"attention", "mlp"}
        before, after : torch.Tensor
            The states, of shape (batch, tokens, features).
        mask : torch.Tensor
            The tokens that count, of shape (batch, tokens).

        Raises
        ------
        StreamlineError
            If the state of a real token is not finite, or is zero before.
        """
        real, column = mask.to(before.device).bool(), BRANCHES.index(branch)
        for x, y in zip(before[real].split(_TOKENS_AT_ONCE), after[real].split(_TOKENS_AT_ONCE), strict=True):
            x, y = widen(x), widen(y)
            size, other = x.norm(dim=-1), y.norm(dim=-1)
            cosine = ((x * y).sum(dim=-1) / (size * other).clamp_min(1e-300)).clamp(-1.0, 1.0).sum()
            magnitude = ((y - x).norm(dim=-1) / size).sum()
            if not (torch.isfinite(cosine) and torch.isfinite(magnitude)):
                raise StreamlineError(
                    f"A state around the {branch} branch of block {k} holds NaN or infinite values, or is zero before "
                    "it. Look at the weights of the blocks up to there, or run in a wider precision."
                )
            self._cosine[k, column] += cosine.cpu()
            self._magnitude[k, column] += magnitude.cpu()
            self.tokens[k, column] += len(x)

    def merge(self, other: Self) -> None:
        """Add the sums of another part of the tokens."""
        if other.tokens.shape != self.tokens.shape:
            raise StreamlineError(
                f"Cannot merge the branches of {len(other.tokens)} blocks into those of {len(self.tokens)}: they are "
                "of different models."
            )
        self.tokens += other.tokens
        self._cosine += other._cosine
        self._magnitude += other._magnitude

    @property
    def cosine(self) -> Tensor:
        """Mean cosine of the states before and after, of shape (blocks, 2): attention, MLP."""
        return self._cosine / self.tokens

    @property
    def magnitude(self) -> Tensor:
        """Mean relative magnitude of what is added, of shape (blocks, 2): attention, MLP."""
        return self._magnitude / self.tokens

    def state_dict(self) -> dict[str, Any]:
        """The sums, for a file."""
        return {
            "tokens": self.tokens.clone(),
            "cosine": self._cosine.clone(),
            "magnitude": self._magnitude.clone(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take sums up again."""
        self.tokens = state["tokens"].clone()
        self._cosine, self._magnitude = state["cosine"].clone(), state["magnitude"].clone()
