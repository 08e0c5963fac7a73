"""Compress a model from end to end: once, repeatedly, or at several sparsities."""

from streamline_hooks.pipeline.compress import compress
from streamline_hooks.pipeline.config import CompressionConfig, DataConfig, EvaluationConfig
from streamline_hooks.pipeline.plan import CostEstimate, TrainingPlan, estimate_cost, plan_training
from streamline_hooks.pipeline.presets import PRESETS, Preset
from streamline_hooks.pipeline.sweep import Sweep, sweep

__all__ = [
    "PRESETS",
    "CompressionConfig",
    "CostEstimate",
    "DataConfig",
    "EvaluationConfig",
    "Preset",
    "Sweep",
    "TrainingPlan",
    "compress",
    "estimate_cost",
    "plan_training",
    "sweep",
]
