"""Compress a model from end to end: once, repeatedly, or at several sparsities."""

from streamline_hooks.pipeline.compress import compress
from streamline_hooks.pipeline.iterative import compress_iteratively
from streamline_hooks.pipeline.sweep import Sweep, sweep

__all__ = ["Sweep", "compress", "compress_iteratively", "sweep"]
