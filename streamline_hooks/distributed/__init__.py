"""Several processes that measure together. Nothing here knows of models or of what is summed."""

from streamline_hooks.distributed.processes import Processes, alone, here
from streamline_hooks.distributed.together import Together, together

__all__ = ["Processes", "Together", "alone", "here", "together"]
