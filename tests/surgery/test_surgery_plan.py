"""Plans of surgeries that follow each other, read as one."""

from __future__ import annotations

import json
from dataclasses import replace

from streamline_hooks.surgery.plan import Slot, Splice, SurgeryPlan

FIRST = SurgeryPlan(
    "layers", 6, tuple(Slot(k, "Block") for k in (0, 3, 4, 5)), (Splice(1, 1, (1, 3), "Nudge"),), dropped=("Identity",)
)
SECOND = SurgeryPlan(
    "layers",
    4,
    (Slot(0, "Block"), Slot(1, "Block", zeroed=("mlp",)), Slot(3, "Block")),
    (Splice(2, 2, (2, 3), "Linear"), Splice(3, 4, None, "Nudge")),
    dropped=("Linear",),
)


def test_numbers_are_those_of_the_model_before_both() -> None:
    assert SECOND.after(FIRST) == SurgeryPlan(
        "layers",
        6,
        (Slot(0, "Block"), Slot(3, "Block", zeroed=("mlp",)), Slot(5, "Block")),
        (Splice(2, 4, (4, 5), "Linear"), Splice(3, 6, None, "Nudge")),
        dropped=("Identity", "Linear"),
    )


def test_what_no_configuration_counts_in_one_of_them_is_not_described() -> None:
    assert SECOND.after(FIRST).described
    assert not SECOND.after(replace(FIRST, described=False)).described
    assert not replace(SECOND, described=False).after(FIRST).described


def test_zeroed_branches_are_stored_under_their_earlier_name() -> None:
    """Checkpoints of all versions have the key `silenced`, in the plan and in each slot."""
    values = SECOND.to_dict()
    assert values["silenced"] == [[1, "mlp"]] and [list(s["silenced"]) for s in values["slots"]] == [[], ["mlp"], []]
    assert all("zeroed" not in entry for entry in (values, *values["slots"]))
    assert SurgeryPlan.from_dict(json.loads(json.dumps(values))) == SECOND
