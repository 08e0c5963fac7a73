"""Sequences are dealt so that none is lost, none is run twice, and no process has much more than another."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from streamline_hooks.distributed import Processes, dealt, sequences_of, some_of


@given(st.lists(st.integers(0, 6), max_size=8), st.integers(1, 5))
def test_every_sequence_is_one_processs_own(sizes: list[int], count: int) -> None:
    batches = [torch.arange(rows)[:, None] + 100 * n for n, rows in enumerate(sizes)]
    shares = [dealt(batches, Processes(rank, count)) for rank in range(count)]
    parts = [[some_of(batch, rows) for batch, rows in zip(batches, its, strict=True)] for its in shares]
    for n, batch in enumerate(batches):
        assert sorted(int(v) for part in parts for v in part[n]) == batch.flatten().tolist()
        lengths = [len(part[n]) for part in parts]
        assert max(lengths) - min(lengths) <= 1
        assert all(
            (rows[n].start == rows[n].stop) == (len(part[n]) == 0) for rows, part in zip(shares, parts, strict=True)
        )
    totals = [sum(map(len, part)) for part in parts]
    assert max(totals) - min(totals) <= 1


def test_what_is_not_as_long_as_there_are_sequences_stays() -> None:
    scalar, other = torch.tensor(2.0), torch.arange(5)
    batch = {"other": other, "input_ids": torch.arange(6).view(3, 2), "scale": scalar, "name": "text"}
    assert sequences_of(batch) == 3
    part = some_of(batch, slice(1, 3, 2))
    assert part["input_ids"].tolist() == [[2, 3]]
    assert part["other"] is other and part["scale"] is scalar and part["name"] == "text"
    assert some_of(torch.arange(4), slice(1, 4, 2)).tolist() == [1, 3]


@pytest.mark.parametrize("sequences", [2, 3])
def test_positions_that_count_three_a_token_are_dealt_by_their_sequences(sequences: int) -> None:
    """As many sequences as kinds of positions are no sign of anything."""
    positions = torch.arange(3 * sequences * 5).reshape(3, sequences, 5)
    batch = {"input_ids": torch.zeros(sequences, 5), "position_ids": positions}
    assert torch.equal(some_of(batch, slice(1, 2))["position_ids"], positions[:, 1:2])
    flat = {"input_ids": torch.zeros(sequences, 5), "position_ids": positions[0]}
    assert torch.equal(some_of(flat, slice(1, 2))["position_ids"], positions[0, 1:2])
