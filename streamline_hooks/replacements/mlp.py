"""Feed-forward replacements: MLP, SwiGLU, and the network of the LLM-Streamline repository."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from streamline_hooks.core import StreamlineError
from streamline_hooks.replacements.registry import register_module


@register_module("feed_forward")
class FeedForwardReplacement(nn.Module):
    """Feed-forward network without a residual path, h ↦ down(relu(up(h))), with biases.

    This is the network in examples/mlp_mseloss_train_without_memory_issue of the repository of LLM-Streamline (arXiv
    2403.19135). It must learn the whole state; `MLPReplacement` adds a residual path.

    Parameters
    ----------
    features : int
        Width d of the residual stream.
    width : int, optional
        Width of the hidden layer. Default: 4·d.
    initializer_range : float
        Standard deviation of the initial weights, as in model configs. Biases are initially zero.

    Raises
    ------
    StreamlineError
        If the width is not positive.

    Notes
    -----
    The module has 2·d·width + width + d parameters, needs 4·d·width FLOPs per token and takes no cache slot.

    Examples
    --------
    >>> sum(p.numel() for p in FeedForwardReplacement(8).parameters()) == 8 * 8**2 + 5 * 8
    True
    """

    def __init__(self, features: int, width: int | None = None, initializer_range: float = 0.02) -> None:
        super().__init__()
        width = 4 * features if width is None else width
        if width < 1:
            raise StreamlineError(f"width={width} is invalid. Expected at least 1. Pass the width of the hidden layer.")
        self.features, self.width, self.initializer_range = features, width, initializer_range
        self.up_proj = nn.Linear(features, width)
        self.down_proj = nn.Linear(width, features)
        for layer in (self.up_proj, self.down_proj):
            nn.init.normal_(layer.weight, std=initializer_range)
            nn.init.zeros_(layer.bias)

    @property
    def flops_per_token(self) -> int:
        """FLOPs per token: two per weight of the layers."""
        return 4 * self.features * self.width

    def to_config(self) -> dict[str, Any]:
        """Return the keyword arguments of the constructor."""
        return {"features": self.features, "width": self.width, "initializer_range": self.initializer_range}

    def forward(self, state: Tensor) -> Tensor:
        """Map a state of shape (batch, tokens, features) to the same shape."""
        mapped: Tensor = self.down_proj(F.relu(self.up_proj(state)))
        return mapped


class _WithLinear(nn.Module):
    """Feed-forward network with an optional parallel linear map for the closed-form solution."""

    last_projection = "down_proj"
    down_proj: nn.Linear
    linear: nn.Linear | None

    def start_at(self, map_: Tensor) -> None:
        """Set the linear map to W, of shape (features, features), and the last layer of the network to zero."""
        if self.linear is None:
            raise StreamlineError(
                "linear=False: this network has no linear map for the closed-form solution. Build it with linear=True."
            )
        with torch.no_grad():
            self.linear.weight.copy_(map_.T)
            for parameter in self.down_proj.parameters():
                parameter.zero_()

    @property
    def holds_map(self) -> bool:
        """Whether the network has a linear map for the closed-form solution."""
        return self.linear is not None


@register_module("mlp")
class MLPReplacement(_WithLinear):
    """Feed-forward network on a residual path, h ↦ h + hW + down(act(up(h))).

    The network of LLM-Streamline (arXiv 2403.19135) with a residual path and an optional linear map.

    Parameters
    ----------
    features : int
        Width d of the residual stream.
    width : int, optional
        Width of the hidden layer. Default: 4·d.
    activation : str
        Name of an activation of Transformers, such as ``"gelu"``, ``"relu"`` or ``"silu"``.
    bias : bool
        Whether the two layers have biases.
    linear : bool
        Whether the module has the linear map W, which can represent a closed-form solution.

    Raises
    ------
    StreamlineError
        If the width is not positive or the activation is unknown.

    Notes
    -----
    Initially W and the second layer are zero, which equals plain removal. The module has 2·d·width parameters, d² more
    with the map and width + d more with biases, needs 2 FLOPs per token for each weight, and takes no cache slot.

    Examples
    --------
    >>> import torch
    >>> module = MLPReplacement(8)
    >>> module.to_config()["width"], module.flops_per_token == 2 * (2 * 8 * 32 + 8 * 8)
    (32, True)
    """

    def __init__(
        self, features: int, width: int | None = None, activation: str = "gelu", bias: bool = False, linear: bool = True
    ) -> None:
        from transformers.activations import ACT2FN  # imported here because it is slow

        super().__init__()
        width = 4 * features if width is None else width
        if width < 1:
            raise StreamlineError(f"width={width} is invalid. Expected at least 1. Pass the width of the hidden layer.")
        if activation not in ACT2FN:
            raise StreamlineError(f"activation={activation!r} is unknown. Expected one of {', '.join(sorted(ACT2FN))}.")
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
        """FLOPs per token: two per weight of the layers."""
        return 2 * self.features * (2 * self.width + self.features * self.holds_map)

    def to_config(self) -> dict[str, Any]:
        """Return the keyword arguments of the constructor."""
        sizes = {"features": self.features, "width": self.width}
        return {**sizes, "activation": self.activation, "bias": self.bias, "linear": self.holds_map}

    def forward(self, state: Tensor) -> Tensor:
        """Map a state of shape (batch, tokens, features) to the same shape."""
        mapped: Tensor = state + self.down_proj(self.act_fn(self.up_proj(state)))
        return mapped if self.linear is None else mapped + self.linear(state)


@register_module("swiglu")
class SwiGLUReplacement(_WithLinear):
    """Gated MLP on a residual path, h ↦ h + hW + down(silu(gate(n)) · up(n)) with n = norm(h).

    The SwiGLU layer of arXiv 2002.05202 with a residual path and an optional linear map.

    Parameters
    ----------
    features : int
        Width d of the residual stream.
    width : int, optional
        Width of the hidden layer. Default: 8·d/3 rounded up to a multiple of 64, as in LLaMA (arXiv 2302.13971).
    norm : bool
        Whether an RMS norm (arXiv 1910.07467) precedes the gated layers. Without it, states with massive activations,
        which are hundreds of times larger than other states, dominate the gradients.
    linear : bool
        Whether the module has the linear map W of the unnormalized state, which can represent a closed-form solution.

    Raises
    ------
    StreamlineError
        If the width is not positive.

    Notes
    -----
    Initially W and the last layer are zero, which equals plain removal. The module has 3·d·width parameters, d² more
    with the map and d more with the norm, needs 2 FLOPs per token for each weight of the layers, and takes no cache
    slot.

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
            raise StreamlineError(f"width={width} is invalid. Expected at least 1. Pass the width of the hidden layer.")
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
        """FLOPs per token: two per weight of the layers."""
        return 2 * self.features * (3 * self.width + self.features * self.holds_map)

    def to_config(self) -> dict[str, Any]:
        """Return the keyword arguments of the constructor."""
        sizes = {"features": self.features, "width": self.width}
        return {**sizes, "norm": self.norm is not None, "linear": self.holds_map}

    def forward(self, state: Tensor) -> Tensor:
        """Map a state of shape (batch, tokens, features) to the same shape."""
        normed = state if self.norm is None else self.norm(state)
        mapped: Tensor = state + self.down_proj(F.silu(self.gate_proj(normed)) * self.up_proj(normed))
        return mapped if self.linear is None else mapped + self.linear(state)
