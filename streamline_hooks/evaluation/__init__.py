"""What was lost, how fast it is, and what finding out will cost."""

from streamline_hooks.evaluation.agreement import Agreement, agreement, kl_of_candidates
from streamline_hooks.evaluation.candidates import Candidate
from streamline_hooks.evaluation.cost import Cost, Pace
from streamline_hooks.evaluation.pace import measure_pace
from streamline_hooks.evaluation.perplexity import Perplexity, perplexity, perplexity_of_candidates
from streamline_hooks.evaluation.speed import SpeedReport, Spread, Timing, measure_speed

__all__ = [
    "Agreement",
    "Candidate",
    "Cost",
    "Pace",
    "Perplexity",
    "SpeedReport",
    "Spread",
    "Timing",
    "agreement",
    "kl_of_candidates",
    "measure_pace",
    "measure_speed",
    "perplexity",
    "perplexity_of_candidates",
]
