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
from streamline_hooks.repair.fitting import fit_windows
from streamline_hooks.repair.freezing import freeze_all_but
from streamline_hooks.repair.healing import Healing, student_of
from streamline_hooks.repair.objective import Objective
from streamline_hooks.repair.on_policy import OnPolicy
from streamline_hooks.repair.presets import PRESETS, Preset, preset_named
from streamline_hooks.repair.repaired import Repair
from streamline_hooks.repair.replacement_config import (
    REPLACEMENTS,
    ReplacementConfig,
    register_replacement,
)
from streamline_hooks.repair.settings import Trained, Training
from streamline_hooks.repair.size import StandInSize, features_of, size_of
from streamline_hooks.repair.stand_in import StandIn, place
from streamline_hooks.repair.student import Student
from streamline_hooks.repair.training import train

__all__ = [
    "PRESETS",
    "REPLACEMENTS",
    "BlockConfig",
    "ClosedForm",
    "FeedForwardConfig",
    "FoldedConfig",
    "Healing",
    "LinearConfig",
    "MLPConfig",
    "MergedConfig",
    "NoneConfig",
    "Objective",
    "OnPolicy",
    "Preset",
    "Repair",
    "ReplacementConfig",
    "ScaleConfig",
    "SilencedConfig",
    "StandIn",
    "StandInSize",
    "Student",
    "SwiGLUConfig",
    "Trained",
    "Training",
    "TrainingCallback",
    "TrainingProgress",
    "features_of",
    "fit_windows",
    "freeze_all_but",
    "place",
    "preset_named",
    "register_replacement",
    "size_of",
    "solve",
    "student_of",
    "train",
]
