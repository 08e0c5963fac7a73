"""A gated network on the normalised residual stream, with a linear map beside it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from streamline_hooks.errors import StreamlineError
from streamline_hooks.replacements.mlp import start_beside
from streamline_hooks.replacements.registry import register_module

_MULTIPLE = 64


@register_module("swiglu")
class SwiGLUReplacement(nn.Module):
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

    last_projection = "down_proj"

    def __init__(self, features: int, width: int | None = None, norm: bool = True, linear: bool = True) -> None:
        super().__init__()
        width = -(-8 * features // (3 * _MULTIPLE)) * _MULTIPLE if width is None else width
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

    def start_at(self, map_: Tensor) -> None:
        """Make the linear map W, of shape (features, features), and the last layer beside it zero.

        Raises
        ------
        StreamlineError
            If there is no linear map to hold it.
        """
        start_beside(self.linear, map_, self.down_proj)

    @property
    def holds_map(self) -> bool:
        """Whether there is a linear map to hold the closed-form solution."""
        return self.linear is not None

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
