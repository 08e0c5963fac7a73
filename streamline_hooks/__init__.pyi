from .checkpoint import compare_blocks, load, read_plans, save
from .errors import StreamlineError, UnsupportedSurgery
from .evaluation import (
    Agreement,
    Evaluation,
    Likeness,
    Suite,
    TaskScores,
    agreement,
    embeddings,
    evaluate,
    likeness,
    measure_speed,
    perplexity,
    recall_at,
    sliding_perplexity,
    suite_from_files,
)
from .in_training import HiddenStateMonitor, ProgressiveRemoval, StochasticDepth
from .passes import resume
from .pipeline.compress import compress
from .pipeline.iterative import compress_iteratively
from .pipeline.sweep import Sweep, sweep
from .recorder import HiddenStateRecorder
from .repair import (
    PRESETS,
    Healing,
    Objective,
    OnPolicy,
    Trained,
    Training,
    fit_windows,
    freeze_all_but,
    kind_named,
    known_kinds,
    place,
    preset_named,
    register_kind,
    student_of,
    train,
)
from .replacements import LinearReplacement, register_replacement
from .result import CompressionResult
from .selection import (
    SearchProblem,
    Selection,
    Target,
    combined,
    find_selections,
    register_criterion,
    score_windows,
    verified,
)
from .stack import BlockStack, find_stack, find_stacks
from .statistics import Profile, WindowMoments, measure_branches, measure_moments, profile
from .surgery import LayerSurgeon, SurgeryPlan
from .task import Task

__version__: str

__all__ = [
    "PRESETS",
    "Agreement",
    "BlockStack",
    "CompressionResult",
    "Evaluation",
    "Healing",
    "HiddenStateMonitor",
    "HiddenStateRecorder",
    "LayerSurgeon",
    "Likeness",
    "LinearReplacement",
    "Objective",
    "OnPolicy",
    "Profile",
    "ProgressiveRemoval",
    "SearchProblem",
    "Selection",
    "StochasticDepth",
    "StreamlineError",
    "Suite",
    "SurgeryPlan",
    "Sweep",
    "Target",
    "Task",
    "TaskScores",
    "Trained",
    "Training",
    "UnsupportedSurgery",
    "WindowMoments",
    "agreement",
    "combined",
    "compare_blocks",
    "compress",
    "compress_iteratively",
    "embeddings",
    "evaluate",
    "find_selections",
    "find_stack",
    "find_stacks",
    "fit_windows",
    "freeze_all_but",
    "kind_named",
    "known_kinds",
    "likeness",
    "load",
    "measure_branches",
    "measure_moments",
    "measure_speed",
    "perplexity",
    "place",
    "preset_named",
    "profile",
    "read_plans",
    "recall_at",
    "register_criterion",
    "register_kind",
    "register_replacement",
    "resume",
    "save",
    "score_windows",
    "sliding_perplexity",
    "student_of",
    "suite_from_files",
    "sweep",
    "train",
    "verified",
]
