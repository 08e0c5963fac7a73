"""Copies of a model's own blocks keep what the model holds in another precision than most of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from streamline_hooks import LayerSurgeon, LinearReplacement, find_stack
from streamline_hooks.cli.short_forms import parse_healing
from streamline_hooks.repair import BlockConfig, fit_windows, place, train
from streamline_hooks.repair.distillation_config import DistillationConfig
from streamline_hooks.repair.healing import student_of
from streamline_hooks.surgery.placement import move_beside
from streamline_hooks.testing import tiny_model

GATE = "mlp.gate.weight"


@pytest.fixture
def routed() -> Any:
    """A mixture of experts in bfloat16, with the routers in float32, as Transformers loads it."""
    model: Any = tiny_model("glm4_moe", dtype=torch.bfloat16)
    for block in find_stack(model).blocks:
        gate = dict(block.named_parameters()).get(GATE)
        if gate is not None:
            gate.data = gate.data.float() * 1.0001
    return model


def gates(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if name.endswith(GATE)}


def text() -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(3, 60, (4, 10), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(2)]


@pytest.mark.parametrize("healing", ["lora:rank=2,targets=q_proj", "partial:where=beside,count=1"])
def test_healing_rounds_no_router(routed: Any, healing: str) -> None:
    if healing.startswith("lora"):
        pytest.importorskip("peft", reason="PEFT is not installed")
    before = gates(routed)
    assert before and all(value.dtype == torch.float32 for value in before.values())
    asked = [(range(2, 4), LinearReplacement(routed.config.hidden_size))]
    student = student_of(find_stack(routed), asked, parse_healing(healing))
    train(student, text(), text(), DistillationConfig(learning_rate=1e-30, epochs=1, validations=1))
    student.merge()
    student.settle()
    after = gates(routed)
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_an_inherited_block_rounds_no_router(routed: Any) -> None:
    window = range(2, 4)
    wanted = routed.get_parameter(f"model.layers.2.{GATE}").detach().clone()
    (repair,) = fit_windows(routed, [window], BlockConfig(solve=False), text(), text())
    with LayerSurgeon(routed) as surgeon:
        place(surgeon, window, repair.stand_in)
        surgeon.commit()
    held = routed.get_parameter(f"model.layers.2.{GATE}")
    assert held.dtype == torch.float32 and torch.equal(held, wanted)


def test_another_module_takes_the_precision_of_the_block() -> None:
    block = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)).to(torch.bfloat16).eval()
    module = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    move_beside(module, block)
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16} and not module.training
