"""Losses of users: they are trained on, validated and weighted as the library's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import huber_loss

from streamline_hooks import DistillationConfig, StreamlineError, compress, train
from streamline_hooks.distillation import LOSSES, Loss, Objective, TrainingResult, register_loss
from streamline_hooks.distillation.student import Student
from streamline_hooks.modeling import Task
from streamline_hooks.replacements import LinearReplacement
from streamline_hooks.testing import tiny_model
from tests.configured import configured

BATCHES = [torch.randint(3, 60, (4, 12), generator=torch.Generator().manual_seed(k)) for k in range(8)]
CONFIG = DistillationConfig(learning_rate=1e-2, epochs=4, validations=3)
SEEN: dict[str, list[tuple[tuple[int, ...], tuple[int, ...]]]] = {}


def huber(student: Tensor, teacher: Tensor) -> Tensor:
    SEEN.setdefault("huber", []).append((tuple(student.shape), tuple(teacher.shape)))
    return huber_loss(student, teacher, reduction="none").mean(dim=-1)


def symmetric_kl(student: Tensor, teacher: Tensor) -> Tensor:
    SEEN.setdefault("symmetric_kl", []).append((tuple(student.shape), tuple(teacher.shape)))
    p, q = teacher.log_softmax(dim=-1), student.log_softmax(dim=-1)
    return ((p.exp() - q.exp()) * (p - q)).sum(dim=-1) / 2


def likely(student: Tensor, labels: Tensor) -> Tensor:
    known = labels != -100
    chosen = student.log_softmax(dim=-1).gather(1, labels.clamp_min(0)[:, None])[:, 0]
    return -chosen * known


OWN = {
    "test_huber": Loss("test_huber", huber, compares="states"),
    "test_symmetric": Loss("test_symmetric", symmetric_kl, compares="logits", paper="Jeffreys"),
    "test_likely": Loss("test_likely", likely, compares="labels"),
}


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    SEEN.clear()
    for loss in OWN.values():
        register_loss(loss)
    yield
    for name in OWN:
        del LOSSES[name]


def trained_on(loss: dict[str, float], **more: Any) -> tuple[TrainingResult, Tensor]:
    module = LinearReplacement(32)
    student = Student(tiny_model("llama"), [(range(2, 4), module)])
    trained = train(student, BATCHES[:6], BATCHES[6:], replace(CONFIG, loss=loss, **more))
    return trained, module.projection.weight.detach().clone()  # type: ignore[union-attr]


@pytest.mark.parametrize("name", OWN)
def test_a_loss_of_a_user_falls(name: str) -> None:
    trained, weights = trained_on({name: 1.0})
    losses = [row["loss"] for row in trained.history[1:]]
    assert losses[-1] < losses[0] and weights.any()
    assert trained.best_step and trained.history[-1]["validated"] < trained.history[0]["validated"]


@pytest.mark.long
def test_a_loss_has_the_weight_that_it_is_given() -> None:
    weights = [trained_on({"kl": 1.0, "test_huber": weight})[1] for weight in (0.1, 10.0)]
    assert not torch.allclose(*weights, atol=1e-4)
    plain, double = (trained_on({"test_symmetric": weight})[0].history for weight in (1.0, 2.0))
    assert double[0]["validated"] == pytest.approx(2 * plain[0]["validated"])


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("own", "built_in"),
    [({"test_likely": 0.5}, {"lm": 0.5}), ({"kl": 2.0, "test_likely": 1.0}, {"kl": 2.0, "lm": 1.0})],
)
def test_a_loss_of_a_user_is_trained_and_validated_as_a_built_in_one(
    own: dict[str, float], built_in: dict[str, float]
) -> None:
    (found, ours), (wanted, theirs) = trained_on(own), trained_on(built_in)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    for name in ("distance", "validated"):
        assert [row[name] for row in found.history] == pytest.approx([row[name] for row in wanted.history], rel=1e-4)


def test_what_is_validated_is_the_distance_and_what_is_minimized_beside_it() -> None:
    on_states, on_logits = (trained_on({name: 1.0})[0].history for name in ("test_huber", "test_symmetric"))
    assert all(row["validated"] == row["distance"] for row in on_states)
    assert all(row["validated"] != row["distance"] for row in on_logits)
    both = trained_on({"kl": 1.0, "test_symmetric": 1.0})[0].history[0]
    assert both["validated"] == pytest.approx(on_logits[0]["validated"] + on_logits[0]["distance"])


def test_a_loss_sees_what_it_compares() -> None:
    trained_on({"test_huber": 1.0, "kl": 1.0})
    assert {shape for pair in SEEN["huber"] for shape in pair} == {(48, 32)} and "symmetric_kl" not in SEEN
    trained_on({"test_symmetric": 1.0, "kl": 1.0})
    assert {shape for pair in SEEN["symmetric_kl"] for shape in pair} == {(48, 64)}


def test_the_head_is_not_run_for_a_loss_on_states() -> None:
    objective = Objective({"test_huber": 1.0})
    assert objective.needs_states and not (objective.needs_logits or objective.needs_original_logits)
    objective = Objective({"test_symmetric": 1.0})
    assert objective.needs_original_logits and not objective.needs_states
    objective = Objective({"test_likely": 1.0})
    assert objective.needs_logits and objective.needs_labels and not objective.needs_original_logits


def test_losses_on_logits_get_them_as_they_are_beside_kl() -> None:
    """The gradient of KL is written over the teacher's logits."""
    student, teacher = torch.randn(5, 9, requires_grad=True), torch.randn(5, 9)
    objective = Objective({"kl": 1.0, "reverse_kl": 0.5, "test_symmetric": 2.0})
    objective.output_loss(student, teacher.clone()).backward()
    found, student.grad = student.grad, None
    p, q = teacher.double().log_softmax(-1), student.double().log_softmax(-1)
    wanted = (p.exp() * (p - q)).sum() + 0.5 * (q.exp() * (q - p)).sum() + ((p.exp() - q.exp()) * (p - q)).sum()
    wanted.backward()
    torch.testing.assert_close(found, student.grad, rtol=1e-4, atol=1e-6)


