"""What was lost."""

from streamline_hooks.evaluation.agreement import kl_of_candidates
from streamline_hooks.evaluation.candidates import Candidate
from streamline_hooks.evaluation.perplexity import Perplexity, perplexity, perplexity_of_candidates

__all__ = ["Candidate", "Perplexity", "kl_of_candidates", "perplexity", "perplexity_of_candidates"]
