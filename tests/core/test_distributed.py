"""Ranks, their rows, and what a step does in one process."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from streamline_hooks import StreamlineError, UnsupportedSurgery
from streamline_hooks.core.distributed import (
    Failure,
    Processes,
    batch_rows,
    collective_device,
    combined_failure,
    current_processes,
    distributed_step,
    select_rows,
    shard_rows,
    single_process,
)
from streamline_hooks.core.hashing import batches_digest
from streamline_hooks.core.progress import progress_bar


@given(st.integers(0, 30), st.integers(1, 9))
def test_every_item_is_in_one_share(items: int, count: int) -> None:
    shares = [Processes(rank, count).shard(range(items)) for rank in range(count)]
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
    assert current_processes() == Processes(0, 1)


def test_a_group_is_seen_but_not_inside_alone(third_of_four: None) -> None:
    assert current_processes() == Processes(2, 4)
    with pytest.raises(KeyError), single_process(), single_process():
        assert current_processes() == Processes(0, 1)
        raise KeyError
    assert current_processes() == Processes(2, 4)


def test_only_the_first_process_draws_a_bar(third_of_four: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert progress_bar(3, "silent").disable is True
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    drawn = progress_bar(3, "drawn")
    monkeypatch.undo()
    assert drawn.disable is progress_bar(3, "as without a group").disable


@given(st.lists(st.integers(0, 6), max_size=8), st.integers(1, 5))
def test_every_sequence_is_one_processs_own(sizes: list[int], count: int) -> None:
    batches = [torch.arange(rows)[:, None] + 100 * n for n, rows in enumerate(sizes)]
    shares = [shard_rows(batches, Processes(rank, count)) for rank in range(count)]
    parts = [[select_rows(batch, rows) for batch, rows in zip(batches, its, strict=True)] for its in shares]
    for n, batch in enumerate(batches):
        assert sorted(int(v) for part in parts for v in part[n]) == batch.flatten().tolist()
        lengths = [len(part[n]) for part in parts]
        assert max(lengths) - min(lengths) <= 1
        assert all(
            (rows[n].start == rows[n].stop) == (len(part[n]) == 0) for rows, part in zip(shares, parts, strict=True)
        )
    totals = [sum(map(len, part)) for part in parts]
    assert max(totals) - min(totals) <= 1


@pytest.mark.parametrize("patches", [12, 13])
def test_patches_are_divided_only_where_the_grid_describes_all_of_them(patches: int) -> None:
    grid = torch.tensor([[1, 2, 2], [1, 2, 4]])  # 4 and 8 patches
    batch = {"input_ids": torch.zeros(2, 3), "image_grid_thw": grid, "pixel_values": torch.arange(patches)}
    part = select_rows(batch, slice(1, 2))["pixel_values"]
    assert part.tolist() == list(range(4, 12) if patches == 12 else range(13))


def test_each_process_gets_the_patches_of_its_rows() -> None:
    grid = torch.tensor([[1, 1, 2], [1, 2, 2], [1, 1, 1], [1, 1, 3]])  # 2, 4, 1 and 3 patches
    batch = {"input_ids": torch.zeros(4, 3), "image_grid_thw": grid, "pixel_values": torch.arange(10)}
    parts = [select_rows(batch, slice(rank, 4, 2)) for rank in range(2)]
    assert [part["pixel_values"].tolist() for part in parts] == [[0, 1, 6], [2, 3, 4, 5, 7, 8, 9]]
    assert [len(part["pixel_values"]) for part in parts] == [int(p["image_grid_thw"].prod(1).sum()) for p in parts]
    assert select_rows(batch, slice(4, 4, 2))["pixel_values"].tolist() == []


def test_what_is_not_as_long_as_there_are_sequences_stays() -> None:
    scalar, other = torch.tensor(2.0), torch.arange(5)
    batch = {"other": other, "input_ids": torch.arange(6).view(3, 2), "scale": scalar, "name": "text"}
    assert batch_rows(batch) == 3
    part = select_rows(batch, slice(1, 3, 2))
    assert part["input_ids"].tolist() == [[2, 3]]
    assert part["other"] is other and part["scale"] is scalar and part["name"] == "text"
    assert select_rows(torch.arange(4), slice(1, 4, 2)).tolist() == [1, 3]


@pytest.mark.parametrize("sequences", [2, 3])
def test_positions_that_count_three_a_token_are_dealt_by_their_sequences(sequences: int) -> None:
    """As many sequences as kinds of positions are no sign of anything."""
    positions = torch.arange(3 * sequences * 5).reshape(3, sequences, 5)
    batch = {"input_ids": torch.zeros(sequences, 5), "position_ids": positions}
    assert torch.equal(select_rows(batch, slice(1, 2))["position_ids"], positions[:, 1:2])
    flat = {"input_ids": torch.zeros(sequences, 5), "position_ids": positions[0]}
    assert torch.equal(select_rows(flat, slice(1, 2))["position_ids"], positions[0, 1:2])


def test_one_process_raises_what_was_raised() -> None:
    error = KeyError("mine")
    with pytest.raises(KeyError) as caught, distributed_step("test"):
        raise error
    assert caught.value is error


def test_one_process_takes_everything_and_adds_nothing() -> None:
    values = torch.ones(3)
    with distributed_step("test") as work:
        assert work.shard([1, 2, 3]) == [1, 2, 3] == work.shard([1, 2, 3], shard=False)
        assert work.all_gather_object("word") == ["word"]
        assert work.all_reduce(values) is values


@pytest.fixture()
def first_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 of two ranks. Rank 1 sends the same objects as rank 0."""

    def all_gather_object(gathered: list[object], value: object) -> None:
        gathered[:] = [value] * len(gathered)

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_gather_object", all_gather_object)
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", lambda objects, src: None)


