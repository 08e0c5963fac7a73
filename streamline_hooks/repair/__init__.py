"""Fitting, training and healing what stands in the place of removed blocks."""

from streamline_hooks.repair.callbacks import TrainingCallback, TrainingProgress
from streamline_hooks.repair.closed_form import ClosedForm, solve
from streamline_hooks.repair.configs import (
    BlockConfig,
    FeedForwardConfig,
    FoldedConfig,
    LinearConfig,
    MergedConfig,
    MLPConfig,
    NoneConfig,
    ScaleConfig,
    SilencedConfig,
    SwiGLUConfig,
)
from streamline_hooks.repair.distillation_config import DistillationConfig
from streamline_hooks.repair.fitting import fit_windows
from streamline_hooks.repair.folded import Folded, measure_fold_moments
from streamline_hooks.repair.healing import HealingConfig, freeze_all_but, student_of
from streamline_hooks.repair.objective import LOSSES, Loss, Objective, register_loss
from streamline_hooks.repair.replacement_config import (
    REPLACEMENTS,
    ReplacementConfig,
    register_replacement,
)
from streamline_hooks.repair.stand_in import Batches, Repair, StandIn, StandInSize, features_of, place, size_of
from streamline_hooks.repair.student import Student
from streamline_hooks.repair.trained import Trained
from streamline_hooks.repair.training import train

__all__ = [
    "LOSSES",
    "REPLACEMENTS",
    "Batches",
    "BlockConfig",
    "ClosedForm",
    "DistillationConfig",
    "FeedForwardConfig",
    "Folded",
    "FoldedConfig",
    "HealingConfig",
    "LinearConfig",
    "Loss",
    "MLPConfig",
    "MergedConfig",
    "NoneConfig",
    "Objective",
    "Repair",
    "ReplacementConfig",
    "ScaleConfig",
    "SilencedConfig",
    "StandIn",
    "StandInSize",
    "Student",
    "SwiGLUConfig",
    "Trained",
    "TrainingCallback",
    "TrainingProgress",
    "features_of",
    "fit_windows",
    "freeze_all_but",
    "measure_fold_moments",
    "place",
    "register_loss",
    "register_replacement",
    "size_of",
    "solve",
    "student_of",
    "train",
]
