"""Prune&Comp: one factor for the hidden state behind the window (arXiv 2507.18212)."""

from __future__ import annotations

from streamline_hooks import CompressionConfig, Preset, ScaleConfig

PRESET = Preset(
    "prune-and-comp",
    CompressionConfig(repair=ScaleConfig()),
    "Prune&Comp, arXiv 2507.18212; chenxinrui-tsinghua/PruneAndComp, magcomp.py, for one window. Folded into the "
    "blocks behind the window instead of the embedding and the blocks before it, which is equivalent.",
)
