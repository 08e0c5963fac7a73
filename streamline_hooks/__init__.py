"""Find, remove and repair the transformer blocks that do least (LLM-Streamline, arXiv 2403.19135)."""

from streamline_hooks.checkpoint import compare_blocks, load, read_plans, save
from streamline_hooks.compress import compress
from streamline_hooks.errors import StreamlineError, UnsupportedSurgery
from streamline_hooks.evaluation import (
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
from streamline_hooks.in_training import HiddenStateMonitor, ProgressiveRemoval, StochasticDepth
from streamline_hooks.iterative import compress_iteratively
from streamline_hooks.passes import resume
from streamline_hooks.recorder import HiddenStateRecorder
from streamline_hooks.repair import (
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
from streamline_hooks.replacements import LinearReplacement, register_replacement
from streamline_hooks.result import CompressionResult
from streamline_hooks.selection import (
    SearchProblem,
    Selection,
    Target,
    combined,
    find_selections,
    register_criterion,
    score_windows,
    verified,
)
from streamline_hooks.stack import BlockStack, find_stack, find_stacks
from streamline_hooks.statistics import Profile, WindowMoments, measure_branches, measure_moments, profile
from streamline_hooks.surgery import LayerSurgeon, SurgeryPlan
from streamline_hooks.surgery.registration import register_with_transformers
from streamline_hooks.sweep import Sweep, sweep
from streamline_hooks.task import Task

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

register_with_transformers()
