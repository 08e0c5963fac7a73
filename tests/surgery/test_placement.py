"""Copies of a model's own blocks keep what the model holds in another precision than most of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from streamline_hooks import LayerSurgeon, find_stack
from streamline_hooks.cli import parse_healing
from streamline_hooks.distillation import DistillationConfig, student_of, train
from streamline_hooks.repair import BlockConfig, fit_windows, insert_replacement
from streamline_hooks.replacements import LinearReplacement
from streamline_hooks.surgery.placement import match_block, move_to_device_of
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
    student.copy_weights_to_model()
    after = gates(routed)
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_an_inherited_block_rounds_no_router(routed: Any) -> None:
    window = range(2, 4)
    wanted = routed.get_parameter(f"model.layers.2.{GATE}").detach().clone()
    (repair,) = fit_windows(routed, [window], BlockConfig(solve=False), text(), text())
    with LayerSurgeon(routed) as surgeon:
        insert_replacement(surgeon, window, repair.replacement_module)
        surgeon.commit()
    held = routed.get_parameter(f"model.layers.2.{GATE}")
    assert held.dtype == torch.float32 and torch.equal(held, wanted)


def test_another_module_takes_the_precision_of_the_block() -> None:
    block = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)).to(torch.bfloat16).eval()
    module = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    match_block(module, block)
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16} and not module.training


def test_a_module_moves_to_the_device_that_accelerate_runs_a_block_on() -> None:
    """The meta device represents a GPU here. The parameters of an offloaded block are on it too."""
    block, module = nn.Linear(8, 8, device="meta"), nn.Linear(8, 8)
    block._hf_hook = SimpleNamespace(execution_device="meta")
    move_to_device_of(module, block)
    assert module.weight.device.type == "meta"


def test_a_module_on_the_device_of_a_block_stays_there() -> None:
    module = nn.Linear(8, 8)
    weight = module.weight
    bring_back = move_to_device_of(module, nn.Linear(8, 8, dtype=torch.bfloat16))
    assert module.weight is weight and weight.dtype == torch.float32
    bring_back()
    assert module.weight is weight
