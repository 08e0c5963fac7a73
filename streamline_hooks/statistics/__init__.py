"""What is summed while a pass runs. The sums know nothing of models; `measure` runs the passes."""

from streamline_hooks.statistics.measure import measure_moments, measure_similarity
from streamline_hooks.statistics.moments import WindowMoments
from streamline_hooks.statistics.similarity import StateSimilarity

__all__ = ["StateSimilarity", "WindowMoments", "measure_moments", "measure_similarity"]
