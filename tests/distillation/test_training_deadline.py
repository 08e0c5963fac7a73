"""A training that is out of time ends with the best weights so far, in one process and in several."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from streamline_hooks import StreamlineError
from streamline_hooks.distillation import loop
from streamline_hooks.distillation.config import DistillationConfig
from streamline_hooks.distillation.progress import TrainingCallback, TrainingProgress
from streamline_hooks.distillation.student import Student
from streamline_hooks.distillation.train import train
from streamline_hooks.distillation.training_file import read_training_file
from streamline_hooks.replacements import LinearReplacement
from streamline_hooks.testing import tiny_model
from tests.distillation.trained_together import BATCHES, VALIDATION
from tests.processes import in_processes

training = import_module("streamline_hooks.distillation.train")  # the package has a function of this name

SETTINGS = DistillationConfig(learning_rate=1e-2, epochs=3, validations=2)  # 12 steps, looked at after 6 and 12


class Steps(TrainingCallback):
    """A clock that counts steps as minutes; validations may take time too."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, a_step: float = 1.0, a_validation: float = 0.0) -> None:
        self.now, self.a_step, self.a_validation = 1000.0, a_step, a_validation
        monkeypatch.setattr(loop.time, "perf_counter", lambda: self.now)

    def on_step_begin(self, progress: TrainingProgress) -> None:
        self.now += 60 * self.a_step

    def on_validation_begin(self, progress: TrainingProgress) -> None:
        self.now += 60 * self.a_validation


def student() -> Student:
    return Student(tiny_model("llama"), [(range(1, 3), LinearReplacement(32))])


def weights(one: Student) -> list[torch.Tensor]:
    return [p.detach().clone() for p in one.parameters().values()]


def test_it_ends_after_the_step_it_is_at_and_is_looked_at_once_more(
    monkeypatch: pytest.MonkeyPatch, log_messages: list[str]
) -> None:
    clock = Steps(monkeypatch)
    trained = train(student(), BATCHES, VALIDATION, replace(SETTINGS, max_minutes=3.5), callbacks=[clock])
    assert (trained.steps, trained.seconds) == (4, 240.0)
    assert "3.5 minutes" in trained.stopped and "after step 4" in trained.stopped
    assert [row["step"] for row in trained.history] == [0, 4]
    assert trained.distance == min(row["distance"] for row in trained.history) and trained.best_step == 4
    (warning,) = log_messages
    assert trained.stopped in warning and "of step 4." in warning
    assert f"ended early: {trained.stopped}" in str(trained)


