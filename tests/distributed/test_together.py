"""What processes tell one another, as far as it can be seen in one."""

from __future__ import annotations

import pytest
import torch

from streamline_hooks import StreamlineError, UnsupportedSurgery
from streamline_hooks.digests import batches_digest
from streamline_hooks.distributed import together
from streamline_hooks.distributed.together import Failure, collective_device, failure_of_all


def test_one_process_raises_what_was_raised() -> None:
    error = KeyError("mine")
    with pytest.raises(KeyError) as caught, together("test"):
        raise error
    assert caught.value is error


def test_one_process_takes_everything_and_adds_nothing() -> None:
    values = torch.ones(3)
    with together("test") as work:
        assert work.take([1, 2, 3]) == [1, 2, 3] == work.take([1, 2, 3], share=False)
        assert work.tell("word") == ["word"]
        assert work.summed(values) is values and work.largest(values) is values


def test_a_failure_keeps_its_kind() -> None:
    refused = Failure.of(UnsupportedSurgery("Looped.", "looped"))
    found = failure_of_all({0: refused}, 3)
    assert isinstance(found, UnsupportedSurgery) and found.cause == "looped"
    assert str(found) == "Process 0 of 3: Looped."
    mixed = failure_of_all({0: refused, 2: Failure.of(StreamlineError("Not finite."), " (here)")}, 3)
    assert not isinstance(mixed, UnsupportedSurgery)
    assert str(mixed) == "Process 0 of 3: Looped. Process 2 of 3 (here): Not finite."


def test_what_all_say_is_said_once() -> None:
    same = {rank: Failure("skip=-1 must be 0 or more.") for rank in range(2)}
    assert str(failure_of_all(same, 2)) == "skip=-1 must be 0 or more."
    assert str(failure_of_all(same, 3)).startswith("Process 0 of 3: skip=-1")
    shares = {rank: Failure("NaN (batch 1).", note=f" (share {rank})") for rank in range(2)}
    found = str(failure_of_all(shares, 2))
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
        ("cpu:gloo,cuda:gloo", "cuda:3", "cpu"),
        ("cpu:gloo,cuda:nccl", "cuda:3", "cpu"),
        ("cuda:nccl", "cuda:3", "cuda:3"),
        ("cuda:nccl", "cpu", "cuda"),
    ],
)
def test_sums_travel_where_the_backend_works(
    config: str, home: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.distributed, "get_backend_config", lambda: config)
    assert collective_device(torch.device(home)) == torch.device(expected)
