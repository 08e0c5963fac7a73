"""Two processes train a repair as one does, and stop, fail and go on together."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distillation.trained_together import SETTINGS, in_loss, interrupted, outcome, student, trainings
from tests.processes import in_processes

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trained")


@pytest.fixture(scope="module")
def one(folder: Path) -> dict[str, Any]:
    kept = SETTINGS
    with in_loss(5, interrupted):
        stopped = outcome(kept, checkpoint_file=folder / "one")
    return {**trainings(folder), "interrupted": stopped}


@pytest.fixture(scope="module")
def two(folder: Path, one: dict[str, Any]) -> list[dict[str, Any]]:
    code = """
        from pathlib import Path
        from tests.distillation.trained_together import in_several
        torch.save(in_several(Path(folder), rank), f"{folder}/{rank}.pt")
    """
    in_processes(code, folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def assert_alike(mine: dict[str, Any], theirs: dict[str, Any], within: float) -> None:
    assert "raised" not in mine, mine
    assert mine["steps"] == theirs["steps"]
    for name in ("kl", "loss"):
        torch.testing.assert_close(mine[name], theirs[name], rtol=0.0, atol=within)
    for a, b in zip(mine["weights"], theirs["weights"], strict=True):
        torch.testing.assert_close(a, b, rtol=0.0, atol=within)


@pytest.mark.parametrize("what", ["whole", "taught", "patience", "head", "whole, by token", "head, by token"])
def test_two_processes_train_what_one_does(one: dict[str, Any], two: list[dict[str, Any]], what: str) -> None:
    for found in two:
        assert_alike(found[what], one[what], {"patience": 1e-3, "whole": 1e-6, "taught": 1e-6}.get(what, 1e-5))


def test_what_was_compared_had_something_to_learn(one: dict[str, Any]) -> None:
    assert one["whole"]["steps"][:3] == (4, 2 * 100, 4)
    assert one["whole"]["kl"][-1] < one["whole"]["kl"][0] - 0.01
    start = next(iter(student().parameters().values()))
    assert (one["whole"]["weights"][0] - start).abs().max() > 1e-2
    stopped = one["patience"]["steps"][3]
    assert "language-modeling loss" in stopped and "no lower for 1 validation" in stopped


@pytest.mark.parametrize(
    "what",
    ["whole", "taught", "interrupted", "gone on", "of one, gone on", "dropout", "dropout, gone on", "nan", "memory",
     "other start", "head", "whole, by token", "head, by token", "memory, by token"],
)  # fmt: skip
def test_both_processes_hold_the_same_bits(two: list[dict[str, Any]], what: str) -> None:
    assert_alike(two[0][what], two[1][what], 0.0)
    assert two[0][what]["seconds"] == two[1][what]["seconds"]


@pytest.mark.parametrize("what", ["whole", "head"])
def test_logits_of_a_few_tokens_train_what_all_do(one: dict[str, Any], two: list[dict[str, Any]], what: str) -> None:
    for outcomes in (one, *two):
        assert_alike(outcomes[f"{what}, by token"], outcomes[what], 1e-5)


def test_ctrl_c_in_one_stops_both_after_the_same_step(two: list[dict[str, Any]]) -> None:
    assert two[0]["interrupted"]["steps"][3] == "interrupted after step 1"
    assert two[0]["its file"] == two[1]["its file"] == ["training"]


@pytest.mark.long
def test_a_training_goes_on_with_as_many_processes_or_with_others(
    folder: Path, one: dict[str, Any], two: list[dict[str, Any]]
) -> None:
    assert_alike(two[0]["gone on"], two[0]["whole"], 0.0)
    assert one["interrupted"]["steps"][3].startswith("interrupted after step ")
    assert_alike(two[0]["of one, gone on"], one["whole"], 1e-6)
    code = """
        from pathlib import Path
        from tests.distillation.trained_together import SETTINGS, in_loss, interrupted, outcome, replace
        kept = replace(SETTINGS, checkpoint_minutes=0.0)
        with in_loss(3, interrupted, rank=0):
            said["stopped"] = outcome(kept, checkpoint_file=Path(folder) / "several")["steps"][3]
    """
    (inside := folder / "apart").mkdir()
    stopped = in_processes(code, inside)
    assert stopped[0]["stopped"] == stopped[1]["stopped"] == "interrupted after step 1"
    assert_alike(outcome(SETTINGS, resume=True, checkpoint_file=inside / "several"), one["whole"], 1e-6)


def test_with_dropout_the_same_processes_go_on_to_the_same_weights(two: list[dict[str, Any]]) -> None:
    assert_alike(two[0]["dropout, gone on"], two[0]["dropout"], 0.0)
    assert not torch.equal(two[0]["dropout"]["weights"][0], two[0]["whole"]["weights"][0])


def test_a_loss_that_is_no_number_in_one_stops_both(two: list[dict[str, Any]]) -> None:
    for found in two:
        assert "loss of step 2 is nan" in found["nan"]["steps"][3]
        assert all(weight.isfinite().all() for weight in found["nan"]["weights"])


def test_memory_that_does_not_suffice_in_one_halves_what_both_run(
    one: dict[str, Any], two: list[dict[str, Any]]
) -> None:
    assert_alike(two[0]["memory"], one["whole"], 1e-6)
    (warning,) = two[0]["memory"]["said"]
    assert "Out of memory" in warning and "1 sequences" in warning
    assert two[1]["memory"]["said"] == []
    assert_alike(two[0]["memory, by token"], one["head, by token"], 5e-5)  # Adam divides by small gradients
    assert any("Out of memory" in warning for warning in two[0]["memory, by token"]["said"])


@pytest.mark.parametrize(
    ("case", "text"),
    [
        ("failed", "StreamlineError: Process 1 of 2: KeyError: 'no such thing'"),
        ("other settings", "StreamlineError: The 2 ranks were started with different data"),
        ("apart", "StreamlineError: The weights of ranks 0 and 1 differ at step 2"),
        ("no folder", "StreamlineError: Process 0 of 2: Writing"),
    ],
)
def test_what_goes_wrong_in_one_is_raised_in_both(two: list[dict[str, Any]], case: str, text: str) -> None:
    for found in two:
        assert found[case]["raised"].startswith(text)
    assert two[0][case] == two[1][case]


def test_both_begin_with_the_weights_of_the_first(one: dict[str, Any], two: list[dict[str, Any]]) -> None:
    assert_alike(two[1]["other start"], one["whole"], 1e-6)


def test_only_the_first_speaks(two: list[dict[str, Any]]) -> None:
    assert len(two[0]["interrupted"]["said"]) == 1 and not two[1]["interrupted"]["said"]
    assert math.isfinite(two[0]["interrupted"]["seconds"])
