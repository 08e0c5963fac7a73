"""Sequences that say a passage twice: the right ones, the right halves, and no test text."""

from __future__ import annotations

from math import ceil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from streamline_hooks import StreamlineError
from streamline_hooks.data import with_repeated_passages
from streamline_hooks.data.split import TokenSplit, rows_fingerprint


def split_of(rows: int, length: int) -> TokenSplit:
    ids = torch.arange(rows * length).view(rows, length)
    return TokenSplit(ids, ids + 1000, ids + 2000, "as it was", ("a note",))


@given(rows=st.integers(1, 30), length=st.integers(4, 11), share=st.sampled_from([0.25, 0.5, 0.3, 0.1, 1.0]))
def test_a_share_of_the_sequences_repeats_its_first_half(rows: int, length: int, share: float) -> None:
    split = split_of(rows, length)
    made, half = with_repeated_passages(split, share), length // 2
    for name in ("calibration", "validation"):
        before, after = getattr(split, name), getattr(made, name)
        changed = (before != after).any(dim=1)
        assert int(changed.sum()) == ceil(round(rows * share, 6)) and changed[0]
        assert torch.equal(after[~changed], before[~changed])
        assert torch.equal(after[changed, half : 2 * half], before[changed, :half])
        assert torch.equal(after[changed, :half], before[changed, :half])
        assert torch.equal(after[:, 2 * half :], before[:, 2 * half :])
    assert made.test is split.test
    assert torch.equal(split.calibration, split_of(rows, length).calibration), "the split that was given was changed"
    assert made.fingerprint == rows_fingerprint(made.calibration) != split.fingerprint
    assert made.notes[0] == "a note" and "of its first" not in made.notes[0]


def test_any_stretch_of_the_text_has_its_share() -> None:
    """What is held out is the last fifth, and what is ranked by the beginning: they are to be of the same kind."""
    made, before = with_repeated_passages(split_of(40, 8), 0.25), split_of(40, 8)
    changed = (made.calibration != before.calibration).any(dim=1)
    assert [int(part.sum()) for part in changed.split(8)] == [2] * 5
    assert made.notes[1] == (
        "the second half of 10 of 40 calibration sequences, 10 of 40 validation sequences repeats the first"
    )


@pytest.mark.parametrize(
    ("split", "share", "said"),
    [
        (split_of(8, 8), 0.0, r"share=0 .*0 < share <= 1"),
        (split_of(8, 8), 1.5, r"share=1\.5"),
        (split_of(8, 3), 0.5, r"3 tokens.*too short.*Expected four"),
    ],
)
def test_what_has_no_passages_is_refused(split: TokenSplit, share: float, said: str) -> None:
    with pytest.raises(StreamlineError, match=said):
        with_repeated_passages(split, share)


def test_packed_rows_are_refused() -> None:
    rows = torch.arange(16).view(2, 8)
    packed = TokenSplit(rows, rows, rows, "", positions={"calibration": rows})
    with pytest.raises(StreamlineError, match=r"Packed rows.*repeated_context=0"):
        with_repeated_passages(packed, 0.5)
