"""How far what is said is from what the original says, and from a text, with the gradient made on the way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from streamline_hooks.errors import StreamlineError
from streamline_hooks.predicted import UNCOUNTED

_TOKENS_AT_ONCE = 64  # few enough for the processor's cache, at any vocabulary


def text_loss(logits: Tensor, following: Tensor) -> Tensor:
    """The negative log-likelihood of the tokens that follow, summed, in nats.

    Parameters
    ----------
    logits : torch.Tensor
        Of shape (tokens, vocabulary).
    following : torch.Tensor
        Of shape (tokens,), see `following_tokens`.

    Examples
    --------
    >>> text_loss(torch.zeros(3, 8), torch.tensor([5, -100, 2])) / 2  # log 8
    tensor(2.0794)
    """
    return cross_entropy(logits.float(), following, ignore_index=UNCOUNTED, reduction="sum")


def summed_divergence(
    repaired: Tensor,
    original: Tensor,
    forward: float = 1.0,
    reverse: float = 0.0,
    text: float = 0.0,
    following: Tensor | None = None,
) -> Tensor:
    """The sum over tokens of forward·KL(original ‖ repaired) + reverse·KL(repaired ‖ original) + text·(`text_loss`).

    Its gradient reaches the repaired logits alone.

    Parameters
    ----------
    repaired, original : torch.Tensor
        Logits of shape (tokens, vocabulary). The original's are overwritten where a gradient is needed: it takes
        their place, so that nothing of that size is allocated.
    forward, reverse, text : float
        The weights.
    following : torch.Tensor, optional
        Where the last is not zero, see `text_loss`.

    Raises
    ------
    StreamlineError
        If they are not of as many tokens and of one vocabulary, or a text is weighed and not given.

    Examples
    --------
    >>> logits = torch.zeros(3, 5, requires_grad=True)
    >>> summed_divergence(logits, torch.zeros(3, 5)).item()
    0.0
    """
    if repaired.shape != original.shape or (text and (following is None or len(following) != len(repaired))):
        follows = "no text" if following is None else f"{len(following)} tokens of a text"
        raise StreamlineError(
            f"Got logits of the shapes {tuple(repaired.shape)} and {tuple(original.shape)}, and {follows} at a weight "
            f"of {text:g}; expected one shape, and where a text is weighed a token of it for each row."
        )
    weights = (forward, reverse, text)
    if not (torch.is_grad_enabled() and repaired.requires_grad):
        return _SummedDivergence.run(repaired, original, weights, following, gradient=False)
    result: Tensor = _SummedDivergence.apply(repaired, original, weights, following)
    return result


class _SummedDivergence(torch.autograd.Function):
    """With d = log p − log q: forward Σ p d, of gradient q − p; reverse r = −Σ q d, of gradient −q(d + r).

    That of a text is −log q of one token, of gradient q less one there. The gradients are made on the way, while p and
    q are both at hand.
    """

    @staticmethod
    def run(
        repaired: Tensor,
        original: Tensor,
        weights: tuple[float, float, float],
        following: Tensor | None,
        gradient: bool,
    ) -> Tensor:
        forward, reverse, text = weights
        total = torch.zeros((), dtype=torch.float64, device=repaired.device)
        for start in range(0, len(repaired), _TOKENS_AT_ONCE):
            part = slice(start, start + _TOKENS_AT_ONCE)
            theirs = original[part]
            q, p = repaired[part].float().log_softmax(dim=-1), theirs.float().log_softmax(dim=-1)
            if text and following is not None:
                known = following[part] != UNCOUNTED
                tokens = following[part].masked_fill(~known, 0)[:, None]
                total -= text * q.gather(1, tokens)[:, 0].masked_fill(~known, 0.0).sum(dtype=torch.float64)
            likely = p.exp()
            apart = p.sub_(q)
            q = q.exp_()
            if reverse:
                weighted = q * apart
                backwards = -weighted.sum(dim=-1, keepdim=True)
                total += reverse * backwards.sum(dtype=torch.float64)
            if forward:
                total += forward * apart.mul_(likely).sum(dtype=torch.float64)
            if gradient:
                made = likely.mul_(-forward).add_(q, alpha=forward)
                if text and following is not None:
                    weight = text * known[:, None].to(q.dtype)
                    made.addcmul_(q, weight).scatter_add_(1, tokens, -weight)
                if reverse:
                    made.sub_(weighted.add_(q.mul_(backwards)), alpha=reverse)
                theirs.copy_(made)
        return total.to(torch.float32)

    @staticmethod
    def forward(
        ctx: Any, repaired: Tensor, original: Tensor, weights: tuple[float, float, float], following: Tensor | None
    ) -> Tensor:
        total = _SummedDivergence.run(repaired, original, weights, following, gradient=True)
        ctx.gradient = original
        return total

    @staticmethod
    def backward(ctx: Any, *outer: Any) -> Any:
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is None:
            raise StreamlineError("The gradient of this KL has been used up; compute the KL anew for another backward.")
        return gradient.mul_(outer[0]), None, None, None
