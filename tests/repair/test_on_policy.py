"""Training a repair on its own text: the loss is the divergence there and nothing else, and it goes on as it was."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from streamline_hooks import LinearReplacement, StreamlineError
from streamline_hooks.cli.short_forms import parse_loss
from streamline_hooks.repair.distillation_config import DistillationConfig
from streamline_hooks.repair.objective import Objective
from streamline_hooks.repair.on_policy import OnPolicyConfig
from streamline_hooks.repair.own_text import OwnText
from streamline_hooks.repair.rollouts import Rollouts
from streamline_hooks.repair.student import Student
from streamline_hooks.repair.training import train
from streamline_hooks.testing import tiny_model
from tests.training_callbacks import BeforeSteps, RaiseAt

OWN = OnPolicyConfig(prompt=4, shortest=4, longest=16)
SETTINGS = DistillationConfig({"kl": 1.0, "lm": 1.0}, OWN, learning_rate=1e-2, epochs=2, validations=3)


def texts(seed: int, count: int, rows: int = 3, width: int = 24) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(3, 60, (rows, width), generator=generator) for _ in range(count)]
    return [{"input_ids": i, "attention_mask": torch.ones_like(i)} for i in ids]


BATCHES, VALIDATION = texts(0, 4), texts(1, 2)


def student_of(teacher: Any = None, dropout: float = 0.0) -> Student:
    torch.manual_seed(5)
    module = LinearReplacement(32)
    torch.nn.init.normal_(module.projection.weight, std=0.2)
    if dropout:
        module.projection = torch.nn.Sequential(torch.nn.Dropout(dropout), module.projection)
    return Student(tiny_model("llama"), [(range(2, 4), module)], teacher=teacher)


def weights(student: Student) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in student.parameters().values()]


@pytest.mark.parametrize("text", ["kl", "reverse_kl", "0.5*kl + 0.5*reverse_kl"])
@pytest.mark.parametrize("rows", [3, 1], ids=["at once", "in parts"])
def test_the_gradient_is_that_of_the_divergence_on_the_texts(
    text: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against autograd through the whole model, on the texts that were written; the likelihood has no part in it."""
    student, seen = student_of(), {}
    objective = Objective(parse_loss(text))
    settings = replace(SETTINGS, on_policy=replace(OWN, share=1.0, loss=objective.weights), epochs=1, max_grad_norm=0.0)

    def steps(self: Any, *given: Any) -> None:
        if "gradient" not in seen:
            seen["gradient"] = self.param_groups[0]["params"][0].grad.clone()

    write = OwnText.write

    def writes(self: Any, model: Any, batches: Any, seeds: Any, share: float) -> Any:
        if share > rows / 3:
            raise torch.cuda.OutOfMemoryError("planted")
        made = write(self, model, batches, seeds, share)
        seen.setdefault("texts", list(self.rollouts))
        return made

    monkeypatch.setattr(torch.optim.AdamW, "step", steps)
    monkeypatch.setattr(OwnText, "write", writes)
    train(student, BATCHES[:1], VALIDATION, settings)

    (written,) = seen["texts"]
    assert isinstance(written, Rollouts)
    model, given = student.model, written.batch
    with torch.no_grad():
        p = model(**given, use_cache=False).logits[written.answered].double().log_softmax(-1)
    with student.opened():
        q = model(**given, use_cache=False).logits[written.answered].double().log_softmax(-1)
    wanted = (
        objective.weights.get("kl", 0.0) * (p.exp() * (p - q)).sum()
        + objective.weights.get("reverse_kl", 0.0) * (q.exp() * (q - p)).sum()
    )
    (wanted / int(written.answered.sum())).backward()
    (parameter,) = student.parameters().values()
    torch.testing.assert_close(seen["gradient"], parameter.grad, rtol=1e-4, atol=1e-7)


def test_it_comes_closer_to_the_original_on_what_it_writes() -> None:
    student = student_of()
    settings = replace(SETTINGS, on_policy=replace(OWN, share=1.0), epochs=12, validations=4, learning_rate=3e-2)
    trained = train(student, BATCHES, VALIDATION, settings)
    own = [row["own_loss"] for row in trained.history[1:]]
    assert own[-1] < 0.7 * own[0]
    assert all(row["loss"] is None for row in trained.history), "no step was to be made on the calibration text"
    assert trained.written > 0
    assert f"tokens and {trained.written:,} of its own in" in str(trained)