def test_items_are_shared_among_the_ranks_by_default(first_of_two: None) -> None:
    items = [torch.tensor([number]) for number in range(3)]
    with distributed_step("test") as work:
        assert [int(item) for item in work.shard(items)] == [0, 2]
        assert [int(item) for item in work.shard(items, shard=False)] == [0, 1, 2]


def test_rank_0_makes_the_object_that_is_broadcast(first_of_two: None) -> None:
    with distributed_step("test") as work:
        assert work.broadcast_object(current_processes) == Processes(0, 1), "inside single_process"


def test_a_failure_keeps_its_kind() -> None:
    refused = Failure.of(UnsupportedSurgery("Looped.", "looped"))
    found = combined_failure({0: refused}, 3)
    assert isinstance(found, UnsupportedSurgery) and found.cause == "looped"
    assert str(found) == "Process 0 of 3: Looped."
    mixed = combined_failure({0: refused, 2: Failure.of(StreamlineError("Not finite."), note=" (here)")}, 3)
    assert not isinstance(mixed, UnsupportedSurgery)
    assert str(mixed) == "Process 0 of 3: Looped. Process 2 of 3 (here): Not finite."


def test_what_all_say_is_said_once() -> None:
    same = {rank: Failure("skip=-1 must be 0 or more.") for rank in range(2)}
    assert str(combined_failure(same, 2)) == "skip=-1 must be 0 or more."
    assert str(combined_failure(same, 3)).startswith("Process 0 of 3: skip=-1")
    shares = {rank: Failure("NaN (batch 1).", note=f" (share {rank})") for rank in range(2)}
    found = str(combined_failure(shares, 2))
    assert found == "Process 0 of 2 (share 0): NaN (batch 1). Process 1 of 2 (share 1): NaN (batch 1)."


def test_other_batches_have_anotherbatches_digest() -> None:
    ids = torch.arange(6).view(2, 3)
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}, ids]
    others = [
        batches[::-1],
        batches[:1],
        [{"input_ids": ids, "token_type_ids": torch.ones_like(ids)}, ids],
        [batches[0], ids.view(3, 2)],
        [batches[0], ids.int()],
        [batches[0], ids + 1],
        [(batches[0], None), (ids, torch.tensor(True))],
    ]
    assert len({batches_digest(one) for one in [batches, *others]}) == 1 + len(others)
    assert batches_digest([ids]) == batches_digest([ids.T.contiguous().T])
    halves = torch.ones(2, 3, dtype=torch.bfloat16)  # which NumPy does not know
    assert batches_digest([halves]) != batches_digest([2 * halves])


@pytest.mark.parametrize(
    ("config", "home", "expected"),
    [
        ("cpu:gloo,cuda:nccl", "cuda:3", "cuda:3"),
        ("cpu:gloo,cuda:nccl", "mps", "cpu"),
        ("cuda:nccl", "cpu", "cuda"),
    ],
)
def test_collectives_run_where_the_backend_works(
    config: str, home: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.distributed, "get_backend_config", lambda: config)
    assert collective_device(torch.device(home)) == torch.device(expected)
