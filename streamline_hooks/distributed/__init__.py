"""Several processes that work together. Nothing here knows of models or of what is summed."""

from streamline_hooks.distributed.agreed import AllInterrupted, agreed
from streamline_hooks.distributed.dealing import dealt, sequences_of, some_of
from streamline_hooks.distributed.interrupts import Interrupts, noted_interrupts
from streamline_hooks.distributed.processes import Processes, alone, here
from streamline_hooks.distributed.shards import is_sharded, shards_may_be_operated_on, surgery_on_shards
from streamline_hooks.distributed.together import Together, failing_together, together

__all__ = [
    "AllInterrupted",
    "Interrupts",
    "Processes",
    "Together",
    "agreed",
    "alone",
    "dealt",
    "failing_together",
    "here",
    "is_sharded",
    "noted_interrupts",
    "sequences_of",
    "shards_may_be_operated_on",
    "some_of",
    "surgery_on_shards",
    "together",
]
