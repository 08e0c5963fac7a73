"""Two processes measure, repair and choose what one does, and fail together."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.processes import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("together")
    command = [sys.executable, "-m", "tests.statistics.measured_together", str(found)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    return found


@pytest.fixture(scope="module")
def one(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "one.pt", weights_only=True)


@pytest.fixture(scope="module")
def two(folder: Path) -> list[dict[str, Any]]:
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def values(found: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value in what was found, and where it is."""
    if isinstance(found, (dict, list, tuple)):
        for key, inside in found.items() if isinstance(found, dict) else enumerate(found):
            yield from values(inside, f"{path}/{key}")
    else:
        yield path, found


def assert_alike(mine: Any, theirs: Any, within: float) -> None:
    ours, others = dict(values(mine)), dict(values(theirs))
    assert ours.keys() == others.keys()
    for path, value in ours.items():
        if isinstance(value, Tensor):
            assert value.dtype == others[path].dtype, path
            scale = max(1.0, float(others[path].double().nan_to_num().abs().max())) if value.numel() else 1.0
            close = {"rtol": 0.0, "atol": within * scale, "equal_nan": True}
            torch.testing.assert_close(value, others[path], **close, msg=lambda text, path=path: f"{path}: {text}")
        elif isinstance(value, float):
            assert value == pytest.approx(others[path], rel=within), path
        else:
            assert value == others[path], path


@pytest.mark.parametrize(
    "what", ["profile", "one batch", "masked", "none", "moments", "plain moments", "fold moments", "no moments"]
)
def test_statistics_are_those_of_one_process(one: dict[str, Any], two: list[dict[str, Any]], what: str) -> None:
    for found in two:
        assert_alike(found[what], one[what], 1e-9)


@pytest.mark.parametrize("what", ["repairs", "folded", "branches", "judged", "kl", "best map"])
def test_repairs_and_decisions_are_those_of_one_process(
    one: dict[str, Any], two: list[dict[str, Any]], what: str
) -> None:
    for found in two:
        assert_alike(found[what], one[what], 1e-6)


def test_what_was_compared_is_not_empty(one: dict[str, Any]) -> None:
    assert one["profile"]["tokens"] == (127, 13) and one["moments"][0]["tokens"] == 127
    assert one["profile"]["sums"]["similarity"].shape[0] == 21
    assert 0 < one["masked"]["tokens"][0] < 127 - 13
    low, high = one["profile"]["interval"].tolist()
    assert low < high
    assert len(one["judged"]) == 5 and one["kl"].isfinite().all()


def test_both_processes_hold_the_same_bits(two: list[dict[str, Any]]) -> None:
    for what in ("profile", "one batch", "masked", "moments", "plain moments"):
        assert_alike(two[0][what], two[1][what], 0.0)


def test_batches_of_ones_own_are_all_taken(one: dict[str, Any], two: list[dict[str, Any]]) -> None:
    for found in two:
        assert_alike(found["its own"], one["profile"], 1e-9)
        assert_alike(found["its own moments"], one["moments"], 1e-9)


def test_one_process_may_measure_alone(one: dict[str, Any], two: list[dict[str, Any]]) -> None:
    assert "alone" not in two[0]
    assert_alike(two[1]["alone"], one["profile"], 0.0)


NAN = "Process 1 of 2 (its batch n is batch 2n + 1 of all): The state that enters block"


@pytest.mark.parametrize(
    ("case", "text"),
    [
        ("nan", NAN),
        ("nan in fit", NAN),
        ("argument", "StreamlineError: protect: block 99 is out of range"),
        ("argument of one", "StreamlineError: Process 1 of 2: protect: block 99 is out of range"),
        ("batches", "Processes 0 and 1 of 2 call profile with different batches ("),
        ("option", "Processes 0 and 1 of 2 call profile with different skip (0 and 1). Expected the same"),
        ("model", "call measure_moments with different fingerprint ("),
        ("shard", "pass shard=False in all of them"),
        ("wrapped", "is wrapped in DistributedDataParallel already"),
    ],
)
def test_what_goes_wrong_in_one_process_is_raised_in_both(two: list[dict[str, Any]], case: str, text: str) -> None:
    assert text in two[0]["said"][case]
    assert two[0]["said"][case] == two[1]["said"][case]


def test_the_batch_that_is_named_is_the_one(two: list[dict[str, Any]]) -> None:
    assert "(batch 1)" in two[0]["said"]["nan"]  # 2·1 + 1 is 3


def test_a_process_that_is_gone_is_noticed(folder: Path) -> None:
    said = (folder / "lost.txt").read_text()
    assert said.startswith("StreamlineError: Process 0 of 2 has lost the others in profile")
    assert "restart all of them" in said
