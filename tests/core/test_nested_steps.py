"""Steps inside steps: a failure at any depth is heard by all, and nobody is left waiting for one that has gone on."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.processes import in_processes

pytestmark = pytest.mark.slow

_CODE = """
    from streamline_hooks.core import DistributedStep, current_processes, distributed_step

    @distributed_step("outer")
    def outer(fails_before, fails_inside, fails_late=(), at="inner"):
        if rank in fails_before:
            raise KeyError("before")
        with distributed_step(at) as work:
            if rank in fails_inside:
                raise KeyError("inside")
            work.all_gather_object(rank)
        with distributed_step("late"):  # nothing is exchanged after the failure
            if rank in fails_late:
                raise KeyError("late")
        step = DistributedStep("outer", current_processes())
        return step.broadcast_object(lambda: [torch.ones(2), "made by the first"])

    def raised(*given, **more):
        try:
            return outer(*given, **more)[1]
        except Exception as error:
            return f"{type(error).__name__}: {error}"

    said["before"] = raised([2], [])
    said["inside"] = raised([], [1])
    said["both"] = raised([0], [1])
    said["all"] = raised([0, 1, 2], [])
    said["late"] = raised([], [], [1])
    with distributed_step("around") as work:  # whose own exchange hears of a step that is over
        try:
            with distributed_step("inside"):
                if rank == 2:
                    raise KeyError("late")
            work.all_gather_object(rank)
        except Exception as error:
            said["around"] = f"{type(error).__name__}: {error}"
    try:
        with distributed_step("deep"):
            if rank == 0:
                raise KeyError("deep")
            with distributed_step("second"), distributed_step("first") as work:
                work.all_gather_object(rank)
    except Exception as error:
        said["deep"] = f"{type(error).__name__}: {error}"
    said["apart"] = raised([], [], at=f"step {min(rank, 1)}")
    said["whole"] = raised([], [])
    tensor = torch.full((3,), float(rank), requires_grad=True)
    with distributed_step("sums") as work:
        said["sum"] = work.all_reduce(tensor.clone()).tolist()
        work.broadcast_([tensor.mul(rank + 1.0).detach().requires_grad_(True), tensor])
    for name, collective in {
        "shard": lambda work: work.shard([tensor]),
        "all_gather_object": lambda work: work.all_gather_object(rank),
        "broadcast_object": lambda work: work.broadcast_object(lambda: rank),
        "broadcast_": lambda work: work.broadcast_([tensor]),
        "all_reduce": lambda work: work.all_reduce(tensor),
    }.items():
        try:
            with distributed_step(name) as work:
                if rank == 1:
                    raise KeyError(name)
                collective(work)
        except Exception as error:
            said[name] = f"{type(error).__name__}: {error}"
    said["afterwards"] = raised([], [])
"""


def test_whoever_fails_all_hear_of_it_and_go_on_in_step(tmp_path: Path) -> None:
    said = in_processes(_CODE, tmp_path, 3)
    assert said[0] == said[1] == said[2]
    assert said[0]["before"] == "StreamlineError: Process 2 of 3: KeyError: 'before'"
    assert said[0]["inside"] == "StreamlineError: Process 1 of 3: KeyError: 'inside'"
    assert said[0]["both"] == "StreamlineError: Process 0 of 3: KeyError: 'before' Process 1 of 3: KeyError: 'inside'"
    assert said[0]["all"] == "StreamlineError: KeyError: 'before'"
    assert said[0]["late"] == "StreamlineError: Process 1 of 3: KeyError: 'late'"
    assert said[0]["around"] == "StreamlineError: Process 2 of 3: KeyError: 'late'"
    assert said[0]["deep"] == "StreamlineError: Process 0 of 3: KeyError: 'deep'"
    assert "0 at step 0, 1 at step 1, 2 at step 1" in said[0]["apart"]
    assert said[0]["whole"] == said[0]["afterwards"] == "made by the first"
    assert said[0]["sum"] == [3.0, 3.0, 3.0]
    for name in ("shard", "all_gather_object", "broadcast_object", "broadcast_", "all_reduce"):
        assert said[0][name] == f"StreamlineError: Process 1 of 3: KeyError: '{name}'"
