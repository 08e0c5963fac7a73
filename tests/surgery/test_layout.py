"""The planned order of blocks and splices."""

from __future__ import annotations

from torch import nn

from streamline_hooks.surgery.layout import StackLayout
from streamline_hooks.surgery.splice import AFTER, set_splices


def layout(length: int = 5) -> StackLayout:
    return StackLayout([nn.Linear(2, 2) for _ in range(length)])


def test_a_new_block_takes_a_slot_after_the_positions_before_it() -> None:
    replaced, inserted = layout(), layout()
    replaced.replace_window(range(1, 3), nn.Linear(2, 2))
    assert [replaced.takes_slot_after(k) for k in range(5)] == [True, True, False, False, False]
    inserted.insert(3, nn.Linear(2, 2))
    assert [inserted.takes_slot_after(k) for k in range(5)] == [True, True, True, False, False]


def test_a_splice_takes_no_slot() -> None:
    spliced = layout()
    spliced.replace_window(range(3, 5), nn.Identity())
    spliced.replace_window(range(1, 2), None)
    spliced.insert(5, nn.Identity())
    assert not spliced.takes_slot_after(0)


def test_earlier_splices_at_the_end_are_removed_with_the_last_block_only() -> None:
    blocks, splice = [nn.Linear(2, 2) for _ in range(5)], nn.Identity()
    set_splices(blocks[-1], AFTER, [splice])
    for window, expected in ((range(1, 3), [splice]), (range(3, 5), [])):
        planned = StackLayout(blocks)
        planned.replace_window(window, None)
        slots, at_end = planned.arrange()
        assert [slot.module for slot in slots] == [block for k, block in enumerate(blocks) if k not in window]
        assert [module for module, _, _ in at_end] == expected
