"""The state machine in CI: at least 2,000 steps over all families, and planted faults that it must find."""

from __future__ import annotations

import pytest
from hypothesis import Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.state_machine.campaign import run_chunk
from tests.state_machine.machine import SETTINGS, machine_of
from tests.state_machine.machine_faults import FAULTS
from tests.state_machine.models import FAMILIES

STEPS = 2_100


@pytest.mark.parametrize("family", FAMILIES)
def test_every_step_keeps_the_contracts(family: str) -> None:
    share, steps = STEPS // len(FAMILIES), 0
    number = 100 * list(FAMILIES).index(family)  # a seed gives all families the same steps
    while steps < share:
        steps += run_chunk(family, number)
        number += 1
    assert steps >= share


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    family, plant = FAULTS[fault]
    plant(monkeypatch)
    machine = machine_of(family)
    seed(0)(machine)
    before = machine.steps
    budget = settings(SETTINGS, max_examples=STEPS // 30, phases=[Phase.generate])
    with pytest.raises(AssertionError):
        run_state_machine_as_test(machine, settings=budget)
    assert machine.steps - before < STEPS
