"""For somebody's training loop: watch the hidden states, skip blocks at random, give blocks up on the way."""

from streamline_hooks.in_training.measurement import Measurement
from streamline_hooks.in_training.monitor import HiddenStateMonitor
from streamline_hooks.in_training.progressive_removal import ProgressiveRemoval
from streamline_hooks.in_training.removal_record import Removal
from streamline_hooks.in_training.stochastic_depth import StochasticDepth

__all__ = ["HiddenStateMonitor", "Measurement", "ProgressiveRemoval", "Removal", "StochasticDepth"]
