"""Ranks of a distributed run that share work and fail together. Nothing here knows of models."""

from streamline_hooks.distributed.interrupts import AllInterrupted, Interrupts, agreed, noted_interrupts
from streamline_hooks.distributed.processes import (
    DistributedStep,
    Processes,
    alone,
    distributed_step,
    here,
    sequences_of,
    shard_rows,
    some_of,
)

__all__ = [
    "AllInterrupted",
    "DistributedStep",
    "Interrupts",
    "Processes",
    "agreed",
    "alone",
    "distributed_step",
    "here",
    "noted_interrupts",
    "sequences_of",
    "shard_rows",
    "some_of",
]
