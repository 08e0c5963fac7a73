"""Timing a training by its own steps: what it is told, and that it leaves nothing behind."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from torch import nn

from streamline_hooks import CompressionConfig, HardwareConfig, StreamlineError, find_stack
from streamline_hooks.repair import HealingConfig, Student, student_of, train
from streamline_hooks.repair.training_pace import TrainingPace, measure_training_pace
from tests.evaluation.fake_clock import FakeClock
from tests.tiny_models import BLOCKS, tiny_model, tokens

BATCHES = [tokens(1, 16, seed=seed) for seed in range(4)]
VALIDATION = tokens(1, 12, seed=9)
BEST = CompressionConfig.preset("best")
assert BEST.distillation is not None
SETTINGS = BEST.distillation


def student(model: nn.Module, healing: HealingConfig | None = BEST.healing) -> Student:
    stack = find_stack(model)
    window = range(2, 4)
    return student_of(stack, [(window, BEST.repair.build(stack, window))], healing)


@pytest.mark.parametrize("autocast", [None, "bfloat16"])
@pytest.mark.parametrize("healing", [BEST.healing, HealingConfig(method="lora", rank=2, dropout=0.5)])
def test_the_original_is_left_to_the_bit(autocast: Literal["bfloat16"] | None, healing: HealingConfig) -> None:
    """Weights, gradients, which of them are wanted, modes, hooks, and the state of the random numbers."""
    model = tiny_model("llama").train()
    model.model.layers[1].eval()
    for k, parameter in enumerate(model.parameters()):
        parameter.grad = None if k % 3 else torch.full_like(parameter, float(k))
        parameter.requires_grad_(k % 4 != 0)

    def everything() -> list[Any]:
        return [
            {name: value.clone() for name, value in model.state_dict().items()},
            [None if p.grad is None else p.grad.clone() for p in model.parameters()],
            [p.requires_grad for p in model.parameters()],
            [id(p) for p in model.parameters()],
            [(name, m.training, len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in m.__dict__)
             for name, m in model.named_modules()],
        ]  # fmt: skip

    made = student(model, healing)
    before, random = everything(), torch.get_rng_state()
    pace = measure_training_pace(made, BATCHES[:3], VALIDATION, SETTINGS, hardware=HardwareConfig(autocast=autocast))
    after = everything()
    assert pace.autocast is autocast
    assert torch.equal(torch.get_rng_state(), random)
    assert list(before[0]) == list(after[0])
    assert all(torch.equal(value, after[0][name]) for name, value in before[0].items())
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(before[1], after[1], strict=True))
    assert before[2:] == after[2:]


def test_the_steps_are_real_ones() -> None:
    """The student that is spent has learnt something: gradients reached it, and the optimiser moved it."""
    made = student(tiny_model("llama"))
    before = [p.detach().clone() for p in made.parameters().values()]
    measure_training_pace(made, BATCHES[:3], VALIDATION, replace(SETTINGS, warmup_ratio=0.0))
    assert all(not torch.equal(a, b) for a, b in zip(before, made.parameters().values(), strict=True))


@pytest.mark.parametrize(("epochs", "validations", "accumulation"), [(1, 1, 1), (3, 4, 1), (3, 1, 2)])
def test_what_is_told_is_what_the_training_takes(
    epochs: int, validations: int, accumulation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that the blocks move in a forward, and every step of the optimiser by as much again."""
    model, clock = tiny_model("llama"), FakeClock()
    for k, block in enumerate(model.model.layers):
        clock.charge(block.mlp, k + 1.0)
    clock.charge(model.lm_head, 5.0)
    make = torch.optim.AdamW.step

    def step(self: Any, *given: Any) -> Any:
        clock.now += 32.0
        return make(self, *given)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    settings = replace(SETTINGS, gradient_accumulation_steps=accumulation)
    pace = measure_training_pace(student(model), BATCHES[: accumulation + 2], VALIDATION, settings, clock=clock)
    began = clock.now
    train(student(model), BATCHES, [VALIDATION], replace(settings, epochs=epochs, validations=validations))
    told = pace.seconds(4 * 16, 12, epochs=epochs, validations=validations)
    assert told == pytest.approx(clock.now - began)
    looked = pace.steps_and_validations(4 * 16, 12, epochs=epochs, validations=validations)
    assert told - looked == pytest.approx((4 * 16 + 12) * sum(range(1, BLOCKS + 1)))


def test_the_first_step_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes a hundred times as long, and the pace is that of the others."""
    clock, made = FakeClock(), torch.optim.AdamW.step
    seconds = iter([1600.0, 16.0, 16.0])

    def step(self: Any, *given: Any) -> Any:
        clock.now += next(seconds)
        return made(self, *given)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    pace = measure_training_pace(student(tiny_model("llama")), BATCHES[:3], VALIDATION, SETTINGS, clock=clock)
    assert pace == TrainingPace(original=0.0, apart=0.0, step=1.0, validation=0.0, around=0.0)


def test_one_batch_is_too_few() -> None:
    with pytest.raises(StreamlineError, match=r"1 batches.*expected 2.*1 sets"):
        measure_training_pace(student(tiny_model("llama")), BATCHES[:1], VALIDATION, SETTINGS)
