"""The feed-forward network of LLM-Streamline as its code has it: the whole state anew, without a residual path."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from streamline_hooks.errors import StreamlineError
from streamline_hooks.replacements.registry import register_module


@register_module("feed_forward")
class FeedForwardReplacement(nn.Module):
    """h ↦ down(relu(up(h))), from width d to 4·d and back, with biases.

    LLM-Streamline, arXiv 2403.19135; its repository has it in examples/mlp_mseloss_train_without_memory_issue. Nothing
    of the state that enters is passed on as it is, so that it has to learn all of it: `MLPReplacement` has the residual
    path.

    Parameters
    ----------
    features : int
        Width d of the residual stream.
    width : int, optional
        Of the hidden layer, 4·d by default.
    initializer_range : float
        Standard deviation of the weights at the start, as in the configuration of the model; biases start at zero.

    Raises
    ------
    StreamlineError
        If the width is not positive.

    Notes
    -----
    It has 2·d·width + width + d parameters, costs 4·d·width FLOPs a token and takes no cache slot.

    Examples
    --------
    >>> sum(p.numel() for p in FeedForwardReplacement(8).parameters()) == 8 * 8**2 + 5 * 8
    True
    """

    def __init__(self, features: int, width: int | None = None, initializer_range: float = 0.02) -> None:
        super().__init__()
        width = 4 * features if width is None else width
        if width < 1:
            raise StreamlineError(f"width={width} of a feed-forward network must be 1 or more.")
        self.features, self.width, self.initializer_range = features, width, initializer_range
        self.up_proj = nn.Linear(features, width)
        self.down_proj = nn.Linear(width, features)
        for layer in (self.up_proj, self.down_proj):
            nn.init.normal_(layer.weight, std=initializer_range)
            nn.init.zeros_(layer.bias)

    @property
    def flops_per_token(self) -> int:
        """Twice the weights that a token is multiplied with."""
        return 4 * self.features * self.width

    def to_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"features": self.features, "width": self.width, "initializer_range": self.initializer_range}

    def forward(self, state: Tensor) -> Tensor:
        """Map a state of shape (batch, tokens, features) to the same shape."""
        mapped: Tensor = self.down_proj(F.relu(self.up_proj(state)))
        return mapped