def test_the_time_of_each_look_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of the one that was made just now: of 10 minutes each, the first takes more than 5."""
    clock = Steps(monkeypatch, a_validation=10.0)
    trained = train(student(), BATCHES, VALIDATION, replace(SETTINGS, max_minutes=5), callbacks=[clock])
    assert (trained.steps, trained.stopped, trained.seconds) == (0, "no time was left", 600.0)
    trained = train(student(), BATCHES, VALIDATION, replace(SETTINGS, max_minutes=11.5), callbacks=[clock])
    assert (trained.steps, trained.seconds) == (2, 600.0 + 120 + 600)


def test_the_best_weights_stay_and_not_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Steps(monkeypatch)
    one = student()
    before = weights(one)
    trained = train(
        one,
        BATCHES,
        VALIDATION,
        replace(SETTINGS, max_minutes=3, learning_rate=1.0, warmup_ratio=0.0),
        callbacks=[clock],
    )
    assert trained.steps == 3 and trained.best_step == 0
    assert all(torch.equal(a, b) for a, b in zip(weights(one), before, strict=True))


def test_enough_time_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Steps(monkeypatch)
    one, other = student(), student()
    without = train(one, BATCHES, VALIDATION, SETTINGS, callbacks=[clock])
    trained = train(other, BATCHES, VALIDATION, replace(SETTINGS, max_minutes=12), callbacks=[clock])
    assert trained.stopped == "" and trained.steps == 12 and trained.history == without.history
    assert all(torch.equal(a, b) for a, b in zip(weights(one), weights(other), strict=True))


def test_seconds_before_an_interruption_count_and_more_minutes_go_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    clock = Steps(monkeypatch)
    kept = SETTINGS
    whole, parts = student(), student()
    train(whole, BATCHES, VALIDATION, SETTINGS, callbacks=[clock])
    train(
        parts,
        BATCHES,
        VALIDATION,
        replace(kept, max_minutes=6),
        checkpoint_file=tmp_path / "training",
        callbacks=[clock],
    )
    assert read_training_file(tmp_path / "training")[1]["seconds"] == 360.0
    again = train(
        parts,
        BATCHES,
        VALIDATION,
        replace(kept, max_minutes=6),
        resume=True,
        checkpoint_file=tmp_path / "training",
        callbacks=[clock],
    )
    assert again.steps == 6, "a time that is over was given anew"
    more = train(
        parts,
        BATCHES,
        VALIDATION,
        replace(kept, max_minutes=8),
        resume=True,
        checkpoint_file=tmp_path / "training",
        callbacks=[clock],
    )
    assert (more.steps, more.seconds) == (8, 480.0)
    rest = train(
        parts, BATCHES, VALIDATION, kept, resume=True, checkpoint_file=tmp_path / "training", callbacks=[clock]
    )
    assert rest.stopped == "" and rest.steps == 12
    assert all(torch.equal(a, b) for a, b in zip(weights(parts), weights(whole), strict=True))


def test_a_resumed_run_has_no_additional_validation(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With the validation at the limit in its history, it would end by `patience`, or keep other weights."""
    clock, file = Steps(monkeypatch), tmp_path / "training"
    settings = replace(SETTINGS, patience=2)
    whole, parts = student(), student()
    expected = train(whole, BATCHES, VALIDATION, settings, callbacks=[clock])
    limited = train(
        parts, BATCHES, VALIDATION, replace(settings, max_minutes=4), checkpoint_file=file, callbacks=[clock]
    )
    assert [row["step"] for row in limited.history] == [0, 4]
    resumed = train(parts, BATCHES, VALIDATION, settings, resume=True, checkpoint_file=file, callbacks=[clock])
    assert resumed.history == expected.history and resumed.stopped == expected.stopped
    assert all(torch.equal(a, b) for a, b in zip(weights(parts), weights(whole), strict=True))


def test_what_was_spent_before_the_first_step_counts_again_where_it_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An original that is run faster the second time leaves no more time: a training that had ended has ended."""
    clock = Steps(monkeypatch)
    kept = replace(SETTINGS, max_minutes=6)
    teach = training.cache_for_student

    def slow(*given: Any, **options: Any) -> Any:
        clock.now += 60
        return teach(*given, **options)

    first, again = student(), student()
    with monkeypatch.context() as patch:
        patch.setattr(training, "cache_for_student", slow)  # for the text, and for what validates
        assert (
            train(first, BATCHES, VALIDATION, kept, checkpoint_file=tmp_path / "training", callbacks=[clock]).steps == 4
        )
    assert (
        train(
            again, BATCHES, VALIDATION, kept, resume=True, checkpoint_file=tmp_path / "training", callbacks=[clock]
        ).steps
        == 4
    )
    assert all(torch.equal(a, b) for a, b in zip(weights(first), weights(again), strict=True))


@pytest.mark.parametrize("minutes", [0, -1.0, float("nan")])
def test_no_time_is_refused(minutes: float) -> None:
    with pytest.raises(StreamlineError, match=r"max_minutes=.*\(0, inf\)"):
        DistillationConfig(max_minutes=minutes)


@pytest.mark.long
@pytest.mark.slow
def test_several_processes_go_by_the_clock_of_the_first(tmp_path: Path) -> None:
    """The second one's clock stands still, and it ends after the same step."""
    code = """
        from dataclasses import replace
        from streamline_hooks.distillation import train, loop
        from tests.training_callbacks import BeforeSteps
        from tests.distillation.trained_together import BATCHES, VALIDATION
        from tests.distillation.test_training_deadline import SETTINGS, student, weights
        now = [0.0]
        def tick(progress):
            now[0] += 60.0 if rank == 0 else 0.0
        loop.time.perf_counter = lambda: now[0]
        one = student()
        trained = train(one, BATCHES, VALIDATION, replace(SETTINGS, max_minutes=3), callbacks=[BeforeSteps(tick)])
        torch.save([trained.steps, trained.stopped, weights(one)], f"{folder}/{rank}.pt")
    """
    in_processes(code, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first[:2] == second[:2] and first[0] == 3
    assert "3 minutes" in first[1] and "after step 3" in first[1]
    assert all(torch.equal(a, b) for a, b in zip(first[2], second[2], strict=True))