def test_the_texts_grow_and_half_of_the_steps_are_made_on_them() -> None:
    kinds: list[bool] = []
    student, recorder = student_of(), BeforeSteps(lambda progress: kinds.append(progress.on_policy))
    trained = train(student, BATCHES, VALIDATION, replace(SETTINGS, epochs=14, validations=7), callbacks=[recorder])
    assert kinds == [False, True] * 28
    assert [row["length"] for row in trained.history][:1] == [4]
    assert trained.history[-1]["length"] == 16
    assert all(0 < row["whole"] <= 1 for row in trained.history[1:])
    assert all(row["loss"] and row["own_loss"] for row in trained.history[1:])


@pytest.mark.parametrize("step", [1, 2, 5])
def test_a_training_that_was_killed_goes_on_to_the_same_weights(step: int, tmp_path: Path) -> None:
    settings = replace(SETTINGS, checkpoint_minutes=0.0)
    whole = student_of(dropout=0.2)
    wanted = train(whole, BATCHES, VALIDATION, settings)
    with pytest.raises(MemoryError):
        train(
            student_of(dropout=0.2),
            BATCHES,
            VALIDATION,
            settings,
            checkpoint=tmp_path / "training",
            callbacks=[RaiseAt(step, MemoryError)],
        )
    fresh = student_of(dropout=0.2)
    torch.rand(7)
    found = train(fresh, BATCHES, VALIDATION, settings, resume=True, checkpoint=tmp_path / "training")
    assert all(torch.equal(a, b) for a, b in zip(weights(fresh), weights(whole), strict=True))
    assert (found.history, found.written) == (wanted.history, wanted.written)


def test_a_batch_of_padding_alone_changes_nothing() -> None:
    nothing = {name: torch.zeros_like(value) for name, value in BATCHES[0].items()}
    settings = replace(SETTINGS, on_policy=replace(OWN, share=1.0), epochs=2)
    student = student_of()
    before = weights(student)
    trained = train(student, [nothing], VALIDATION, replace(settings, weight_decay=0.0))
    assert trained.steps == 2 and trained.written == 0 and trained.history[1]["whole"] is None
    assert all(torch.equal(a, b) for a, b in zip(weights(student), before, strict=True))
    trained = train(student, [BATCHES[0], nothing], VALIDATION, settings)
    assert trained.steps == 4 and trained.written > 0 and any(row["own_loss"] for row in trained.history)


def test_other_settings_of_the_texts_are_another_training(tmp_path: Path) -> None:
    settings = replace(SETTINGS, epochs=1)
    train(student_of(), BATCHES, VALIDATION, settings, checkpoint=tmp_path / "training")
    with pytest.raises(StreamlineError, match="holds another training"):
        train(
            student_of(),
            BATCHES,
            VALIDATION,
            replace(settings, on_policy=replace(OWN, prompt=5)),
            resume=True,
            checkpoint=tmp_path / "training",
        )


def test_another_teacher_is_what_the_student_comes_to_say() -> None:
    """The distance is to the teacher, on the calibration text, on the validation text and on the student's own."""
    teacher = tiny_model("llama", seed=7)
    student = student_of(teacher)
    before = {name: p.detach().clone() for name, p in teacher.named_parameters()}
    trained = train(student, BATCHES, VALIDATION, replace(SETTINGS, loss={"kl": 1.0}, epochs=6))
    ids = torch.cat([batch["input_ids"] for batch in VALIDATION])
    with torch.no_grad():
        p = teacher(ids).logits.double().log_softmax(-1)
        with student.opened():
            q = student.model(ids).logits.double().log_softmax(-1)
    assert trained.distance == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
    assert trained.distance < 0.98 * trained.distance_before
    assert all(torch.equal(before[name], p) for name, p in teacher.named_parameters())
    own = train(student_of(), BATCHES, VALIDATION, replace(SETTINGS, loss={"kl": 1.0}, epochs=6))
    assert own.distance_before != pytest.approx(trained.distance_before, rel=1e-3)
    with pytest.raises(StreamlineError, match=r"after windows.*another model"):
        train(student_of(teacher), BATCHES, VALIDATION, replace(SETTINGS, loss={"mse": 1.0}))


def test_how_the_validation_text_is_batched_changes_nothing_of_the_training() -> None:
    one, other = student_of(), student_of()
    whole = {name: torch.cat([batch[name] for batch in VALIDATION]) for name in VALIDATION[0]}
    first, second = train(one, BATCHES, VALIDATION, SETTINGS), train(other, BATCHES, [whole], SETTINGS)
    assert all(torch.equal(a, b) for a, b in zip(weights(one), weights(other), strict=True))
    assert first.written == second.written and first.distance == pytest.approx(second.distance)
