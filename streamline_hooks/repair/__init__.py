"""Fitting, training and healing what stands in the place of removed blocks."""

from streamline_hooks.repair.callbacks import TrainingCallback, TrainingProgress
from streamline_hooks.repair.closed_form import ClosedForm, solve
from streamline_hooks.repair.fitting import fit_windows
from streamline_hooks.repair.freezing import freeze_all_but
from streamline_hooks.repair.healing import Healing, student_of
from streamline_hooks.repair.kinds import Kind, kind_named, known_kinds, register_kind
from streamline_hooks.repair.objective import Objective
from streamline_hooks.repair.on_policy import OnPolicy
from streamline_hooks.repair.presets import PRESETS, Preset, preset_named
from streamline_hooks.repair.repaired import Repair
from streamline_hooks.repair.settings import Trained, Training
from streamline_hooks.repair.size import StandInSize, size_of
from streamline_hooks.repair.stand_in import StandIn, place
from streamline_hooks.repair.student import Student
from streamline_hooks.repair.training import train

__all__ = [
    "PRESETS",
    "ClosedForm",
    "Healing",
    "Kind",
    "Objective",
    "OnPolicy",
    "Preset",
    "Repair",
    "StandIn",
    "StandInSize",
    "Student",
    "Trained",
    "Training",
    "TrainingCallback",
    "TrainingProgress",
    "fit_windows",
    "freeze_all_but",
    "kind_named",
    "known_kinds",
    "place",
    "preset_named",
    "register_kind",
    "size_of",
    "solve",
    "student_of",
    "train",
]
