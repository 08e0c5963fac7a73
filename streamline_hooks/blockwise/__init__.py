"""Run a checkpoint whose model does not fit into memory, with one block in memory at a time."""

from streamline_hooks.blockwise.moments import measure_moments
from streamline_hooks.blockwise.opening import open_checkpoint
from streamline_hooks.blockwise.passing import BlockwisePass
from streamline_hooks.blockwise.profiling import profile
from streamline_hooks.blockwise.residence import resident

__all__ = ["BlockwisePass", "measure_moments", "open_checkpoint", "profile", "resident"]
