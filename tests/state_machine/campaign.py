"""Chunks of the state machine: a family, a seed, and a fixed number of examples."""

from __future__ import annotations

from hypothesis import seed as seeded
from hypothesis.stateful import run_state_machine_as_test

from tests.state_machine.machine import SETTINGS, machine_of


def run_chunk(family: str, seed: int) -> int:
    """Run one chunk and return the number of steps that it executed.

    Raises
    ------
    AssertionError, Exception
        What the machine found, with the shortest steps that reproduce it in the notes.
    """
    machine = machine_of(family)
    before = machine.steps
    seeded(seed)(machine)
    run_state_machine_as_test(machine, settings=SETTINGS)
    return machine.steps - before
