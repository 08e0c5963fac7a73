"""Feed-forward networks that replace a window: MLP, SwiGLU, and the one of the paper."""

from __future__ import annotations

from typing import Any

import torch
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


class _WithLinear(nn.Module):
    """Feed-forward network with an optional linear map in parallel, which can hold the closed-form solution."""

    last_projection = "down_proj"
    down_proj: nn.Linear
    linear: nn.Linear | None

    def start_at(self, map_: Tensor) -> None:
        """Set the linear map to W, of shape (features, features), and the last layer of the network to zero."""
        if self.linear is None:
            raise StreamlineError(
                "This network was built with linear=False: no linear map beside it can hold the closed-form solution."
            )
        with torch.no_grad():
            self.linear.weight.copy_(map_.T)
            for parameter in self.down_proj.parameters():
                parameter.zero_()

    @property
    def holds_map(self) -> bool:
        """Whether there is a linear map to hold the closed-form solution."""
        return self.linear is not None


@register_module("mlp")
class MLPReplacement(_WithLinear):
    """h ↦ h + hW + down(act(up(h))), the feed-forward network of LLM-Streamline (arXiv 2403.19135) on a residual path.

    Parameters
    ----------
    features : int
        Width d of the residual stream.
    width : int, optional
        Of the hidden layer, 4·d by default.
    activation : str
        As Transformers' configurations name it, such as ``"gelu"``, ``"relu"`` or ``"silu"``.
    bias : bool
        Whether the two layers have a bias each.
    linear : bool
        Whether the linear map W is there, which can hold a closed-form solution.

    Raises
    ------
    StreamlineError
        If the width is not positive or the activation unknown.

    Notes
    -----
    It starts at plain removal: W and the second layer are zero. It has 2·d·width parameters, d² more with the map and
    width + d more with biases, costs 2 FLOPs a token for each but the biases, and takes no cache slot.

    Examples
    --------
    >>> import torch
    >>> module = MLPReplacement(8)
    >>> module.to_config()["width"], module.flops_per_token == 2 * (2 * 8 * 32 + 8 * 8)
    (32, True)
    """

    def __init__(
        self,
        features: int,
        width: int | None = None,
        activation: str = "gelu",
        bias: bool = False,
        linear: bool = True,
    ) -> None:
        from transformers.activations import ACT2FN  # late: it brings in much

        super().__init__()
        width = 4 * features if width is None else width
        if width < 1:
            raise StreamlineError(f"width={width} of an MLP must be 1 or more.")
        if activation not in ACT2FN:
            raise StreamlineError(f"activation={activation!r} is unknown; expected one of {', '.join(sorted(ACT2FN))}.")
        self.features, self.width, self.activation, self.bias = features, width, activation, bias
        self.up_proj = nn.Linear(features, width, bias=bias)
        self.act_fn = ACT2FN[activation]
        self.down_proj = nn.Linear(width, features, bias=bias)
        self.linear = nn.Linear(features, features, bias=False) if linear else None
        for layer in (self.down_proj, self.linear):
            for parameter in layer.parameters() if layer is not None else ():
                nn.init.zeros_(parameter)

    @property
    def flops_per_token(self) -> int:
        """Twice the weights that a token is multiplied with."""
        return 2 * self.features * (2 * self.width + (self.features if self.linear is not None else 0))

    def to_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {
            "features": self.features,
            "width": self.width,
            "activation": self.activation,
            "bias": self.bias,
            "linear": self.linear is not None,
        }

    def forward(self, state: Tensor) -> Tensor:
        """Map a state of shape (batch, tokens, features) to the same shape."""
        mapped: Tensor = state + self.down_proj(self.act_fn(self.up_proj(state)))
        return mapped if self.linear is None else mapped + self.linear(state)


@register_module("swiglu")
class SwiGLUReplacement(_WithLinear):
    """h ↦ h + hW + down(silu(gate(n)) · up(n)) with n = norm(h), the gated MLP of arXiv 2002.05202.

    Parameters
    ----------
    features : int
        Width d of the residual stream.
    width : int, optional
        Of the hidden layer; by default 8·d/3 rounded up to a multiple of 64, as in LLaMA (arXiv 2302.13971).
    norm : bool
        Whether the gated layers see the state after an RMS norm (arXiv 1910.07467). A state with massive activations
        is hundreds of times as large as others, and would rule their gradients.
    linear : bool
        Whether the linear map W is there, which can hold a closed-form solution. It works on the state itself.

    Raises
    ------
    StreamlineError
        If the width is not positive.

    Notes
    -----
    It starts at plain removal: W and the last layer are zero. It has 3·d·width parameters, d² more with the map and d
    more with the norm, costs 2 FLOPs a token for each but the norm's, and takes no cache slot.

    Examples
    --------
    >>> module = SwiGLUReplacement(576)
    >>> module.width, sum(p.numel() for p in module.parameters()) == 3 * 576 * 1536 + 576**2 + 576
    (1536, True)
    """

    def __init__(self, features: int, width: int | None = None, norm: bool = True, linear: bool = True) -> None:
        super().__init__()
        width = -(-8 * features // (3 * 64)) * 64 if width is None else width
        if width < 1:
            raise StreamlineError(f"width={width} of a SwiGLU must be 1 or more.")
        self.features, self.width = features, width
        self.norm = nn.RMSNorm(features, eps=1e-6) if norm else None
        self.gate_proj = nn.Linear(features, width, bias=False)
        self.up_proj = nn.Linear(features, width, bias=False)
        self.down_proj = nn.Linear(width, features, bias=False)
        nn.init.zeros_(self.down_proj.weight)
        self.linear = nn.Linear(features, features, bias=False) if linear else None
        if self.linear is not None:
            nn.init.zeros_(self.linear.weight)

    @property
    def flops_per_token(self) -> int:
        """Twice the weights that a token is multiplied with."""
        return 2 * self.features * (3 * self.width + (self.features if self.linear is not None else 0))

    def to_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {
            "features": self.features,
            "width": self.width,
            "norm": self.norm is not None,
            "linear": self.linear is not None,
        }

    def forward(self, state: Tensor) -> Tensor:
        """Map a state of shape (batch, tokens, features) to the same shape."""
        seen = state if self.norm is None else self.norm(state)
        mapped: Tensor = state + self.down_proj(F.silu(self.gate_proj(seen)) * self.up_proj(seen))
        return mapped if self.linear is None else mapped + self.linear(state)
