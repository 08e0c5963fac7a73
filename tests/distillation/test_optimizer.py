"""An optimization that is gone on from makes the steps that the whole one makes."""

from __future__ import annotations

import torch
from torch import nn

from streamline_hooks.distillation.config import DistillationConfig
from streamline_hooks.distillation.optimizer import TrainingOptimizer

SETTINGS = DistillationConfig(learning_rate=0.1, warmup_ratio=0.3, weight_decay=0.5, max_grad_norm=1.0)
STEPS = 8


def parameters() -> dict[str, nn.Parameter]:
    torch.manual_seed(0)
    return {
        "wide": nn.Parameter(torch.randn(3, 2)),
        "narrow": nn.Parameter(torch.randn(2, 3).bfloat16()),
        "vector": nn.Parameter(torch.randn(4)),
        "kept": nn.Parameter(torch.randn(2, 2)),
    }


def made(held: dict[str, nn.Parameter]) -> TrainingOptimizer:
    return TrainingOptimizer(held, SETTINGS, STEPS, lambda name: 0.25 if name == "kept" else 1.0)


def stepped(held: dict[str, nn.Parameter], optimization: TrainingOptimizer, steps: range) -> None:
    for step in steps:
        optimization.weights.clear()
        for number, parameter in enumerate(held.values()):
            parameter.grad = torch.full_like(parameter, 0.3 * step - number)
        optimization.weights.collect()
        optimization.step()


def test_what_is_kept_goes_on_to_the_bit() -> None:
    whole, begun, later = parameters(), parameters(), parameters()
    stepped(whole, made(whole), range(STEPS))
    first = made(begun)
    stepped(begun, first, range(3))
    tensors = {name: tensor.clone() for name, tensor in first.tensors().items()}
    rest = made(later)
    rest.load(tensors, first.json_state())
    assert all(torch.equal(later[name], begun[name]) for name in begun)
    stepped(later, rest, range(3, STEPS))
    for name, parameter in whole.items():
        assert torch.equal(later[name], parameter)
        assert not torch.equal(begun[name], parameter)


def test_matrices_decay_and_each_has_its_rate() -> None:
    groups = {tuple(p.shape): g for g in made(parameters()).optimizer.param_groups for p in g["params"]}
    assert {shape: (g["initial_lr"], g["weight_decay"]) for shape, g in groups.items()} == {
        (3, 2): (0.1, 0.5), (2, 3): (0.1, 0.5), (4,): (0.1, 0.0), (2, 2): (0.025, 0.5),
    }  # fmt: skip


def test_weights_in_another_order_of_memory_get_the_same_updates() -> None:
    """The fused update of a CPU ignores strides, so it is used only for contiguous weights."""
    values = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    results = []
    for start in (values.clone(), values.T.contiguous().T):
        parameter = torch.nn.Parameter(start)
        optimizer = TrainingOptimizer({"weight": parameter}, DistillationConfig(), 4, lambda _: 1.0)
        for number in range(4):
            parameter.grad = (values + number).contiguous()
            optimizer.step()
        results.append(parameter.detach())
    assert not results[1].is_contiguous()
    torch.testing.assert_close(*results)
