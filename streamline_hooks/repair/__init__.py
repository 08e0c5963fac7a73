"""Configs of replacements and their closed-form (least-squares) fitting."""

from streamline_hooks.repair.branch_linear import BranchLinear, fit_branch_linear, fit_branches, replace_branches
from streamline_hooks.repair.configs import (
    REPLACEMENTS,
    BlockConfig,
    FeedForwardConfig,
    FoldedConfig,
    LinearConfig,
    MergedConfig,
    MLPConfig,
    NoneConfig,
    ReplacementConfig,
    ScaleConfig,
    SilencedConfig,
    SwiGLUConfig,
    register_replacement,
)
from streamline_hooks.repair.fit import fit_replacements, fit_windows, holds_map
from streamline_hooks.repair.fold import FoldedMap, ScaleFactor, measure_fold_moments
from streamline_hooks.repair.inherited_blocks import (
    InheritedBlocks,
    inherit_blocks,
    inherit_without_attention,
    merge_blocks,
    trainable_copy,
)
from streamline_hooks.repair.least_squares import RIDGES, ClosedForm, solve_least_squares
from streamline_hooks.repair.placement import (
    Repair,
    ReplacementSize,
    WindowReplacement,
    hidden_size_of,
    insert_replacement,
    is_spliced,
    replacement_size,
)

__all__ = [
    "REPLACEMENTS",
    "RIDGES",
    "BlockConfig",
    "BranchLinear",
    "ClosedForm",
    "FeedForwardConfig",
    "FoldedConfig",
    "FoldedMap",
    "InheritedBlocks",
    "LinearConfig",
    "MLPConfig",
    "MergedConfig",
    "NoneConfig",
    "Repair",
    "ReplacementConfig",
    "ReplacementSize",
    "ScaleConfig",
    "ScaleFactor",
    "SilencedConfig",
    "SwiGLUConfig",
    "WindowReplacement",
    "fit_branch_linear",
    "fit_branches",
    "fit_replacements",
    "fit_windows",
    "hidden_size_of",
    "holds_map",
    "inherit_blocks",
    "inherit_without_attention",
    "insert_replacement",
    "is_spliced",
    "measure_fold_moments",
    "merge_blocks",
    "register_replacement",
    "replace_branches",
    "replacement_size",
    "solve_least_squares",
    "trainable_copy",
]
