"""Register a kind of replacement that makes a module of a test."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from streamline_hooks.modeling import BlockStack
from streamline_hooks.repair import ReplacementConfig, register_replacement
from streamline_hooks.repair.placement import hidden_size_of


def register_kind(name: str, make_module: Callable[[int], nn.Module], solved: bool = True) -> ReplacementConfig:
    """Register a kind whose module is made from the width of the residual stream."""

    @register_replacement
    @dataclass(frozen=True)
    class OwnConfig(ReplacementConfig):
        kind = name
        is_solved = solved

        def make(self, stack: BlockStack, window: range) -> nn.Module:
            return make_module(hidden_size_of(stack))

    return OwnConfig()
