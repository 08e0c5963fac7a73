"""What a selection may say, and how it is made of blocks."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamline_hooks import StreamlineError
from streamline_hooks.selection import Selection


@given(st.sets(st.integers(0, 12), min_size=1))
def test_blocks_make_the_fewest_windows(blocks: set[int]) -> None:
    selection = Selection.of_blocks(blocks)
    assert selection.blocks == blocks
    assert len(selection.windows) == sum(k - 1 not in blocks for k in blocks)
    assert Selection(selection.windows) == selection


@pytest.mark.parametrize(
    ("windows", "zeroed", "text"),
    [
        ((), (), "both empty.*at least one block"),
        ((range(2, 2),), (), "windows=.*non-empty ranges"),
        ((range(-1, 2),), (), "windows=.*non-empty ranges"),
        ((range(0, 4, 2),), (), "windows=.*non-empty ranges"),
        (((1, 2),), (), "windows=.*non-empty ranges"),
        ((range(3, 5), range(0, 2)), (), r"in order.*between two"),
        ((range(0, 3), range(2, 4)), (), r"in order.*between two"),
        ((range(0, 2), range(2, 4)), (), r"in order.*between two"),
        ((range(0, 2),), ((1, "mlp"),), r"zeroed.*block 1 is removed"),
        ((), ((1, "mlp"), (0, "mlp")), r"zeroed.*sorted, unique"),
        ((), ((1, "mlp"), (1, "mlp")), r"zeroed.*sorted, unique"),
        ((), ((1, "head"),), r"'head' is unknown"),
    ],
)
def test_a_selection_that_contradicts_itself(windows: Any, zeroed: Any, text: str) -> None:
    with pytest.raises(StreamlineError, match=text):
        Selection(windows, zeroed)