def test_a_loss_of_a_user_is_for_compress_too() -> None:
    parts = {"calibration": BATCHES[:4], "validation": BATCHES[4:6], "test": BATCHES[6:]}
    config = replace(CONFIG, loss={"test_huber": 1.0}, epochs=1)
    result = compress(tiny_model("llama"), parts, configured(remove=2, distillation=config))
    assert result.training is not None and result.training.steps == 4


def test_a_loss_needs_a_model_with_what_it_compares() -> None:
    with pytest.raises(StreamlineError, match="test_symmetric.*compares logits.*embedding"):
        Objective({"test_symmetric": 1.0}).require_task(Task("embedding"))
    Objective({"test_huber": 1.0}).require_task(Task("embedding"))


def other(student: Tensor, teacher: Tensor) -> Tensor:
    return student.sum(dim=-1)


def test_names_are_taken_once() -> None:
    assert register_loss(OWN["test_huber"]) is LOSSES["test_huber"]
    register_loss(Loss("test_huber", huber, compares="states"))  # as when a notebook's cell is run again
    for loss in (Loss("kl", other, compares="logits"), Loss("test_huber", other, compares="states")):
        with pytest.raises(StreamlineError, match=rf"loss '{loss.name}' is already registered.*Choose another"):
            register_loss(loss)
    with pytest.raises(StreamlineError, match="'test huber' is not a valid name.*Choose another"):
        register_loss(replace(OWN["test_huber"], name="test huber"))


@pytest.mark.parametrize(
    "reduced", [lambda a, b: (a - b).square().mean(), lambda a, b: (a - b).square(), lambda a, b: 0.0]
)
def test_a_loss_with_no_value_for_each_position_is_refused(reduced: Callable[..., Any]) -> None:
    loss = Loss("reduced", reduced, compares="states")
    with pytest.raises(StreamlineError, match=r"'reduced'.*5 positions.*\(5,\).*Reduce"):
        loss(torch.ones(5, 3), torch.zeros(5, 3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_gradient_has_the_precision_of_the_student(dtype: torch.dtype) -> None:
    """Many answers in a step make gradients small: those of a teacher in float16 would all be 0."""
    teacher = torch.randn(4, 5000).to(dtype)
    student = (teacher.float() + 0.01 * torch.randn(4, 5000)).requires_grad_()
    loss = Objective({"kl": 1.0}).output_loss(student, teacher.clone(), None) / 16384
    loss.backward()
    expected = (student.detach().softmax(dim=-1) - teacher.float().softmax(dim=-1)) / 16384
    torch.testing.assert_close(student.grad, expected, rtol=1e-3, atol=1e-12)


@pytest.mark.parametrize("name", ["kl", "reverse_kl", "lm"])
def test_the_function_of_a_loss_is_what_is_computed_with_less_memory(name: str) -> None:
    student, teacher = torch.randn(70, 11), torch.randn(70, 11)
    labels = torch.randint(0, 11, (70,)).where(torch.rand(70) < 0.7, -100)
    found = Objective({name: 1.0}).output_loss(student, teacher, labels)
    torch.testing.assert_close(found, LOSSES[name](student, labels if name == "lm" else teacher), rtol=1e-5, atol=1e-5)
