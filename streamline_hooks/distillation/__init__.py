"""Train replacements and heal remaining blocks by distillation from the original model."""

from streamline_hooks.distillation.config import DistillationConfig
from streamline_hooks.distillation.healing import HealingConfig, freeze_all_but, healing_copies, student_of
from streamline_hooks.distillation.losses import LOSSES, Loss, Objective, register_loss
from streamline_hooks.distillation.optimizer import refuse_float16
from streamline_hooks.distillation.progress import TrainingCallback, TrainingProgress, TrainingResult
from streamline_hooks.distillation.prompt_student import PromptSkipStudent, prompt_of, skips_any
from streamline_hooks.distillation.student import Student
from streamline_hooks.distillation.teacher_cache import TeacherCache, TeacherStates, cache_teacher_states
from streamline_hooks.distillation.train import train

__all__ = [
    "LOSSES",
    "DistillationConfig",
    "HealingConfig",
    "Loss",
    "Objective",
    "PromptSkipStudent",
    "Student",
    "TeacherCache",
    "TeacherStates",
    "TrainingCallback",
    "TrainingProgress",
    "TrainingResult",
    "cache_teacher_states",
    "freeze_all_but",
    "healing_copies",
    "prompt_of",
    "refuse_float16",
    "register_loss",
    "skips_any",
    "student_of",
    "train",
]
