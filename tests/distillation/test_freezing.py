"""What stands in a window's place is trained in other people's loops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from streamline_hooks import LayerSurgeon, StreamlineError
from streamline_hooks.distillation.healing import freeze_all_but
from streamline_hooks.modeling import find_stack
from streamline_hooks.repair import SilencedConfig
from streamline_hooks.replacements import LinearReplacement
from streamline_hooks.testing import tiny_model

IDS = torch.arange(3, 51).view(4, 12)


def states(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def changed(model: nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


def shortened(slot: bool = False) -> tuple[Any, nn.Module]:
    model: Any = tiny_model("llama").train()
    with LayerSurgeon(model) as surgeon:
        module = surgeon.replace(range(2, 4), model.model.layers[2] if slot else LinearReplacement(32))
        surgeon.commit()
    assert module is not None
    return model, module


@pytest.mark.parametrize("slot", [False, True])
def test_an_optimizer_changes_it_and_nothing_else(slot: bool) -> None:
    model, module = shortened(slot)
    before = states(model)
    parameters = freeze_all_but(model, module)
    assert [p for p in model.parameters() if p.requires_grad] == parameters
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    prefix = "model.layers.2." if slot else "model.layers.2.spliced_before."
    found = changed(model, before)
    assert found and all(name.startswith(prefix) for name in found)


def test_accelerate_takes_it(tmp_path: Path) -> None:
    from accelerate import Accelerator

    model, module = shortened()
    before = states(model)
    accelerator = Accelerator(cpu=True)
    prepared, optimizer = accelerator.prepare(model, torch.optim.SGD(freeze_all_but(model, module), lr=1.0))
    accelerator.backward(prepared(IDS, labels=IDS).loss)
    optimizer.step()
    assert len(changed(model, before)) == 1


def test_a_trainer_takes_it_and_what_it_saves_loads(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    model, module = shortened()
    before = states(model)
    freeze_all_but(model, module)
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, learning_rate=1e-2, report_to=[], use_cpu=True, save_strategy="no",
        per_device_train_batch_size=2, disable_tqdm=True,
    )  # fmt: skip
    data: Any = [{"input_ids": row, "labels": row} for row in IDS]
    trainer = Trainer(model=model, args=arguments, train_dataset=data)
    trainer.train()
    assert len(changed(model, before)) == 1
    trainer.save_model(str(tmp_path / "out"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS).logits, model.eval()(IDS).logits)


def test_what_is_not_there_or_has_nothing_to_train_is_refused() -> None:
    model, _ = shortened()
    with pytest.raises(StreamlineError, match=r"LinearReplacement.*not in the model"):
        freeze_all_but(model, LinearReplacement(32))
    with pytest.raises(StreamlineError, match="nothing to train in SiLU"):
        freeze_all_but(model, model.model.layers[0].mlp.act_fn)
    assert all(p.requires_grad for p in model.parameters()), "a refusal has frozen something"


def test_what_is_frozen_in_it_stays_frozen() -> None:
    """The attention of a zeroed block would be nonzero again otherwise."""
    model: Any = tiny_model("llama").train()
    zeroed = SilencedConfig().build(find_stack(model), range(2, 4))
    assert isinstance(zeroed, nn.Module)
    with LayerSurgeon(model) as surgeon:
        module = surgeon.replace(range(2, 4), zeroed)
        surgeon.commit()
    assert module is not None
    optimizer = torch.optim.AdamW(freeze_all_but(model, module), lr=1e-2)
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    assert not model.model.layers[2].self_attn.o_proj.weight.any()
    model.requires_grad_(False)
    assert len(freeze_all_but(model, model.model.layers[0].mlp)) == 3, "what is frozen whole is meant to be trained"
    found = freeze_all_but(model, module)
    zeroed = model.model.layers[2].self_attn.o_proj.weight
    assert len(found) == len(list(module.parameters())) - 1 and not zeroed.requires_grad


def test_what_begins_at_zero_is_trained_though_all_was_frozen() -> None:
    model, module = shortened()
    with torch.no_grad():
        module.projection.weight.zero_()  # type: ignore[union-attr, operator]
    model.requires_grad_(False)
    assert len(freeze_all_but(model, module)) == 1
