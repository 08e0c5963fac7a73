"""Every planted fault is seen by its assertion, the healthy models by none, and the page says what was found."""

from __future__ import annotations

import re

import pytest
import transformers

from tests.testing.planted_faults import CHECKS, FAULTS, HEALTHY, PAGE, Fault, line, outcomes

TEXT = PAGE.read_text() if PAGE.exists() else ""
ROWS = [row for row in TEXT.splitlines() if row.startswith("| ")][1:]
SAME_VERSION = f"with Transformers {transformers.__version__}:" in TEXT


@pytest.mark.sample(12)
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name.replace(" ", "-"))
def test_a_planted_fault_is_seen(fault: Fault) -> None:
    found = outcomes(fault.plant)
    assert found[fault.caught_by].verdict == "caught", found[fault.caught_by].text
    assert re.search(fault.says, found[fault.caught_by].text)
    if SAME_VERSION:
        assert line(fault.name, found) in ROWS, "run python -m tests.testing.planted_faults"


@pytest.mark.parametrize("name", HEALTHY)
def test_nothing_is_seen_where_nothing_is_planted(name: str) -> None:
    found = outcomes(HEALTHY[name])
    assert {check: outcome for check, outcome in found.items() if outcome.verdict} == {}
    assert line(name, found) in ROWS


def test_the_page_has_every_fault_and_no_other() -> None:
    assert [row.split(" | ")[0].removeprefix("| ") for row in ROWS] == [*HEALTHY, *(fault.name for fault in FAULTS)]
    assert f"{len(FAULTS)} faults" in TEXT and f"| fault | {' | '.join(CHECKS)} |" in TEXT
    assert re.search(r"python -m tests\.testing\.planted_faults", TEXT)


@pytest.mark.parametrize("check", CHECKS)
def test_no_check_is_for_nothing(check: str) -> None:
    column = 2 + list(CHECKS).index(check)
    seen = {row.split("|")[1].strip() for row in ROWS if row.split("|")[column].strip() == "●"}
    assert seen and not seen & HEALTHY.keys()
