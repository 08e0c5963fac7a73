"""For somebody's training loop: watch the hidden states while a model trains."""

from streamline_hooks.in_training.measurement import Measurement
from streamline_hooks.in_training.monitor import HiddenStateMonitor

__all__ = ["HiddenStateMonitor", "Measurement"]
