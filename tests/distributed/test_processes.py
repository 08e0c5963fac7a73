"""Shares, and which process this is."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from streamline_hooks import passes
from streamline_hooks.distributed import Processes, alone, here


@given(st.integers(0, 30), st.integers(1, 9))
def test_every_item_is_in_one_share(items: int, count: int) -> None:
    shares = [Processes(rank, count).share(range(items)) for rank in range(count)]
    assert sorted(item for share in shares for item in share) == list(range(items))
    lengths = [len(share) for share in shares]
    assert max(lengths) - min(lengths) <= 1
    assert all(share[n] == count * n + rank for rank, share in enumerate(shares) for n in range(len(share)))


@pytest.fixture()
def third_of_four(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 2)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)


def test_without_a_group_there_is_one_process() -> None:
    assert here() == Processes(0, 1)


def test_a_group_is_seen_but_not_inside_alone(third_of_four: None) -> None:
    assert here() == Processes(2, 4)
    with pytest.raises(KeyError), alone(), alone():
        assert here() == Processes(0, 1)
        raise KeyError
    assert here() == Processes(2, 4)


def test_only_the_first_process_draws_a_bar(third_of_four: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert passes.progress(3, "silent").disable is True
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    drawn = passes.progress(3, "drawn")
    monkeypatch.undo()
    assert drawn.disable is passes.progress(3, "as without a group").disable
