"""Replacements that are wrong, each in one way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

WIDTH = 32


class AlmostIdentity(nn.Module):
    def forward(self, state: Tensor) -> Tensor:
        return state * (1 + 1e-6)


class WrongReplacement(nn.Module):
    """What the wrong replacements share: a projection beside the residual path, and how they are saved."""

    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Linear(WIDTH, WIDTH, bias=False)
        generator = torch.Generator().manual_seed(7)
        self.projection.weight.data.copy_(0.1 * torch.randn(WIDTH, WIDTH, generator=generator))

    def __init_subclass__(cls) -> None:
        cls.kind = f"planted-{cls.__name__}"  # type: ignore[attr-defined]

    def to_config(self) -> dict[str, Any]:
        return {}


class Bidirectional(WrongReplacement):
    def forward(self, state: Tensor) -> Tensor:
        return state + functional.scaled_dot_product_attention(state, self.projection(state), state)


class MeanOverTokens(WrongReplacement):
    def forward(self, state: Tensor) -> Tensor:
        return state + self.projection(state - state.mean(dim=1, keepdim=True))


class MeanOverEarlierTokens(WrongReplacement):
    def forward(self, state: Tensor) -> Tensor:
        counted = torch.arange(1, state.shape[1] + 1, device=state.device)[:, None]
        return state + self.projection((state.cumsum(dim=1) / counted).to(state.dtype))


class MixesRows(WrongReplacement):
    def forward(self, state: Tensor) -> Tensor:
        return state + self.projection(state - state.mean(dim=0, keepdim=True))


class Squeezes(WrongReplacement):
    def forward(self, state: Tensor) -> Tensor:
        return (state + self.projection(state)).squeeze(1)


class StaysInFloat32(WrongReplacement):
    def forward(self, state: Tensor) -> Tensor:
        return state.float() + self.projection(state).float()


class DividesByZero(WrongReplacement):
    """The mean over the tokens before each, of which the first has none."""

    def forward(self, state: Tensor) -> Tensor:
        counted = torch.arange(state.shape[1], device=state.device)[:, None]
        return state + self.projection(((state.cumsum(dim=1) - state) / counted).to(state.dtype))
