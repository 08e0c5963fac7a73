"""Run and compress a checkpoint whose model does not fit into memory, with one block in memory at a time."""

from streamline_hooks.blockwise.compressing import compress_checkpoint
from streamline_hooks.blockwise.measuring import perplexity_of_candidates
from streamline_hooks.blockwise.moments import measure_moments
from streamline_hooks.blockwise.opening import open_checkpoint
from streamline_hooks.blockwise.passing import BlockwisePass
from streamline_hooks.blockwise.profiling import profile
from streamline_hooks.blockwise.residence import resident
from streamline_hooks.blockwise.verifying import verified

__all__ = [
    "BlockwisePass",
    "compress_checkpoint",
    "measure_moments",
    "open_checkpoint",
    "perplexity_of_candidates",
    "profile",
    "resident",
    "verified",
]
