"""Modules that replace removed blocks, and the registry that rebuilds them from a checkpoint.

`streamline_hooks.repair` contains their configs and fits them.
"""

from streamline_hooks.replacements.linear import LinearReplacement, NormedLinearReplacement
from streamline_hooks.replacements.mlp import FeedForwardReplacement, MLPReplacement, SwiGLUReplacement
from streamline_hooks.replacements.registry import (
    REGISTERED,
    Replacement,
    build_replacement,
    is_own,
    register_module,
    replacement_config,
)

__all__ = [
    "REGISTERED",
    "FeedForwardReplacement",
    "LinearReplacement",
    "MLPReplacement",
    "NormedLinearReplacement",
    "Replacement",
    "SwiGLUReplacement",
    "build_replacement",
    "is_own",
    "register_module",
    "replacement_config",
]
