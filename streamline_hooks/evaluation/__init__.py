"""What was lost, how fast it is, and what finding out will cost."""

from streamline_hooks.evaluation.agreement import Agreement, agreement, stability
from streamline_hooks.evaluation.bootstrap import Difference, Estimate, Retained, TaskAnswers, compared, retained
from streamline_hooks.evaluation.candidates import Candidate, distances_of_candidates
from streamline_hooks.evaluation.evaluate import evaluate
from streamline_hooks.evaluation.likeness import Likeness, embeddings, likeness, likeness_of, recall_at
from streamline_hooks.evaluation.perplexity import Perplexity, perplexity, perplexity_of_candidates
from streamline_hooks.evaluation.probes import probes
from streamline_hooks.evaluation.problems import Problem, Solved, read_problems, solve
from streamline_hooks.evaluation.result import Evaluation, Scores
from streamline_hooks.evaluation.sliding import TextComparison, TextPerplexity, sliding_agreement, sliding_perplexity
from streamline_hooks.evaluation.speed import SpeedReport, Spread, Timing, measure_speed
from streamline_hooks.evaluation.suite import Suite
from streamline_hooks.evaluation.task_files import config_of_file, config_of_rows
from streamline_hooks.evaluation.task_scores import MEASURES, TaskScores
from streamline_hooks.evaluation.tasks import TaskResult, TaskSettings, run_tasks
from streamline_hooks.evaluation.writing import Matched, WritingScores, Written, write_on

__all__ = [
    "MEASURES",
    "Agreement",
    "Candidate",
    "Difference",
    "Estimate",
    "Evaluation",
    "Likeness",
    "Matched",
    "Perplexity",
    "Problem",
    "Retained",
    "Scores",
    "Solved",
    "SpeedReport",
    "Spread",
    "Suite",
    "TaskAnswers",
    "TaskResult",
    "TaskScores",
    "TaskSettings",
    "TextComparison",
    "TextPerplexity",
    "Timing",
    "WritingScores",
    "Written",
    "agreement",
    "compared",
    "config_of_file",
    "config_of_rows",
    "distances_of_candidates",
    "embeddings",
    "evaluate",
    "likeness",
    "likeness_of",
    "measure_speed",
    "perplexity",
    "perplexity_of_candidates",
    "probes",
    "read_problems",
    "recall_at",
    "retained",
    "run_tasks",
    "sliding_agreement",
    "sliding_perplexity",
    "solve",
    "stability",
    "write_on",
]
