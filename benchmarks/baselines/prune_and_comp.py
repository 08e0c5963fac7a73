"""Prune&Comp: one scale factor for the hidden state after the window (arXiv 2507.18212)."""

from __future__ import annotations

from streamline_hooks import CompressionConfig
from streamline_hooks.pipeline import Preset
from streamline_hooks.repair import ScaleConfig

PRESET = Preset(
    "prune-and-comp",
    CompressionConfig(repair=ScaleConfig()),
    "Prune&Comp, arXiv 2507.18212; chenxinrui-tsinghua/PruneAndComp, magcomp.py, for one window. The factor is "
    "folded into the blocks after the window instead of the embedding and the blocks before it, which is equivalent.",
)
