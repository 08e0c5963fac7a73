"""Observe and modify a model in an existing training loop: monitoring, stochastic depth, progressive removal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from streamline_hooks.training.measurement import Measurement
from streamline_hooks.training.monitor import HiddenStateMonitor, MonitorConfig
from streamline_hooks.training.progressive_removal import ProgressiveRemoval, Removal
from streamline_hooks.training.stochastic_depth import StochasticDepth

if TYPE_CHECKING:
    from streamline_hooks.training.trainer_callbacks import MonitorCallback, ProgressiveRemovalCallback

__all__ = [
    "HiddenStateMonitor",
    "Measurement",
    "MonitorCallback",
    "MonitorConfig",
    "ProgressiveRemoval",
    "ProgressiveRemovalCallback",
    "Removal",
    "StochasticDepth",
]


def __getattr__(name: str) -> Any:  # Transformers' callbacks take seconds to import
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from streamline_hooks.training import trainer_callbacks

    return getattr(trainer_callbacks, name)
