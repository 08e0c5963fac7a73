"""What a target comes to, and which windows are free."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamline_hooks import StreamlineError
from streamline_hooks.selection import blocks_to_remove, protected_blocks, windows


@pytest.mark.parametrize(
    ("target", "length", "slots", "count"),
    [
        (0.25, 30, 0, 8),  # 7.5 is rounded half up
        (0.25, 30, 1, 9),  # a replacement with a slot of its own
        (0.25, 32, 0, 8),
        (0.01, 30, 0, 1),
        (0.5, 3, 0, 2),
        (8, 30, 0, 8),
        (8.0, 30, 0, 8),
        (1, 2, 0, 1),
    ],
)
def test_targets(target: float, length: int, slots: int, count: int) -> None:
    assert blocks_to_remove(target, length, slots) == count


@pytest.mark.parametrize("target", [0, 0.0, -1, -0.25, 2.5, True, 1.0, float("nan"), float("inf")])
def test_nothing_that_can_be_removed(target: float) -> None:
    with pytest.raises(StreamlineError, match=r"is nothing that can be removed; give a number of blocks \(1 to 29\)"):
        blocks_to_remove(target, 30)


@pytest.mark.parametrize("target", [30, 31, 0.99])
def test_everything(target: float) -> None:
    with pytest.raises(StreamlineError, match="of 30 blocks; at least one block must stay"):
        blocks_to_remove(target, 30)


@given(st.integers(2, 12), st.data())
def test_windows_are_all_those_without_a_protected_block(length: int, data: st.DataObject) -> None:
    size = data.draw(st.integers(1, length))
    keep = data.draw(st.sets(st.integers(-length, length - 1), max_size=3))
    protected = protected_blocks(keep, length)
    expected = [
        range(a, a + size)
        for a in range(length)
        if a + size <= length and not any(k in protected for k in range(a, a + size))
    ]
    if expected:
        assert windows(length, size, protected) == expected
    else:
        with pytest.raises(StreamlineError, match=f"No run of {size} consecutive blocks among {length} is free"):
            windows(length, size, protected)


def test_protected_blocks_out_of_range() -> None:
    assert protected_blocks([0, -1], 5) == {0, 4}
    with pytest.raises(StreamlineError, match="keep=5 is out of range: the stack has 5 blocks, 0 to 4"):
        protected_blocks([5], 5)
