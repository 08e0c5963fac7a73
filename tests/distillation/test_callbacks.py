"""Callbacks of a training run: when they are called, with what, and what they do not change."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from streamline_hooks import StreamlineError
from streamline_hooks.distillation.config import DistillationConfig
from streamline_hooks.distillation.losses import Objective
from streamline_hooks.distillation.progress import TrainingCallback, TrainingProgress
from streamline_hooks.distillation.student import Student
from streamline_hooks.distillation.train import train
from streamline_hooks.replacements import LinearReplacement
from streamline_hooks.testing import tiny_model
from tests.tiny_models import tokens

BATCHES, VALIDATION = [tokens(2, 8, seed) for seed in range(3)], [tokens(2, 8, 7)]
SETTINGS = DistillationConfig(learning_rate=1e-2, epochs=2, validations=2)


class Recorder(TrainingCallback):
    def __init__(self) -> None:
        self.calls: list[tuple[str, TrainingProgress]] = []

    def on_step_begin(self, progress: TrainingProgress) -> None:
        self.calls.append(("step_begin", progress))

    def on_step_end(self, progress: TrainingProgress) -> None:
        self.calls.append(("step_end", progress))

    def on_validation_begin(self, progress: TrainingProgress) -> None:
        self.calls.append(("validation_begin", progress))

    def on_validation_end(self, progress: TrainingProgress) -> None:
        self.calls.append(("validation_end", replace(progress, history=[*progress.history])))


def student() -> Student:
    return Student(tiny_model("llama"), [(range(2, 4), LinearReplacement(32))])


def test_callbacks_run_around_steps_and_validations() -> None:
    recorder = Recorder()
    trained = train(student(), BATCHES, VALIDATION, SETTINGS, callbacks=[recorder])
    step, validation = ["step_begin", "step_end"], ["validation_begin", "validation_end"]
    assert [name for name, _ in recorder.calls] == validation + 3 * step + validation + 3 * step + validation
    begun = [progress for name, progress in recorder.calls if name == "step_begin"]
    ended = [progress for name, progress in recorder.calls if name == "step_end"]
    assert [progress.step for progress in begun] == list(range(6)) and [p.step for p in ended] == list(range(1, 7))
    assert all(p.steps == 6 and p.loss is None for p in begun)
    assert [p.tokens for p in ended] == [16 * k for k in range(1, 7)]
    assert (
        sorted(n for p in begun[:3] for n in p.batches) == sorted(n for p in begun[3:] for n in p.batches) == [0, 1, 2]
    )
    losses = [progress.loss for progress in ended]
    assert sum(losses[:3]) / 3 == pytest.approx(trained.history[1]["loss"])  # type: ignore[arg-type]
    validated = [progress.history[-1] for name, progress in recorder.calls if name == "validation_end"]
    assert validated == trained.history


def test_a_step_whose_loss_is_not_finite_is_reported_but_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder, make = Recorder(), Objective.output_loss
    monkeypatch.setattr(Objective, "output_loss", lambda self, *given: make(self, *given) * float("nan"))
    train(student(), BATCHES, VALIDATION, SETTINGS, callbacks=[recorder])
    name, progress = recorder.calls[-1]
    assert name == "step_end" and progress.step == 0 and progress.loss != progress.loss


def test_callbacks_change_neither_the_weights_nor_what_can_be_resumed(tmp_path: Path) -> None:
    """A run that was kept with one list of callbacks continues with another one."""
    plain, stopped = student(), student()
    train(plain, BATCHES, VALIDATION, SETTINGS)

    class Stop(TrainingCallback):
        def on_step_begin(self, progress: TrainingProgress) -> None:
            if progress.step == 4:
                raise KeyboardInterrupt

    settings = SETTINGS
    assert (
        train(stopped, BATCHES, VALIDATION, settings, checkpoint_file=tmp_path / "training", callbacks=[Stop()]).steps
        == 4
    )
    trained = train(
        stopped,
        BATCHES,
        VALIDATION,
        settings,
        resume=True,
        checkpoint_file=tmp_path / "training",
        callbacks=[Recorder()],
    )
    assert trained.steps == 6
    pairs = zip(plain.parameters().values(), stopped.parameters().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_an_exception_of_a_callback_ends_the_run() -> None:
    class Fails(TrainingCallback):
        def on_validation_end(self, progress: TrainingProgress) -> None:
            raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        train(student(), BATCHES, VALIDATION, SETTINGS, callbacks=[Fails()])


@pytest.mark.parametrize("wrong", [print, TrainingCallback])
def test_what_is_not_a_callback_is_refused(wrong: Any) -> None:
    with pytest.raises(StreamlineError, match=rf"{type(wrong).__name__}"):
        train(student(), BATCHES, VALIDATION, SETTINGS, callbacks=[wrong])
