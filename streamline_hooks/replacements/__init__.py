"""What can stand in the place of removed blocks: one file a kind, and their registry."""

from streamline_hooks.replacements.block import InheritedBlocks, inherit, inherit_silenced
from streamline_hooks.replacements.feed_forward import FeedForwardReplacement
from streamline_hooks.replacements.linear import LinearReplacement
from streamline_hooks.replacements.merged import merge
from streamline_hooks.replacements.mlp import MLPReplacement
from streamline_hooks.replacements.normed_linear import NormedLinearReplacement
from streamline_hooks.replacements.registry import (
    Replacement,
    build_replacement,
    register_module,
    replacement_config,
)
from streamline_hooks.replacements.swiglu import SwiGLUReplacement

__all__ = [
    "FeedForwardReplacement",
    "InheritedBlocks",
    "LinearReplacement",
    "MLPReplacement",
    "NormedLinearReplacement",
    "Replacement",
    "SwiGLUReplacement",
    "build_replacement",
    "inherit",
    "inherit_silenced",
    "merge",
    "register_module",
    "replacement_config",
]
