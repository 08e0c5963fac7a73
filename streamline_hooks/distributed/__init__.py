"""Ranks of a distributed run that share work and fail together. Nothing here knows of models."""

from streamline_hooks.distributed.interrupts import AllInterrupted, Interrupts, agreed, noted_interrupts
from streamline_hooks.distributed.processes import (
    Processes,
    Together,
    alone,
    dealt,
    here,
    sequences_of,
    some_of,
    together,
)

__all__ = [
    "AllInterrupted",
    "Interrupts",
    "Processes",
    "Together",
    "agreed",
    "alone",
    "dealt",
    "here",
    "noted_interrupts",
    "sequences_of",
    "some_of",
    "together",
]
